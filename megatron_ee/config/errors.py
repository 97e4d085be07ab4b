"""The one exception that a wrong config raises, and the places that its lines begin with."""

from collections.abc import Iterable
from typing import NamedTuple

from megatron_ee.errors import UserError


class Place(NamedTuple):
    """Where something is written: in a file, at a line and a column counted from 1; or, without these, an override."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class Problem(NamedTuple):
    """One line of a ConfigError."""

    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class ConfigError(UserError):
    """Everything that is wrong with a config, one line per problem, each with its place in a file or an override."""

    def __init__(self, problems: Iterable[object]) -> None:
        self.problems = [str(problem) for problem in problems]
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)
