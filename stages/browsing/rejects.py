"""What became of the clips that a dataset does not hold: by reason, with a few of each to look at."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards import storage
from shards.dataset import Dataset
from shards.errors import DatasetError, ShardError
from shards.schema import KEY, LATENTS, MESSAGE, STATUS, WRITTEN
from shards.writer import commit_path, read_commit
from stages.browsing.source_frames import Source, SourceReader
from stages.errors import DecodeError
from stages.page import jpeg_uri
from stages.planning.outcomes import IDENTITY, LastAttempts
from stages.planning.plan_table import REJECTED, Plan

EXAMPLES = 3
MOST_COMMITS = 200
"""Shards of a bucket, picked by chance, that are searched for examples."""
_COLUMNS = [*IDENTITY, "status", "reason", "message", KEY, "source", "kind", "path", "start_s", "caption"]
_COLUMNS += ["bucket", "shard"]


@dataclass(frozen=True)
class Example:
    """A rejected clip. path: as the plan has it, None where there is no such file. start_s: in the file.

    picture: a data URI of its first frame, or empty, and ``note`` says why.
    """

    source: str
    message: str
    kind: str
    path: str | None
    start_s: float
    caption: str
    picture: str = ""
    note: str = ""


@dataclass(frozen=True)
class Failed:
    """A clip that was planned for a shard and is not in it."""

    key: str
    reason: str
    message: str
    bucket: str
    shard: int


@dataclass(frozen=True)
class Reason:
    name: str
    clips: int
    examples: list[Example]


@dataclass(frozen=True)
class Planned:
    """What the plan says of some clips (by key), and of those that it rejected itself (by reason)."""

    clips: Mapping[str, Mapping[str, Any]]
    rejected: Mapping[str, list[Mapping[str, Any]]]
    fault: str


def planned(shards: storage.Location, keys: Collection[str]) -> Planned:
    """Looks clips up in the plan, a part at a time."""
    clips: dict[str, Mapping[str, Any]] = {}
    rejected: dict[str, list[Mapping[str, Any]]] = {}
    plan = Plan(shards)
    try:
        last = LastAttempts(plan)
        for part in plan.parts(_COLUMNS):
            final = part.filter(last.are(part))
            wanted = final.filter(pc.is_in(final[KEY], pa.array(sorted(keys), pa.string())))
            clips |= {row[KEY]: row for row in wanted.to_pylist()}
            for row in _few_rejects(final):
                rejected.setdefault(row["reason"], []).append(row)
    except (DatasetError, ShardError) as error:
        return Planned(clips, rejected, f"the plan cannot be read, so not every source can be found: {error}")
    return Planned(clips, rejected, "")


def failed_clips(dataset: Dataset, seed: int) -> tuple[list[Failed], list[str]]:
    """A few of the clips that were planned and failed, and the commits that are damaged."""
    found: list[Failed] = []
    faults = []
    for bucket, entry in dataset.manifest.buckets.items():
        left = {status: min(EXAMPLES, count) for status, count in entry.statuses.items() if status != WRITTEN}
        numbers = [shard.number for shard in entry.columns[LATENTS].shards]
        searched = np.random.default_rng(seed).permutation(numbers)[:MOST_COMMITS].tolist()
        while searched and any(left.values()):
            number = searched.pop()
            try:
                table = read_commit(commit_path(dataset.path / bucket / LATENTS, number)).table
            except (DatasetError, ShardError) as error:
                faults.append(str(error))
                continue
            failed = table.filter(pc.not_equal(table[STATUS], WRITTEN)).select([KEY, STATUS, MESSAGE])
            for row in failed.to_pylist():
                if left.get(row[STATUS], 0):
                    left[row[STATUS]] -= 1
                    found.append(Failed(row[KEY], row[STATUS], row[MESSAGE], bucket, number))
    return found, faults


def reasons(dataset: Dataset, failed: Sequence[Failed], plan: Planned) -> list[Reason]:
    """Every reason, the most frequent first, with its examples."""
    totals: dict[str, int] = dict(dataset.manifest.totals.get("rejected") or {})
    if not totals:  # no count of the encode's own: of the clips that failed alone
        for entry in dataset.manifest.buckets.values():
            for status, count in entry.statuses.items():
                if status != WRITTEN:
                    totals[status] = totals.get(status, 0) + count
    found = []
    for name, clips in sorted(totals.items(), key=lambda item: (-item[1], item[0])):
        examples = [_example(row, row["message"]) for row in plan.rejected.get(name, [])]
        examples += [_failed_example(one, plan) for one in failed if one.reason == name and not _retried(one, plan)]
        found.append(Reason(name, clips, examples[:EXAMPLES]))
    return found


def with_pictures(reason: Reason, reader: SourceReader, videos: str) -> Reason:
    """Looks for the first frame of each example, below the folder ``videos``."""
    return replace(reason, examples=[_with_picture(example, reader, videos) for example in reason.examples])


def _with_picture(example: Example, reader: SourceReader, videos: str) -> Example:
    if example.path is None:
        return replace(example, note="there is no file")
    source = Source(os.path.join(videos, example.path), example.kind, example.start_s)
    try:
        return replace(example, picture=jpeg_uri(reader.first_frame(source)))
    except DecodeError as error:
        return replace(example, note=str(error))


def _few_rejects(part: pa.Table) -> Iterator[dict[str, Any]]:
    """As many rows that a part of the plan rejects as are shown, of each reason."""
    rejected = part.filter(pc.equal(part["status"], REJECTED))
    for reason in rejected["reason"].unique().to_pylist():
        yield from rejected.filter(pc.equal(rejected["reason"], reason)).slice(0, EXAMPLES).to_pylist()


def _retried(failed: Failed, plan: Planned) -> bool:
    """Whether the plan has the clip in another shard by now."""
    row = plan.clips.get(failed.key)
    return row is not None and (row["bucket"], row["shard"]) != (failed.bucket, failed.shard)


def _failed_example(failed: Failed, plan: Planned) -> Example:
    return _example(plan.clips.get(failed.key, {"source": failed.key}), failed.message)


def _example(row: Mapping[str, Any], message: str | None) -> Example:
    kind, start_s = row.get("kind") or "video", row.get("start_s") or 0.0
    return Example(row["source"], message or "", kind, row.get("path"), start_s, row.get("caption") or "")
