"""The plan as it is stored: a table with every row of the metadata, in parts that are never changed.

DATASET/plan/000000.parquet   the first rows
DATASET/plan/000001.parquet   further ones, what a longer metadata file added, or a retry

A row is known by its clip (a hash of dataset, source and span), its occurrence (0 for the first row of that
clip, 1 for the next), its window and its attempt (0, then one more for each retry). The last attempt is what
counts. The clips of a shard stand together, in the order of their keys.
"""

import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
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
        ("window", pa.int32()),  # null where all of the clip is meant
        ("attempt", pa.int32()),
        ("first_of_line", pa.bool_()),  # false for the second and further clips of a line of the metadata
        ("status", pa.string()),
        ("reason", pa.string()),  # of a reject
        ("message", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("path", pa.string()),  # below the videos folder, or absolute; null if there is no such file
        ("duration_s", pa.float64()),  # null where nobody knows
        ("caption", pa.string()),
        ("aesthetic", pa.float64()),
        ("umt", pa.float64()),
        ("matching_score", pa.float64()),
        ("desirable_filtering", pa.string()),
        # Only planned clips have what follows.
        ("key", pa.string()),
        ("bucket", pa.string()),
        ("start_s", pa.float64()),  # of the window, in the file
        ("clip_start_s", pa.float64()),  # see PlannedClip
        ("fps", pa.float64()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)

_FOLDER = "plan"
_PART = re.compile(r"[0-9]{6}\.parquet")
_SETTINGS = b"settings"


class PlanRow(NamedTuple):
    """A planned clip but for its shard and its place in it; see PLAN_SCHEMA. (A tuple: millions are made.)"""

    clip: int
    occurrence: int
    window: int
    attempt: int
    first_of_line: bool
    status: str
    reason: str | None
    message: str | None
    source: str
    kind: str
    path: str | None
    duration_s: float | None
    caption: str
    aesthetic: float | None
    umt: float | None
    matching_score: float | None
    desirable_filtering: str | None
    key: str
    bucket: str
    start_s: float
    clip_start_s: float
    fps: float


@dataclass(frozen=True)
class PlannedClip:
    """A clip to decode: ``fps`` frames a second of ``path`` from ``start_s`` (after the file's first frame).

    ``clip_start_s`` is where to begin instead when the file ends too early: where the clip does, but a second or
    further window, which must not show the first again, has only its own start. ``kind`` is "video" or "image".
    ``duration_s`` is of the whole clip.
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


class Plan:
    """The plan of a dataset as it is now, read and written a part at a time.

    What another run appends meanwhile is not seen, and what is appended then to this one is refused: both would
    plan the same clips. before: a plan that this one continues elsewhere, for one that is only tried out.
    """

    def __init__(self, dataset: storage.Location, before: "Plan | None" = None):
        self._folder = storage.place(dataset) / _FOLDER
        self._names = [name for name in storage.list_folder(self._folder) if _PART.fullmatch(name)]
        self._before = before

    def parts(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The parts in their order, with all columns or some. Raises DatasetError for a damaged one."""
        if self._before:
            yield from self._before.parts(columns)
        for name in self._names:
            yield self._read(name, columns)

    def settings(self) -> dict[str, Any] | None:
        """What it was made with; None for a plan without parts."""
        found = self._before.settings() if self._before else None
        if found is not None or not self._names:
            return found
        return json.loads(self._read(self._names[0], ["clip"]).schema.metadata[_SETTINGS])

    def append(self, table: pa.Table) -> None:
        """Stores a table that ``plan`` gave as the next part, whole or not at all."""
        storage.make_folder(self._folder)
        name = f"{len(self._names):06d}.parquet"
        if not storage.create_exclusive(self._folder / name, parquet_bytes(table)):
            raise ConfigError(f"another run has just written {self._folder / name}: run the same command again")
        self._names.append(name)

    def _read(self, name: str, columns: Sequence[str] | None) -> pa.Table:
        path = self._folder / name
        try:
            file = pq.ParquetFile(pa.BufferReader(storage.read(path)), page_checksum_verification=True)
            if not file.schema_arrow.equals(PLAN_SCHEMA):
                raise DatasetError(f"{path} is of another version of wisesora: use another output folder")
            return file.read(columns)
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"{path} is damaged ({error}): use another output folder") from error


def plan_table(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    """Rows, with a value for each field of PLAN_SCHEMA, in Arrow's compact form."""
    columns = zip(*rows, strict=True) if rows else [()] * len(PLAN_SCHEMA)
    return pa.table([pa.array(column, f.type) for column, f in zip(columns, PLAN_SCHEMA, strict=True)], PLAN_SCHEMA)


def with_settings(table: pa.Table, settings: Mapping[str, Any]) -> pa.Table:
    return table.replace_schema_metadata({_SETTINGS: json.dumps(settings).encode()})


def shard_plans(
    parts: Iterable[pa.Table], videos_folder: str, done: Container[tuple[str, int]] = ()
) -> Iterator[ShardPlan]:
    """The shards of a plan, in the order in which they were planned, without those ``done``."""
    base = videos_folder if "://" in videos_folder else os.path.abspath(videos_folder)
    for part in parts:
        planned = part.filter(pc.equal(part["status"], PLANNED))
        for bucket, number, rows in planned_shards(planned):
            if (bucket, number) not in done:
                columns = [rows[field.name].to_pylist() for field in fields(PlannedClip)]
                columns[_PATH] = [os.path.join(base, path) for path in columns[_PATH]]
                yield ShardPlan(Bucket.parse(bucket), number, tuple(map(PlannedClip, *columns)))


_PATH = [field.name for field in fields(PlannedClip)].index("path")


def planned_shards(planned: pa.Table) -> Iterator[tuple[str, int, pa.Table]]:
    """Each run of rows of one shard."""
    if not planned.num_rows:
        return
    planned = planned.combine_chunks()
    bucket = pc.dictionary_encode(planned["bucket"]).combine_chunks().indices.to_numpy()
    shard = planned["shard"].to_numpy()
    ends = np.flatnonzero((bucket[1:] != bucket[:-1]) | (shard[1:] != shard[:-1])) + 1
    for start, end in zip([0, *ends.tolist()], [*ends.tolist(), len(shard)], strict=True):
        rows = planned.slice(start, end - start)
        yield rows["bucket"][0].as_py(), int(shard[start]), rows
