"""The one exception for what a user got wrong."""

from importlib.util import find_spec


class UsageError(ValueError):
    """Raise for bad input: say what is wrong, the value, and what is accepted. The CLI prints it and exits with 2."""


def require(module: str, extra: str) -> None:
    """Raise UsageError where a module is not installed; `extra` is the extra of this package that has it."""
    if find_spec(module) is None:
        raise UsageError(f"this needs {module}, which is not installed: pip install 'statetrack[{extra}]'")
