"""Metadata rows -> which clip goes to which bucket, shard and row: a pure function of rows and settings.

A row that the plan has is not planned again, so that a second run adds nothing and a longer metadata file
never renumbers. A retry plans a rejected clip once more, in a new shard. ``plan_table`` is what is stored.
"""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shards.schema import Bucket, make_key
from stages.errors import ConfigError
from stages.metadata import Row
from stages.plan_table import (
    DUPLICATE,
    PLAN_SCHEMA,
    PLANNED,
    REJECTED,
    Outcomes,
    PlannedClip,
    ShardPlan,
    Totals,
    append_plan,
    counts,
    last_attempts,
    load_plan,
    outcome,
    shard_plans,
)

__all__ = [
    "ClipConfig",
    "Outcomes",
    "PlanConfig",
    "PlannedClip",
    "ShardPlan",
    "Totals",
    "append_plan",
    "counts",
    "load_plan",
    "plan",
    "shard_plans",
]

MISSING_FILE, TOO_SHORT = "missing_file", "too_short"

BATCH_ROWS = 65536
_SETTINGS = b"clip"  # where the table keeps what it was planned with


@dataclass(frozen=True)
class ClipConfig:
    """What a clip is cut to: the longest of ``frames`` that it fills at ``fps``, never padded or slowed.

    height, width: pixels. frames: one length or several. fps: frames a second taken, whatever the source has.
    """

    height: int = 256
    width: int = 256
    frames: int | tuple[int, ...] = 56
    fps: float = 8.0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.height, self.width, *self.lengths) < 1:
            raise ValueError("height, width and frames must be at least 1")
        if not 0 < self.fps <= 1000:  # times are whole milliseconds
            raise ValueError(f"fps is {self.fps:g}, expected more than 0 and at most 1000")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of frames, longest first."""
        frames = (self.frames,) if isinstance(self.frames, int) else self.frames
        return tuple(sorted(set(frames), reverse=True))

    def span_ms(self, frames: int) -> int:
        """How long a clip must be to fill so many frames, in whole milliseconds."""
        return math.ceil(frames * 1000 / Fraction(str(self.fps)))


@dataclass(frozen=True)
class PlanConfig:
    """clip: what clips are cut to. shard_clips: how many are planned for a shard, the unit of work."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    shard_clips: int = 256

    def __post_init__(self) -> None:
        if self.shard_clips < 1:
            raise ValueError(f"shard_clips is {self.shard_clips}, expected at least 1")


def plan(
    rows: Iterable[Row],
    config: PlanConfig,
    dataset_name: str,
    previous: pa.Table | None = None,
    *,
    retry: Collection[str] = (),
    outcomes: Outcomes | None = None,
) -> pa.Table:
    """What ``rows`` add to the ``previous`` plan, as a table of PLAN_SCHEMA: all of them when there is none.

    Clips that the plan or a commit (``outcomes``) rejected for a reason in ``retry`` are planned once more.
    Raises ConfigError if the previous plan was made with other clip settings.
    """
    planner = _Planner(config, dataset_name)
    if previous is not None and previous.num_rows:
        _check_settings(previous, config.clip)
        planner.continue_from(previous, set(retry), outcomes or {})
    for row in rows:
        planner.add(row)
    return planner.finish()


@dataclass(frozen=True)
class _Window:
    """The part of a clip that is taken, in milliseconds after the clip's start."""

    bucket: Bucket
    start_ms: int


class _Planner:
    """Takes rows in the order of the metadata; fills one open shard a bucket."""

    def __init__(self, config: PlanConfig, dataset_name: str):
        self._config = config
        self._dataset_name = dataset_name
        self._spans_ms = [(frames, config.clip.span_ms(frames)) for frames in config.clip.lengths]
        self._planned_before: dict[int, int] = {}  # clip -> rows of it that the plan has
        self._seen: defaultdict[int, int] = defaultdict(int)  # clip -> rows of it so far
        self._retry: dict[int, tuple[int, str]] = {}  # clip -> its next attempt, why the last one failed
        self._next_shard: defaultdict[Bucket, int] = defaultdict(int)
        self._open: defaultdict[Bucket, list[dict[str, Any]]] = defaultdict(list)
        self._done: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []

    def continue_from(self, previous: pa.Table, retry: set[str], outcomes: Outcomes) -> None:
        grouped = previous.group_by("clip").aggregate([("occurrence", "max")])
        clips, last = grouped["clip"].to_pylist(), grouped["occurrence_max"].to_pylist()
        self._planned_before = {clip: occurrence + 1 for clip, occurrence in zip(clips, last, strict=True)}
        shards = previous.filter(pc.is_valid(previous["shard"])).group_by("bucket").aggregate([("shard", "max")])
        for row in shards.to_pylist():
            self._next_shard[Bucket.parse(row["bucket"])] = row["shard_max"] + 1
        for row in last_attempts(previous) if retry else ():
            _, reason = outcome(row, outcomes)
            if reason in retry:
                self._retry[row["clip"]] = row["attempt"] + 1, reason

    def add(self, row: Row) -> None:
        clip = xxhash.xxh3_64_intdigest(json.dumps([self._dataset_name, row.identity]).encode())
        occurrence = self._seen[clip]
        self._seen[clip] += 1
        attempt, last_reason = 0, ""
        if occurrence < self._planned_before.get(clip, 0):
            if occurrence or clip not in self._retry:
                return
            attempt, last_reason = self._retry[clip]
        entry = {
            "clip": clip,
            "occurrence": occurrence,
            "attempt": attempt,
            "source": row.source,
            "kind": row.kind,
            "path": row.path,
            "duration_s": row.duration_ms / 1000,
            "caption": row.caption,
            "aesthetic": row.aesthetic,
            "umt": row.umt,
            "matching_score": row.matching_score,
            "desirable_filtering": row.desirable_filtering,
        }
        if occurrence and not row.reason:
            self._write(entry | {"status": DUPLICATE})
            return
        window = self._window(row, clip)
        if isinstance(window, _Window):
            self._place(entry, row, window)
        elif window[0] != last_reason:
            self._write(entry | {"status": REJECTED, "reason": window[0], "message": window[1]})

    def finish(self) -> pa.Table:
        """Closes the shards that are not full and returns everything."""
        for bucket in sorted(self._open):
            self._close(bucket)
        self._flush()
        settings = json.dumps(_settings(self._config.clip)).encode()
        return pa.Table.from_batches(self._batches, PLAN_SCHEMA).replace_schema_metadata({_SETTINGS: settings})

    def _window(self, row: Row, clip: int) -> _Window | tuple[str, str]:
        """What to take of a clip, or the reason and the message of its rejection."""
        if row.reason:
            return row.reason, row.message or ""
        if row.kind == "image":
            fitting = [(1, 0)]
        else:  # whatever lasts at all has one frame
            fitting = [(n, span) for n, span in self._spans_ms if row.duration_ms >= (span if n > 1 else 1)]
        if not fitting:
            shortest, span_ms = self._spans_ms[-1]
            return TOO_SHORT, f"it lasts {row.duration_ms} ms; {shortest} frames need {span_ms} ms"
        if row.path is None:
            return MISSING_FILE, f"no file of {row.source} was found below the videos folder"
        frames, span_ms = fitting[0]
        bucket = Bucket(self._config.clip.height, self._config.clip.width, frames)
        seed = xxhash.xxh3_64_intdigest(f"{clip} {bucket}".encode())
        return _Window(bucket, seed % (max(0, row.duration_ms - span_ms) + 1))

    def _place(self, entry: dict[str, Any], row: Row, window: _Window) -> None:
        bucket = window.bucket
        key = make_key(row.source, self._dataset_name, row.identity, window.start_ms, bucket.name)
        self._open[bucket].append(
            entry
            | {
                "status": PLANNED,
                "key": key,
                "bucket": bucket.name,
                "window": 0,
                "start_s": (row.start_ms + window.start_ms) / 1000,
                "clip_start_s": row.start_ms / 1000,
                "fps": self._config.clip.fps,
            }
        )
        if len(self._open[bucket]) == self._config.shard_clips:
            self._close(bucket)

    def _close(self, bucket: Bucket) -> None:
        clips = sorted(self._open.pop(bucket), key=lambda entry: entry["key"])
        number = self._next_shard[bucket]
        self._next_shard[bucket] += 1
        for index, entry in enumerate(clips):
            self._write(entry | {"shard": number, "row": index})

    def _write(self, entry: dict[str, Any]) -> None:
        self._done.append(entry)
        if len(self._done) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        """Turns rows into Arrow's compact form."""
        columns = [pa.array([entry.get(f.name) for entry in self._done], f.type) for f in PLAN_SCHEMA]
        self._batches.append(pa.record_batch(columns, schema=PLAN_SCHEMA))
        self._done.clear()


def _settings(clip: ClipConfig) -> dict[str, Any]:
    return {"height": clip.height, "width": clip.width, "frames": list(clip.lengths), "fps": clip.fps}


def _check_settings(previous: pa.Table, clip: ClipConfig) -> None:
    found, wanted = json.loads(previous.schema.metadata[_SETTINGS]), _settings(clip)
    differing = [f"clip.{name} was {found[name]}, now {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    if differing:
        raise ConfigError(f"the dataset was planned with other settings: {'; '.join(differing)}; use another output")
