"""What can go wrong in a stage.

ConfigError   the user's mistake in a setting, an input or an output folder: one line, exit status 2
WorkError     the work failed for a reason that is known: one line, exit status 1
DecodeError   one clip cannot be used; the job counts it by reason and goes on
"""


class ConfigError(Exception):
    """A setting or an input is wrong; the message says what was found, what was expected, what to do."""


class WorkError(Exception):
    """The work cannot go on; the message says why and what to do."""


class DecodeError(Exception):
    """A clip cannot be used. ``reason`` is a short name that the job counts by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # pickled between processes with both arguments
        return DecodeError, (self.reason, str(self))


def at_least(section: object, least: float, *names: str) -> None:
    """For a config's ``__post_init__``: raises ValueError for a number of ``section`` below ``least``."""
    for name in names:
        value = getattr(section, name)
        if isinstance(value, int | float) and not value >= least:  # a NaN is not
            raise ValueError(f"{name}: found {value}, expected at least {least:g}")
