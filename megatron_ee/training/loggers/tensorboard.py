"""Event files for TensorBoard, under RUN/tensorboard."""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
    """One scalar per figure. A run doesn't end for its sake: where it cannot be written, it is given up with an error.

    Args:
        start: iterations that the run has done. Readers leave out what earlier files hold beyond it.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)
        self._has_failed = False

    def log(self, iteration: int, figures: Figures) -> None:
        with self._giving_up():
            if not self._has_failed:
                for name, value in figures.items():
                    self._writer.add_scalar(name, value, iteration)
                self._writer.flush()

    def close(self) -> None:
        with self._giving_up():
            if not self._has_failed:
                self._writer.close()

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._has_failed = True  # its thread has ended, and would take nothing any more
            logging.getLogger("megatron_ee").error("tensorboard: going on without: %s", error)
