"""Rows, plans and files that are not there, for the tests of planning."""

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa

from stages.decoding.pyav_reader import VideoInfo
from stages.errors import DecodeError
from stages.planning.metadata import Row
from stages.planning.plan import ClipConfig, Outcomes, Plan, PlanConfig, Probe, plan, shard_plans
from stages.planning.plan_table import PLAN_SCHEMA

NOTHING = Plan("/nowhere")
CONFIG = PlanConfig(ClipConfig(64, 64, (8, 16), 8), shard_clips=4)


def clip(name: str, duration_ms: int | None = 1000, **changes) -> Row:
    values = {"identity": name, "source": name, "path": f"{name}.mp4", "duration_ms": duration_ms} | changes
    return Row(**values)


def clips(count: int, duration_ms: int = 1000, first: int = 0) -> list[Row]:
    return [clip(f"clip{number:03d}", duration_ms) for number in range(first, first + count)]


def no_probe(rows: Iterator[Row]) -> Iterator[VideoInfo | DecodeError]:
    raise AssertionError(f"asked about {next(rows).path}")


def planned(
    rows: Sequence[Row],
    config: PlanConfig = CONFIG,
    name: str = "set",
    previous: Plan = NOTHING,
    *,
    retry: Collection[str] = (),
    outcomes: Outcomes | None = None,
    probe: Probe = no_probe,
) -> pa.Table:
    """What the rows add, all parts together."""
    parts = list(plan(rows, config, name, previous, retry=retry, outcomes=outcomes, probe=probe))
    return pa.concat_tables(parts) if parts else PLAN_SCHEMA.empty_table()


def stored(plan: Plan) -> pa.Table:
    return pa.concat_tables([PLAN_SCHEMA.empty_table(), *plan.parts()])


def statuses(table: pa.Table) -> list[tuple[str, str | None]]:
    return list(zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True))


def committed(table: pa.Table, rejects: dict[str, str] | None = None) -> Outcomes:
    """All shards committed, with the rejects given by source."""
    outcomes: dict[tuple[str, int], dict[str, str]] = {}
    for shard in shard_plans([table], "/videos"):
        reasons = {clip.key: (rejects or {}).get(clip.source, "") for clip in shard.clips}
        outcomes[shard.bucket.name, shard.number] = {key: reason for key, reason in reasons.items() if reason}
    return outcomes


def make_plan(folder: Path, rows: Sequence[Row], config: PlanConfig = CONFIG, parts: int | None = None) -> Plan:
    """Appends parts as they come, all or the first few of them, as a run that is killed does."""
    dataset = Plan(folder)
    for part in islice(plan(rows, config, "set", dataset, probe=no_probe), parts):
        dataset.append(part)
    return dataset


def windows_of(table: pa.Table) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for shard in shard_plans([table], "/v"):
        for planned_clip in sorted(shard.clips, key=lambda planned_clip: planned_clip.start_s):
            found.setdefault(planned_clip.source, []).append((planned_clip.start_s, planned_clip.clip_start_s))
    return found


def sized(height: int, width: int, fps: float = 25.0, duration_s: float = 1.0) -> VideoInfo:
    return VideoInfo(duration_s=duration_s, fps=fps, height=height, width=width, tolerance_s=0.0, container="mp4")


class FakeFiles:
    """A probe of files that are not there, and what it was asked."""

    def __init__(self, **files: VideoInfo | DecodeError):
        self._files = files
        self.asked: list[str] = []

    def __call__(self, rows: Iterator[Row]) -> Iterator[VideoInfo | DecodeError]:
        for row in rows:
            name = str(row.path).removesuffix(".mp4")
            self.asked.append(name)
            yield self._files[name]
