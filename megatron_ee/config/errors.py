"""The one exception that a wrong config raises."""

from collections.abc import Iterable

from megatron_ee.errors import UserError


class ConfigError(UserError):
    """Everything that is wrong with a config, one line per problem, each with its place in a file or an override."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))
