"""What the fields of a line say, as values; BadRow where they say nothing that can be used."""

import math
import re
from collections.abc import Mapping
from typing import Any

from stages.planning.video_files import clock_ms, encodable

BAD_METADATA = "bad_metadata"
BAD_TIMESTAMPS = "bad_timestamps"

_TIMESTAMP = re.compile(r"([0-9]{1,3}):([0-5]?[0-9]):([0-5]?[0-9])(?:[.,]([0-9]{1,9}))?")


class BadRow(ValueError):
    """What is wrong with a line: a reason and a message."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def field(fields: Mapping[str, Any], key: str) -> Any:
    if key not in fields:
        raise BadRow(BAD_METADATA, f"no {brief(key)}; it has {', '.join(map(brief, list(fields)[:8])) or 'nothing'}")
    return fields[key]


def caption_text(value: Any) -> str:
    """A caption as it is stored; nothing for null. Raises BadRow for what is no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(BAD_METADATA, f"Caption is {brief(value)}, expected a text")
    return (value if encodable(value) else value.encode(errors="replace").decode()).strip()


def milliseconds(value: Any, name: str) -> int:
    """Of a time of day, ``HH:MM:SS.mmm`` or ``H:MM:SS``. Raises BadRow."""
    match = _TIMESTAMP.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise BadRow(BAD_TIMESTAMPS, f"{name} is {brief(value)}, expected HH:MM:SS.mmm")
    return clock_ms(*match.groups())


def check_span(start_ms: int, end_ms: int) -> None:
    if end_ms <= start_ms:
        raise BadRow(BAD_TIMESTAMPS, f"it ends at {end_ms} ms and starts at {start_ms} ms")


def score(value: Any, name: str) -> float | None:
    """A number; None for null and NaN, which stand for no score. Raises BadRow."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRow(BAD_METADATA, f"{name} is {brief(value)}, expected a number") from None
    if math.isinf(number):
        raise BadRow(BAD_METADATA, f"{name} is infinite")
    return None if math.isnan(number) else number


def positive(value: Any) -> Any:
    """A size or a rate that the metadata tells; None for what is no such number."""
    return value if isinstance(value, int | float) and 0 < value < 1e6 else None


def brief(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
