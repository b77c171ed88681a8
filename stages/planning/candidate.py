"""A row of the metadata on its way into the plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.planning.metadata import Row

NEW: Mapping[int | None, tuple[int, str]] = {None: (0, "")}
"""The tries of a row that was never planned."""

NOT_PLANNED = (None,) * 7
"""What follows ``Candidate.entry`` in a row of the plan that is not for a shard."""


@dataclass(slots=True)
class Candidate:
    """A row to plan. clip: its hash. tries: window (None: all) -> its attempt, and why the last one failed."""

    row: Row
    clip: int
    occurrence: int
    tries: Mapping[int | None, tuple[int, str]]

    def entry(
        self, window: int | None, attempt: int, status: str, reason: str | None = None, message: str | None = None
    ) -> tuple[Any, ...]:
        """The first values of a row of the plan; the others, from the key on, are of planned clips alone."""
        row = self.row
        return (
            self.clip,
            self.occurrence,
            window,
            attempt,
            row.first_of_line,
            status,
            reason,
            message,
            row.source,
            row.kind,
            row.path,
            None if row.duration_ms is None else row.duration_ms / 1000,
            row.caption,
            row.aesthetic,
            row.umt,
            row.matching_score,
            row.desirable_filtering,
        )
