"""SLURM for these tests, and a run that is left alone in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.long_run import has_iteration, read_losses, write_long_run
from helpers.slurm import Cluster, Job, why_not

ROOT = Path(__file__).parents[2]
LAUNCHER = str(ROOT / "scripts/train.slurm")
TRAIN_ITERS = 60


class Runs:
    """Submits the run under names of its own, and reads what they leave."""

    def __init__(self, cluster: Cluster, config: Path) -> None:
        self.cluster, self.config = cluster, config

    def submit(self, name: str, *overrides: str, options: tuple[str, ...] = (), **environment: str) -> Job:
        """As `sbatch OPTIONS scripts/train.slurm CONFIG name=NAME OVERRIDES` does."""
        arguments = (*options, LAUNCHER, str(self.config), f"name={name}", *overrides)
        return self.cluster.sbatch(*arguments, **environment)

    def folder(self, name: str) -> Path:
        return self.config.parent / "runs" / name

    def submit_and_wait_for_iteration(self, name: str, **environment: str) -> Job:
        """Until the record has its first figures."""
        job = self.submit(name, **environment)
        job.wait_for(lambda: self.has_begun(name))
        return job

    def has_begun(self, name: str) -> bool:
        """Whether the record has its first figures."""
        return has_iteration(self.folder(name), 7)


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
    return Runs(cluster, write_long_run(tmp_path_factory.mktemp("slurm_runs"), train_iters=TRAIN_ITERS))


@pytest.fixture(scope="session")
def stopped_jobs(runs: Runs) -> dict[str, Job]:
    """Two jobs, each on a node, and each stopped once it trains: one by what SLURM sends before a time limit, one by a
    job of the partition above."""
    signalled = runs.submit("signalled", "logging.wandb={project: slurm, mode: offline}", MAX_REQUEUES="1")
    preempted = runs.submit("preempted")
    jobs = {"signalled": signalled, "preempted": preempted}

    def stop(name: str) -> None:
        if name == "signalled":
            runs.cluster.call("scancel", "--batch", "--signal=USR1", signalled.number)
        else:
            node = preempted.fields()["NodeList"]
            runs.cluster.sbatch("--partition=high", f"--nodelist={node}", "--wrap=true")

    going = set(jobs)
    while going:
        jobs[min(going)].wait_for(lambda: any(map(runs.has_begun, going)))
        for name in filter(runs.has_begun, sorted(going)):
            stop(name)
            going.remove(name)
    return jobs


@pytest.fixture(scope="session")
def undisturbed_job(runs: Runs, stopped_jobs: dict[str, Job]) -> Job:
    """A job of two ranks that is left alone, submitted by the launcher itself; it goes while those wait."""
    options = ("--parsable", runs.cluster.log_option)
    job = runs.cluster.submit(LAUNCHER, *options, "--", str(runs.config), "name=undisturbed")
    job.end()
    return job


@pytest.fixture(scope="session")
def undisturbed(runs: Runs, undisturbed_job: Job) -> list[dict[str, float]]:
    """Its losses."""
    return read_losses(runs.folder("undisturbed"))
