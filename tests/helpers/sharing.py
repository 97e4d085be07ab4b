"""Which tests run beside which, where pytest-xdist runs several at once."""

from xdist.scheduler.loadfile import LoadFileScheduling

SLURM = "tests/slurm/"


class OneSlurm(LoadFileScheduling):
    """The tests of a file run one after the other, in the same process, as do all those of SLURM."""

    def _split_scope(self, nodeid: str) -> str:
        return SLURM if nodeid.startswith(SLURM) else super()._split_scope(nodeid)
