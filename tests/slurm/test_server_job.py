"""A server's job in a real SLURM, with what stands for the server: it is told to end, and ends as it should."""

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.slurm import Cluster

ROOT = Path(__file__).parents[2]

PYTHON = """\
#!/usr/bin/env bash
if [[ "$1 $2 ${3-}" == "-m megatron_ee.server --stages" ]]; then echo 1; exit; fi
shift 2
exec "$SERVED_BY" "$SERVER" "$@"
"""

SERVER = """\
import signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
print("served with", *sys.argv[1:], flush=True)
while not heard:
    time.sleep(0.05)
time.sleep(1)
print("drained", flush=True)
"""


@pytest.mark.parametrize("how", [["--batch", "--signal=USR1"], []], ids=["before its time is up", "cancelled"])
def test_a_server_drains_when_its_job_is_told_to_end(cluster: Cluster, tmp_path: Path, how: Any) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    command = (str(ROOT / "scripts/serve.slurm"), "--parsable", cluster.log_option, "--", "serve.yaml")
    server = {"SERVED_BY": sys.executable, "SERVER": str(tmp_path / "server.py")}
    job = cluster.submit(*command, PYTHON=str(tmp_path / "python"), **server)
    port = 8000 + int(job.number) % 12000
    job.wait_for(lambda: f"served with serve.yaml serving.port={port}" in job.log)
    assert f"listens at port {port} of 127.0.0.1" in job.log
    cluster.call("scancel", *how, job.number)
    state, _ = job.end()
    job.wait_for(lambda: "drained" in job.log)
    assert state == ("COMPLETED" if how else "CANCELLED"), job.log
    assert job.fields()["Restarts"] == "0"
