"""What train.sh puts into the environment of the ranks, and that it leaves alone what is there."""

from typing import Any

DEFAULTS = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def test_ranks_get_the_defaults(scripts: Any) -> None:
    assert scripts.run("train.sh", "tiny.yaml").returncode == 0
    ranks = scripts.environment_of_ranks()
    assert {name: ranks.get(name) for name in DEFAULTS} == DEFAULTS
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in ranks, "only for tensor parallelism"


def test_tensor_parallelism_gets_one_hardware_queue(scripts: Any) -> None:
    assert scripts.run("train.sh", "tiny.yaml", "parallel.tensor=2").returncode == 0
    assert scripts.environment_of_ranks()["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_what_is_set_stays(scripts: Any) -> None:
    mine = {**dict.fromkeys(DEFAULTS, "mine"), "PYTHONFAULTHANDLER": "", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert scripts.run("train.sh", "tiny.yaml", "parallel.tensor=2", **mine).returncode == 0
    ranks = scripts.environment_of_ranks()
    assert {name: ranks.get(name) for name in mine} == mine


def test_the_older_name_of_the_allocator_s_setting_counts(scripts: Any) -> None:
    assert scripts.run("train.sh", "tiny.yaml", PYTORCH_CUDA_ALLOC_CONF="backend:native").returncode == 0
    assert scripts.environment_of_ranks()["PYTORCH_ALLOC_CONF"] == "backend:native"


def test_nodes_meet_by_the_name_of_the_run_or_a_given_one(scripts: Any) -> None:
    nodes = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    scripts.run("train.sh", "tiny.yaml", **nodes)
    scripts.run("train.sh", "tiny.yaml", **nodes, RDZV_ID="17.0")
    by_name, by_id = scripts.started()
    assert "--rdzv-id tiny " in by_name
    assert "--rdzv-id 17.0 " in by_id
