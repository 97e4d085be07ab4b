"""Event files for TensorBoard, under RUN/tensorboard."""

import importlib.util
from pathlib import Path

from megatron_ee.errors import FieldError
from megatron_ee.training.loggers.interface import Figures


def require_tensorboard() -> None:
    """
    Raises:
        FieldError: the package that writes event files is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise FieldError("logging.tensorboard", "needs the tensorboard package: pip install 'megatron-ee[tensorboard]'")


class TensorBoard:
    """One scalar per figure.

    Args:
        start: iterations that the run has done. Readers leave out what earlier files hold beyond it.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def log(self, iteration: int, figures: Figures) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
