"""The SLURM of these tests: it says why it is not there, and nothing of it is left behind."""

from pathlib import Path

import pytest
from helpers.slurm import Cluster, processes_with, wait_until, why_not


def test_a_machine_without_slurm_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not() == "needs SLURM and munge, but there is no munged: apt-get install slurm-wlm munge"


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    job = cluster.sbatch("--wrap=sleep 600")
    job.wait_for(lambda: job.fields()["JobState"] == "RUNNING")
    assert len(processes_with(f"SLURM_CONF={cluster.folder}/slurm.conf")) >= 5
    cluster.stop()
    wait_until(lambda: not processes_with(f"SLURM_CONF={cluster.folder}/slurm.conf"))  # a process dies in its own time
