"""What became of the rows of a plan, by what the plan and the commits of its shards say."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.schema import WRITTEN
from stages.planning.plan_table import DUPLICATE, FILTERED, PLANNED, REJECTED, Plan, planned_shards

PENDING = "pending"  # what became of a planned clip: that, WRITTEN, or the reason of its reject

Outcomes = Mapping[tuple[str, int], Mapping[str, str]]
"""What commits say: (bucket name, shard number) of every committed shard -> key of a reject -> its reason."""


@dataclass(frozen=True)
class Totals:
    """What became of everything: clips = written + filtered + duplicates + pending + the sum of rejected.

    rows: lines of the metadata, of which some have several clips. Every window of a clip counts as a clip.
    """

    rows: int
    clips: int
    written: int
    filtered: int
    duplicates: int
    pending: int  # planned for shards that are not committed yet
    rejected: dict[str, int]


def counts(plan: Plan, outcomes: Outcomes) -> Totals:
    """Adds up the last attempt of every clip of a plan."""
    last = LastAttempts(plan)
    rows, tally, rejected = 0, Counter[str](), Counter[str]()
    for part in plan.parts([*IDENTITY, "first_of_line", *RESULT]):
        began = pc.and_(part["first_of_line"], pc.equal(pc.fill_null(part["window"], 0), 0))
        rows += pc.sum(pc.and_(began, pc.equal(part["attempt"], 0))).as_py() or 0
        final = results(part, outcomes).filter(last.are(part))
        tally.update(_counted(final["status"]))
        rejected.update(_counted(final["reason"].drop_null()))
    return Totals(
        rows=rows,
        clips=tally.total(),
        written=tally[WRITTEN],
        filtered=tally[FILTERED],
        duplicates=tally[DUPLICATE],
        pending=tally[PENDING],
        rejected=dict(sorted(rejected.items())),
    )


RESULT = ("status", "reason", "key", "bucket", "shard")
"""The columns that ``results`` needs."""


def results(part: pa.Table, outcomes: Outcomes) -> pa.Table:
    """What became of each row of a part: ``status``, where written and pending replace planned, and ``reason``."""
    status, reason = part["status"].to_numpy().copy(), part["reason"].to_numpy().copy()
    places = np.flatnonzero(status == PLANNED)
    start = 0
    for bucket, number, rows in planned_shards(part.take(places)):
        here = places[start : start + rows.num_rows]
        start += rows.num_rows
        rejects = outcomes.get((bucket, number))
        status[here] = PENDING if rejects is None else WRITTEN
        if rejects:
            for place, key in zip(here, rows["key"].to_pylist(), strict=True):
                if key in rejects:
                    status[place], reason[place] = REJECTED, rejects[key]
    return pa.table({"status": pa.array(status, pa.string()), "reason": pa.array(reason, pa.string())})


IDENTITY = ("clip", "occurrence", "window", "attempt")
"""The columns that ``LastAttempts`` needs."""


class LastAttempts:
    """Which rows of a plan count: of a clip's window that was tried again, only the last attempt."""

    def __init__(self, plan: Plan):
        tried = [_tried_again(part) for part in plan.parts(IDENTITY)]
        ids = np.concatenate([np.zeros(0, np.uint64), *(ids for ids, _ in tried)])
        attempts = np.concatenate([np.zeros(0, np.int32), *(attempts for _, attempts in tried)])
        order = np.lexsort([-attempts, ids])
        self._ids, first = np.unique(ids[order], return_index=True)
        self._attempts = attempts[order][first]

    def are(self, part: pa.Table) -> pa.BooleanArray:
        """For each row whether it is the last attempt at what it stands for."""
        if not len(self._ids):
            return pa.array(np.ones(part.num_rows, bool))
        ids = row_ids(part)
        place = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        later = (self._ids[place] == ids) & (self._attempts[place] > part["attempt"].to_numpy())
        return pa.array(~later)


def row_ids(part: pa.Table) -> np.ndarray:
    """What each row stands for, clip, occurrence and window, as one hash, uint64 [N]."""
    occurrence = part["occurrence"].to_numpy().astype(np.uint64)
    window = pc.fill_null(part["window"], 0).to_numpy().astype(np.uint64)
    return occurrence_ids(part["clip"].to_numpy(), occurrence) + window * np.uint64(0xD1B54A32D192ED03)


def occurrence_ids(clips: np.ndarray, occurrences: np.ndarray) -> np.ndarray:
    """The n-th occurrence of a clip as one hash, uint64 [N]; that of the first is the clip's own."""
    return clips + occurrences.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _tried_again(part: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    again = part.filter(pc.greater(part["attempt"], 0))
    return row_ids(again), again["attempt"].to_numpy()


def _counted(values: Any) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(values).to_pylist()}
