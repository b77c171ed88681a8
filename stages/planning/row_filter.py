"""The filter of a plan: which rows of the metadata are taken, by any column that it has."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from shards.filter import Filter, Kind
from stages.errors import ConfigError
from stages.planning.metadata import Row
from stages.planning.video_files import encodable

PROBED = ("duration_s", "height", "width", "fps")
"""What a file tells where its metadata does not."""

_OWN = ["caption", "source", "kind", "height", "width", "fps"]
_OWN += ["aesthetic", "umt", "matching_score", "desirable_filtering"]


class RowFilter:
    """A condition on rows. Raises ConfigError for a text that is none."""

    def __init__(self, text: str):
        try:
            self._filter = Filter.parse(text) if text.strip() else None
        except ValueError as error:
            raise ConfigError(f"filter: {error}") from None
        self.columns = self._filter.columns if self._filter else {}

    def check(self, rows: Sequence[Row]) -> None:
        """Raises ConfigError if no row has a value, of the kind it is compared with, in one of the columns."""
        for name, kind in self.columns.items():
            if name in PROBED or any(value is not None for value in _values(rows, name, kind)):
                continue
            there = _names(rows)
            nearest = difflib.get_close_matches(name, there, 1)
            hint = f"did you mean {nearest[0]}? " if nearest and nearest != [name] else ""
            found = "no value" if kind == "any" else f"no {'boolean' if kind == 'truth' else kind}"
            raise ConfigError(
                f"filter: {found} in column {name} of the first {len(rows)} clips; {hint}there are: {', '.join(there)}"
            )

    def may_hold(self, rows: Sequence[Row]) -> np.ndarray:
        """For each row whether it can hold once what is unknown of PROBED is known, bool [N]."""
        columns = self._columns(rows)
        known = {name: column for name, column in columns.items() if not (name in PROBED and column.null_count)}
        if len(known) == len(columns):
            return self.holds(rows)
        assert self._filter is not None, "there are no columns without a filter"
        table = pa.table(known) if known else pa.table({"": pa.nulls(len(rows))})
        return self._filter.may_hold(table).to_numpy(zero_copy_only=False)

    def holds(self, rows: Sequence[Row]) -> np.ndarray:
        """For each row whether it holds, bool [N]."""
        if self._filter is None:
            return np.ones(len(rows), bool)
        return self._filter.mask(pa.table(self._columns(rows))).to_numpy(zero_copy_only=False)

    def _columns(self, rows: Sequence[Row]) -> dict[str, pa.Array]:
        return {name: _column(rows, name, kind) for name, kind in self.columns.items()}


def _column(rows: Sequence[Row], name: str, kind: Kind) -> pa.Array:
    types = {"number": pa.float64(), "text": pa.string(), "truth": pa.bool_(), "any": pa.bool_()}
    return pa.array(_values(rows, name, kind), types[kind])


def _values(rows: Sequence[Row], name: str, kind: Kind) -> list[Any]:
    """The column of a name, None where it is missing or of another kind."""
    if name == "duration_s":
        raw: list[Any] = [None if row.duration_ms is None else row.duration_ms / 1000 for row in rows]
    elif name in _OWN:
        raw = [getattr(row, name) for row in rows]
    else:
        raw = [row.fields.get(name) for row in rows]
    if kind == "number":
        return [_number(value) for value in raw]
    if kind == "text":
        return [value if isinstance(value, str) and encodable(value) else None for value in raw]
    if kind == "truth":
        return [value if isinstance(value, bool) else None for value in raw]
    return [None if value is None else True for value in raw]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _names(rows: Sequence[Row]) -> list[str]:
    """The columns in which some row has a value."""
    own = [name for name in _OWN if any(getattr(row, name) is not None for row in rows)]
    others = {str(key): None for row in rows for key, value in row.fields.items() if value is not None}
    return list(dict.fromkeys([*own, *PROBED, *others]))
