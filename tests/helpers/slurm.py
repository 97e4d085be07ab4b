"""A SLURM of its own on this machine: two nodes, a partition that preempts, no services, nothing outside its folder."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
TIMEOUT_S = 240
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# A requeued job waits until no credential of its last start is valid, two minutes as a rule: cred_expire. One node has
# two CPUs whatever the machine has; each job takes whole nodes.
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=60
SlurmdParameters=config_overrides
SelectType=select/linear
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why SLURM cannot be started here; None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"needs SLURM and munge, but there is no {missing[0]}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "needs root, because SLURM's daemons do"


class Job:
    """A job by its id, or a task of an array by ARRAY_TASK."""

    def __init__(self, cluster: "Cluster", number: str) -> None:
        self.cluster, self.number = cluster, number

    def fields(self) -> dict[str, str]:
        """What SLURM says of it."""
        said = self.cluster.call("scontrol", "show", "job", self.number, "--oneliner")
        return dict(word.partition("=")[::2] for word in said.split())

    @property
    def log(self) -> str:
        """What it has written."""
        path = self.cluster.folder / f"job-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        """Until something is there."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_there():
            assert time.monotonic() < deadline, f"{self.fields()}\n{self.log}"
            time.sleep(0.1)

    def end(self) -> tuple[str, str]:
        """Wait until it has ended for good; returns its state and its exit status as SLURM writes it, status:signal."""
        fields = self.fields()

        def has_ended() -> bool:
            nonlocal fields
            fields = self.fields()
            return fields["JobState"] in _ENDED

        self.wait_for(has_ended)
        return fields["JobState"], fields["ExitCode"]


class Cluster:
    """Daemons that run until `stop`.

    Args:
        folder: everything is below it; it has to be new.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        settings = {"SLURM_CONF": f"{folder}/slurm.conf", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        self.environment = {**outside, **settings}
        for name in ("state", "spool/n1", "spool/n2"):
            (folder / name).mkdir(parents=True)
        text = _CONFIG.format(folder=folder, host=socket.gethostname(), ports=_free_ports(3))
        (folder / "slurm.conf").write_text(text)
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def call(self, *command: str, **environment: str) -> str:
        """What a command says that has to succeed."""
        settings = {**self.environment, **environment}
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *command: str, **environment: str) -> Job:
        """Run a command that ends by printing the job's id (sbatch --parsable)."""
        return Job(self, self.call(*command, **environment).split()[-1])

    def sbatch(self, *options: str, **environment: str) -> Job:
        """Submit with sbatch's options, script and arguments; the log is the job's."""
        return self.submit("sbatch", "--parsable", self.log_option, *options, **environment)

    @property
    def log_option(self) -> str:
        """What a job has to be submitted with for its log to be found."""
        return f"--output={self.folder}/job-%j.log"

    def stop(self) -> None:
        """End all jobs, the daemons and whatever is left of either."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=3)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        wait_until(self._has_ended)

    def _has_ended(self) -> bool:
        """Whether nothing is left; what is left, is killed. Some start others while they are looked for."""
        left = processes_with(f"SLURM_CONF={self.folder}/slurm.conf")
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return not left

    def _start(self) -> None:
        key, munge_socket = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key, "socket": munge_socket}
        files |= {f"{name}-file": self.folder / f"munged.{name}" for name in ("pid", "log", "seed")}
        # --force: only root uses the socket, so the folder need not be open to everybody
        self._run("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items()))
        wait_until(munge_socket.exists)
        self._run("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._run("slurmd", "-D", "-N", node)
        wait_until(lambda: self._query("--format=%t") == ["idle", "idle"])

    def _run(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.said").open("ab") as log:
            daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self._daemons.append(daemon)

    def _query(self, format_option: str) -> list[str]:
        command = ["sinfo", "--noheader", "--Node", "--partition=low", format_option]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.split()


def processes_with(variable: str) -> list[int]:
    """The processes that have this in their environment, but for this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if variable.encode() in variables and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def wait_until(is_there: Callable[[], bool]) -> None:
    """For half a minute."""
    deadline = time.monotonic() + 30
    while not is_there():
        assert time.monotonic() < deadline, "SLURM does not start, or does not end"
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
