"""SLURM for these tests, and what submits runs to it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.long_run import has_iteration, write_long_run
from helpers.slurm import Cluster, Job, why_not

ROOT = Path(__file__).parents[2]
LAUNCHER = str(ROOT / "scripts/train.slurm")


class Runs:
    """Submits the run under names of its own, and reads what they leave."""

    def __init__(self, cluster: Cluster, config: Path) -> None:
        self.cluster, self.config = cluster, config

    def submit(self, name: str, *overrides: str, options: tuple[str, ...] = (), **environment: str) -> Job:
        """As `sbatch OPTIONS scripts/train.slurm CONFIG name=NAME OVERRIDES` does."""
        arguments = (*options, LAUNCHER, str(self.config), f"name={name}", *overrides)
        return self.cluster.sbatch(*arguments, **environment)

    def launch(self, name: str, *overrides: str, **environment: str) -> Job:
        """As `scripts/train.slurm CONFIG name=NAME OVERRIDES` does, which submits itself."""
        arguments = ("--parsable", self.cluster.log_option, "--", str(self.config), f"name={name}", *overrides)
        return self.cluster.submit(LAUNCHER, *arguments, **environment)

    def folder(self, name: str) -> Path:
        return self.config.parent / "runs" / name

    def wait_until_begun(self, name: str, job: Job) -> None:
        """Until the record has its first figures."""
        job.wait_for(lambda: has_iteration(self.folder(name), 7))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(cluster, write_long_run(tmp_path_factory.mktemp("slurm_runs")))
