"""The one exception for what a user got wrong."""


class UsageError(ValueError):
    """Raise for bad input: say what is wrong, the value, and what is accepted. The CLI prints it and exits with 2."""
