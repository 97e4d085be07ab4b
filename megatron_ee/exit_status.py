"""How a rank's exit status comes to whoever started torchrun, which ends with 1 whatever its ranks had to say."""

import os
from pathlib import Path


def is_first_of_node() -> bool:
    """Whether this is the process that speaks for its node; one without a launcher is."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def leave_status(status: int) -> None:
    """In the file that the variable EXIT_STATUS_FILE names, if it does and this process speaks for its node; the
    scripts that start torchrun go by that."""
    if is_first_of_node() and (path := os.environ.get("EXIT_STATUS_FILE")):
        Path(path).write_text(f"{status}\n")
