"""The kinds of error that entry points show as a message instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something that a user can put right: a config, a file, a request. The message names it; the exit status is 2."""


class FieldError(UserError):
    """One field of the config that doesn't fit what was found: the processes, the machine, a file.

    `megatron_ee.config.open_config` says where the field was written.

    Attributes:
        field: its path, as in model.num_layers; or the command-line flag that stands for it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field, self.message = field, message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def nearest_name(name: str, names: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """The name that was probably meant, if any is near."""
    return next(iter(get_close_matches(name, list(names), n=1, cutoff=likeness)), None)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message that says which names are right."""
    nearest = nearest_name(name, names, likeness=0.7)  # these are often short: a gpu is no cpu
    return f"; did you mean {nearest!r}?" if nearest else ""


class StageLostError(UserError):
    """Another process that holds a part of the model has died, or hangs. This one is of no use any more; it should end
    by `os._exit`, since a process that ends as usual waits for messages that will never come.
    """
