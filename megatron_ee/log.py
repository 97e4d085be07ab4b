"""Plain log lines from one rank; other ranks speak only when something is wrong."""

import logging
import sys
import warnings


def start_logging(*, is_main_rank: bool) -> logging.Logger:
    """The project's logger: INFO and up from the main rank, WARNING and up from the others, to stderr."""
    logger = logging.getLogger("megatron_ee")
    logger.setLevel(logging.INFO if is_main_rank else logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    return logger


def quiet_dependencies() -> None:
    """Silence what megatron-core says on every import and every start about software that is optional."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
