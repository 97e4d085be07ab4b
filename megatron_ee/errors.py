"""The one kind of error that entry points show as a message instead of a traceback."""


class UserError(ValueError):
    """Something that a user can put right: a config, a file, a request. The message names it; the exit status is 2."""
