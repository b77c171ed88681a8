"""Metadata rows -> which clip goes to which bucket, shard and row: a pure function of rows and settings.

A row that the plan has is not planned again, so that a second run adds nothing and a longer metadata file
never renumbers. A retry plans a rejected clip once more, in a new shard. Rows come in batches and parts go out,
so that memory is bounded by a few hashes a row. A part holds whole shards: what is still in an open shard when a
run is killed is planned again, the same way, by the next.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shards.schema import Bucket, make_key
from stages.errors import ConfigError, DecodeError
from stages.planning.candidate import NEW, NOT_PLANNED, Candidate
from stages.planning.clips import TOO_SHORT, ClipConfig, Cutter, Reject, Window, bucket_sizes
from stages.planning.history import History
from stages.planning.metadata import Row
from stages.planning.outcomes import Outcomes, Totals, counts
from stages.planning.plan_table import (
    DUPLICATE,
    FILTERED,
    PLANNED,
    REJECTED,
    Plan,
    PlannedClip,
    PlanRow,
    ShardPlan,
    plan_table,
    shard_plans,
    with_settings,
)
from stages.planning.probe import Probe, probe_here
from stages.planning.row_filter import PROBED, RowFilter

__all__ = [
    "ClipConfig",
    "Outcomes",
    "Plan",
    "PlanConfig",
    "PlannedClip",
    "Probe",
    "ShardPlan",
    "Totals",
    "bucket_sizes",
    "counts",
    "plan",
    "probe_here",
    "shard_plans",
]

BATCH_ROWS = 16_384
PART_ROWS = 500_000


@dataclass(frozen=True)
class PlanConfig:
    """clip: what clips are cut to. shard_clips: how many are planned for a shard, the unit of work.

    filter: a condition on the metadata's columns, such as ``aesthetic >= 4.75 and duration_s >= 2``; the rows for
    which it does not hold are counted and left out. See shards.filter.
    """

    clip: ClipConfig = field(default_factory=ClipConfig)
    shard_clips: int = 256
    filter: str = ""

    def __post_init__(self) -> None:
        if self.shard_clips < 1:
            raise ValueError(f"shard_clips is {self.shard_clips}, expected at least 1")


def plan(
    rows: Iterable[Row],
    config: PlanConfig,
    dataset_name: str,
    previous: Plan,
    *,
    retry: Collection[str] = (),
    outcomes: Outcomes | None = None,
    probe: Probe,
) -> Iterator[pa.Table]:
    """What ``rows`` add to the ``previous`` plan: new parts of PLAN_SCHEMA, each to be appended as it comes.

    Clips that the plan or a commit (``outcomes``) rejected for a reason in ``retry`` are planned once more.
    ``probe`` is asked about files where the settings need a length or a size that the metadata does not have.
    Raises ConfigError, at once, if the previous plan was made with other settings or the filter is no condition;
    later, if the filter names a column that there is not.
    """
    _check_settings(previous, config)
    history = History(previous, retry, outcomes or {})
    return _Planner(config, dataset_name, history, probe).parts(rows)


class _Planner:
    """Takes rows in the order of the metadata; fills one open shard a bucket."""

    def __init__(self, config: PlanConfig, dataset_name: str, history: History, probe: Probe):
        self._config = config
        self._dataset_name = dataset_name
        self._history = history
        self._probe = probe
        self._filter = RowFilter(config.filter)
        self._cutter = Cutter(config.clip)
        self._needs_size = self._cutter.needs_size or bool({"height", "width"} & self._filter.columns.keys())
        self._checked = self._probed_some = False
        self._next_shard = defaultdict(int, history.next_shard)
        self._open: defaultdict[Bucket, list[PlanRow]] = defaultdict(list)
        self._done: list[tuple[Any, ...]] = []
        self._tables: list[pa.Table] = []

    def parts(self, rows: Iterable[Row]) -> Iterator[pa.Table]:
        rows = iter(rows)
        while batch := list(islice(rows, BATCH_ROWS)):
            self._add(batch)
            self._flush()
            if self._probed_some or sum(table.num_rows for table in self._tables) + BATCH_ROWS > PART_ROWS:
                yield from self._part()  # what took long is stored at once
                self._probed_some = False
        for bucket in sorted(self._open):
            self._close(bucket)
        self._flush()
        yield from self._part()

    def _flush(self) -> None:
        self._tables.append(plan_table(self._done))
        self._done.clear()

    def _part(self) -> Iterator[pa.Table]:
        table = pa.concat_tables(self._tables)
        self._tables.clear()
        if table.num_rows:
            yield with_settings(table, _settings(self._config))

    def _add(self, rows: Sequence[Row]) -> None:
        clips = []
        for candidate in self._new(rows):
            if candidate.row.reason:
                self._reject(candidate, candidate.row.reason, candidate.row.message or "")
            elif candidate.occurrence:
                self._drop(candidate, DUPLICATE)
            else:
                clips.append(candidate)
        clips = self._kept(clips, self._filter.may_hold([candidate.row for candidate in clips]))
        clips = self._probed([candidate for candidate in clips if self._there(candidate)])
        if self._filter.columns.keys() & set(PROBED):
            clips = self._kept(clips, self._filter.holds([candidate.row for candidate in clips]))
        for candidate in clips:
            self._place(candidate)

    def _new(self, rows: Sequence[Row]) -> Iterator[Candidate]:
        """The rows that the plan does not have yet, or is to try again."""
        if not self._checked and (usable := [row for row in rows if not row.reason]):
            self._filter.check(usable)
            self._checked = True
        clips = np.fromiter((self._hash(row.identity) for row in rows), np.uint64, len(rows))
        occurrences, places = self._history.meet(clips)
        wanted = np.flatnonzero(places != self._history.DONE)
        columns = (wanted, clips[wanted], occurrences[wanted], places[wanted])
        for index, clip, occurrence, place in zip(*(column.tolist() for column in columns), strict=True):
            tries = NEW if place == self._history.NEW else self._history.tries(place)
            yield Candidate(rows[index], clip, occurrence, tries)

    def _hash(self, identity: str) -> int:
        return xxhash.xxh3_64_intdigest(f"{self._dataset_name}\0{identity}".encode())

    def _kept(self, candidates: list[Candidate], mask: np.ndarray) -> list[Candidate]:
        for index in np.flatnonzero(~mask):
            self._drop(candidates[index], FILTERED)
        return candidates if mask.all() else [candidates[index] for index in np.flatnonzero(mask)]

    def _there(self, candidate: Candidate) -> bool:
        """Whether a clip can be taken, as far as is known; else it is rejected."""
        problem = self._cutter.check(candidate.row)
        if problem:
            self._reject(candidate, *problem)
        return problem is None

    def _probed(self, candidates: list[Candidate]) -> list[Candidate]:
        """The clips with what is needed of their files; those whose file is no good are rejected."""
        unknown = {candidate.row.path: candidate.row for candidate in candidates if self._is_unknown(candidate.row)}
        if not unknown:
            return candidates
        self._probed_some = True
        infos = dict(zip(unknown, self._probe(iter(unknown.values())), strict=True))
        good = []
        for candidate in candidates:
            row, info = candidate.row, infos.get(candidate.row.path)
            if isinstance(info, DecodeError):
                self._reject(candidate, info.reason, f"{row.source}: {info}")
                continue
            if info is not None:
                duration_ms = round(info.duration_s * 1000) if row.duration_ms is None else row.duration_ms
                candidate.row = row._replace(
                    height=info.height, width=info.width, fps=info.fps, duration_ms=duration_ms
                )
            good.append(candidate)
        return good

    def _is_unknown(self, row: Row) -> bool:
        size = self._needs_size and (row.height is None or row.width is None)
        return row.duration_ms is None or size or (row.fps is None and "fps" in self._filter.columns)

    def _place(self, candidate: Candidate) -> None:
        """Puts the windows of a clip in the open shard of their bucket; all of them in one."""
        cut = self._cutter.cut(candidate.row, candidate.clip)
        if isinstance(cut, Reject):
            self._reject(candidate, *cut)
            return
        bucket, windows = cut
        entries = list(self._entries(candidate, bucket.name, windows))
        if len(self._open[bucket]) + len(entries) > self._config.shard_clips:
            self._close(bucket)
        self._open[bucket] += entries
        if len(self._open[bucket]) >= self._config.shard_clips:
            self._close(bucket)

    def _entries(self, candidate: Candidate, bucket: str, windows: Sequence[Window]) -> Iterator[PlanRow]:
        row, tries = candidate.row, candidate.tries
        for number, window in enumerate(windows):
            tried = tries.get(number) or tries.get(None)
            if tried:
                key = make_key(row.source, self._dataset_name, row.identity, window.start_ms, bucket)
                place = (key, bucket, window.start_s, window.fallback_s, self._config.clip.fps)
                yield PlanRow._make(candidate.entry(number, tried[0], PLANNED) + place)
        for gone in [number for number in tries if number is not None and number >= len(windows)]:
            message = f"its window {gone} is not there any more: it lasts {row.duration_ms} ms"
            self._write(candidate.entry(gone, tries[gone][0], REJECTED, TOO_SHORT, message))

    def _close(self, bucket: Bucket) -> None:
        if not self._open[bucket]:
            return
        number = self._next_shard[bucket]
        self._next_shard[bucket] += 1
        clips = sorted(self._open.pop(bucket), key=attrgetter("key"))
        self._done += [(*entry, number, index) for index, entry in enumerate(clips)]

    def _reject(self, candidate: Candidate, reason: str, message: str) -> None:
        for window, (attempt, last_reason) in candidate.tries.items():
            if reason != last_reason:
                self._write(candidate.entry(window, attempt, REJECTED, reason, message))

    def _drop(self, candidate: Candidate, status: str) -> None:
        for window, (attempt, _) in candidate.tries.items():
            self._write(candidate.entry(window, attempt, status))

    def _write(self, entry: tuple[Any, ...]) -> None:
        self._done.append(entry + NOT_PLANNED)


def _settings(config: PlanConfig) -> dict[str, Any]:
    """All that decides what a row becomes, as it is stored."""
    clip = config.clip
    return {
        "clip.sizes": " ".join(f"{height}x{width}" for height, width in bucket_sizes(clip)),
        "clip.max_upscale": clip.upscale_limit,
        "clip.frames": list(clip.lengths),
        "clip.fps": clip.fps,
        "clip.windows": clip.windows,
        "clip.trim_s": clip.trim_s,
        "filter": config.filter.strip(),
    }


def _check_settings(previous: Plan, config: PlanConfig) -> None:
    found, wanted = previous.settings(), _settings(config)
    if found is None:
        return
    differing = [f"{name} was {found[name]}, now {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    if differing:
        raise ConfigError(f"the dataset was planned with other settings: {'; '.join(differing)}; use another output")
