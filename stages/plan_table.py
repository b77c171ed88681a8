"""The plan as it is stored: a table with every row of the metadata, in parts that are never changed.

DATASET/plan/000000.parquet   the first run
DATASET/plan/000001.parquet   what a longer metadata file, or a retry, added

A row is known by its clip (a hash of dataset, source and span), its occurrence (0 for the first row of that
clip, 1 for the next) and its attempt (0, then one more for each retry). The last attempt is what counts.
"""

import os
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards import storage
from shards.errors import DatasetError
from shards.schema import Bucket
from shards.writer import parquet_bytes
from stages.errors import ConfigError

PLANNED, DUPLICATE, FILTERED, REJECTED = "planned", "duplicate", "filtered", "rejected"

PLAN_SCHEMA = pa.schema(
    [
        ("clip", pa.uint64()),
        ("occurrence", pa.int32()),
        ("attempt", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),  # of a reject
        ("message", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("path", pa.string()),  # below the videos folder, or absolute; null if there is no such file
        ("duration_s", pa.float64()),
        ("caption", pa.string()),
        ("aesthetic", pa.float64()),
        ("umt", pa.float64()),
        ("matching_score", pa.float64()),
        ("desirable_filtering", pa.string()),
        # Only planned clips have what follows.
        ("key", pa.string()),
        ("bucket", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("window", pa.int32()),
        ("start_s", pa.float64()),  # of the window, in the file
        ("clip_start_s", pa.float64()),  # of the whole clip, in the file
        ("fps", pa.float64()),
    ]
)

Outcomes = Mapping[tuple[str, int], Mapping[str, str]]
"""What commits say: (bucket name, shard number) of every committed shard -> key of a reject -> its reason."""

_FOLDER = "plan"
_PART = re.compile(r"[0-9]{6}\.parquet")


@dataclass(frozen=True)
class PlannedClip:
    """A clip to decode: ``fps`` frames a second of ``path`` from ``start_s`` (after the file's first frame).

    ``clip_start_s`` is where the clip begins, of which ``start_s`` begins a window.
    ``kind`` is "video" or "image". ``duration_s`` is what the metadata says of the whole clip.
    """

    key: str
    source: str
    kind: str
    path: str
    start_s: float
    clip_start_s: float
    fps: float
    duration_s: float
    caption: str
    aesthetic: float | None
    umt: float | None
    matching_score: float | None
    desirable_filtering: str | None


@dataclass(frozen=True)
class ShardPlan:
    """The clips of one shard, in the order of their keys."""

    bucket: Bucket
    number: int
    clips: tuple[PlannedClip, ...]


@dataclass(frozen=True)
class Totals:
    """What became of every row: clips = written + filtered + duplicates + pending + the sum of rejected."""

    rows: int
    clips: int
    written: int
    filtered: int
    duplicates: int
    pending: int  # planned for shards that are not committed yet
    rejected: dict[str, int]


def load_plan(dataset: storage.Location) -> pa.Table:
    """All parts of a dataset's plan as one table; an empty one for a dataset without. Raises DatasetError."""
    folder = storage.local_path(dataset) / _FOLDER
    parts = []
    for name in _part_names(dataset):
        try:
            parts.append(pq.read_table(pa.BufferReader(storage.read(folder / name)), page_checksum_verification=True))
        except (pa.ArrowInvalid, OSError) as error:
            raise DatasetError(f"{folder / name} is damaged ({error}): use another output folder") from error
    return pa.concat_tables(parts) if parts else PLAN_SCHEMA.empty_table()


def append_plan(dataset: storage.Location, table: pa.Table) -> None:
    """Stores what ``plan`` returned as the next part, whole or not at all; nothing if it has no rows."""
    if not table.num_rows:
        return
    folder = storage.local_path(dataset) / _FOLDER
    storage.make_folder(folder)
    path = folder / f"{len(_part_names(dataset)):06d}.parquet"
    if not storage.create_exclusive(path, parquet_bytes(table)):
        raise ConfigError(f"another run has just written {path}: run the same command again")


def shard_plans(table: pa.Table, videos_folder: str, done: Container[tuple[str, int]] = ()) -> list[ShardPlan]:
    """The shards that the plan names, ordered by bucket and number, without those ``done``."""
    planned = table.filter(pc.equal(table["status"], PLANNED))
    planned = planned.sort_by([("bucket", "ascending"), ("shard", "ascending"), ("row", "ascending")])
    plans = []
    for (bucket, number), rows in groupby(_dicts(planned), key=lambda row: (row["bucket"], row["shard"])):
        if (bucket, number) not in done:
            clips = tuple(_planned_clip(row, videos_folder) for row in rows)
            plans.append(ShardPlan(Bucket.parse(bucket), number, clips))
    return plans


def counts(table: pa.Table, outcomes: Outcomes) -> Totals:
    """Adds up the last attempt of every row of a plan."""
    tally: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for row in last_attempts(table):
        status, reason = outcome(row, outcomes)
        if reason is None:
            tally[status] += 1
        else:
            rejected[reason] += 1
    clips = tally.total() + rejected.total()
    return Totals(
        rows=clips,
        clips=clips,
        written=tally["written"],
        filtered=tally[FILTERED],
        duplicates=tally[DUPLICATE],
        pending=tally["pending"],
        rejected=dict(sorted(rejected.items())),
    )


def outcome(row: Mapping[str, Any], outcomes: Outcomes) -> tuple[str, str | None]:
    """What became of a row: written, pending, duplicate, filtered, or rejected with a reason."""
    if row["status"] != PLANNED:
        return row["status"], row["reason"]
    rejects = outcomes.get((row["bucket"], row["shard"]))
    if rejects is None:
        return "pending", None
    reason = rejects.get(row["key"])
    return (REJECTED, reason) if reason else ("written", None)


def last_attempts(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a plan that count: of a retried clip, only its last attempt."""
    needed = table.select(["clip", "occurrence", "attempt", "status", "reason", "key", "bucket", "shard"])
    retried = needed.filter(pc.greater(needed["attempt"], 0))
    last: dict[tuple[int, int], int] = {}
    for row in _dicts(retried):  # in the order of the attempts
        last[row["clip"], row["occurrence"]] = row["attempt"]
    return (row for row in _dicts(needed) if row["attempt"] == last.get((row["clip"], row["occurrence"]), 0))


def _part_names(dataset: storage.Location) -> list[str]:
    names = storage.list_folder(storage.local_path(dataset) / _FOLDER)
    return [name for name in names if _PART.fullmatch(name)]


def _dicts(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=65536):
        yield from batch.to_pylist()


def _planned_clip(row: Mapping[str, Any], videos_folder: str) -> PlannedClip:
    values = {field.name: row[field.name] for field in fields(PlannedClip)}
    return PlannedClip(**values | {"path": os.path.abspath(os.path.join(videos_folder, row["path"]))})
