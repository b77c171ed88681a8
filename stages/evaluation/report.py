"""One page about a run that a person can look at and send to a colleague: a single file that asks for no other."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from shards.manifest import Manifest
from shards.schema import LATENTS
from stages.chart import Chart, line_chart
from stages.evaluation.intervals import Proportion
from stages.evaluation.measured import Measured
from stages.evaluation.measured_part import measured_part
from stages.evaluation.training_samples import TrainingSamples
from stages.output import write_text
from stages.page import PIXELATED_BELOW_PX, data_uri, render_page
from stages.shapes.check import Observed, Score, SplitScore
from stages.shapes.render import COLOURS, DIRECTIONS, SHAPES, Combination, held_out

VIDEO_BUDGET_BYTES = 3_000_000
"""Videos beyond this are left out of the page; base64 makes it a third more."""
OPEN_GROUPS = 24
"""Prompts of one section that are shown before the reader asks for more."""

_COLOUR, _SHAPE, _DIRECTION = 1 / len(COLOURS), 1 / len(SHAPES), 1 / len(DIRECTIONS)
_ATTRIBUTES = (  # name for a person, field of SplitScore, share right by chance
    ("colour and direction", "colour_and_direction", _COLOUR * _DIRECTION),
    ("colour", "colour", _COLOUR),
    ("direction", "direction", _DIRECTION),
    ("shape", "shape", _SHAPE),
    ("all three", "all_three", _COLOUR * _DIRECTION * _SHAPE),
)


@dataclass(frozen=True)
class Clip:
    """One sample. ``expected`` and ``observed`` are None where the prompt is no caption of the shapes dataset."""

    path: Path
    prompt: str
    seed: int
    height: int
    width: int
    expected: Combination | None = None
    observed: Observed | None = None

    @property
    def held_out(self) -> bool:
        """Whether the prompt names a combination that training did not see."""
        return self.expected in held_out()

    @property
    def right(self) -> bool | None:
        """Whether colour and direction are as the prompt says; None where that was not measured."""
        if self.expected is None or self.observed is None:
            return None
        found, wanted = self.observed, self.expected
        return (found.colour, found.direction) == (wanted.colour, wanted.direction)

    @property
    def finding(self) -> str:
        """What a clip shows that differs from its prompt, in a few words."""
        if self.expected is None or self.observed is None:
            return ""
        if self.observed == Observed(None, None, None):
            return "nothing clear"
        names = [name for name in asdict(self.expected) if self._differs(name)]
        shown = [getattr(self.observed, name) for name in names]
        unclear = [name for name, value in zip(names, shown, strict=True) if value is None]
        words = [value for value in shown if value is not None]
        return ", ".join([*words, f"unclear {' and '.join(unclear)}"] if unclear else words)

    def _differs(self, name: str) -> bool:
        return getattr(self.observed, name) != getattr(self.expected, name)


@dataclass(frozen=True)
class Training:
    """The logged steps of a run, ascending, at least one. validation: (step, loss on held-out clips) where measured."""

    steps: list[int]
    losses: list[float]
    clips_per_s: list[float]
    tokens_per_s: list[float]
    data_wait_shares: list[float]
    peak_memory_gb: float
    validation: list[tuple[int, float]] = field(default_factory=list)

    @property
    def usual_clips_per_s(self) -> float:
        return statistics.median(self.clips_per_s)

    @property
    def usual_tokens_per_s(self) -> float:
        return statistics.median(self.tokens_per_s)

    @property
    def usual_data_wait_share(self) -> float:
        return statistics.median(self.data_wait_shares)


@dataclass(frozen=True)
class DatasetNumbers:
    """A dataset in numbers; ``rows`` are (name, value) for a person, in the order of the road through encode."""

    samples: int
    size: str
    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """All that the page tells. ``settings`` are (command, its resolved config as YAML)."""

    clips: Sequence[Clip]
    score: Score | None
    training: Training
    manifest: Manifest
    settings: Sequence[tuple[str, str]]
    checkpoint: str = ""
    measured: Measured | None = None
    training_samples: TrainingSamples | None = None
    video_budget_bytes: int = VIDEO_BUDGET_BYTES


@dataclass
class Group:
    """The samples of one prompt: all of them counted, those that fit the page shown with their video."""

    prompt: str
    clips: list[Clip] = field(default_factory=list)
    shown: list[tuple[Clip, str]] = field(default_factory=list)  # with the video as a data URI

    @property
    def right(self) -> int:
        return sum(clip.right is True for clip in self.clips)


@dataclass(frozen=True)
class Section:
    """The groups of one kind: held-out combinations, seen ones, or prompts that are not measured."""

    kind: str
    groups: list[Group]

    @property
    def scored(self) -> bool:
        return self.kind != "other"

    @property
    def small(self) -> bool:
        """Whether every prompt has one sample of few pixels, so that many fit side by side."""
        return all(len(group.clips) == 1 and group.clips[0].width < PIXELATED_BELOW_PX for group in self.groups)


def write_report(path: Path, page: Page) -> None:
    """Write the page as one HTML file."""
    sections = list(_sections(page))
    text = render_page(
        "report.html",
        page=page,
        today=datetime.now(timezone.utc).date().isoformat(),
        sections=sections,
        left_out=len(page.clips) - sum(len(group.shown) for section in sections for group in section.groups),
        splits=list(_splits(page.score)),
        charts=_charts(page.training),
        training=page.training,
        dataset=dataset_numbers(page.manifest),
        open_groups=OPEN_GROUPS,
        measured=page.measured and measured_part(page.measured),
    )
    write_text(path, text)


def readable_bytes(count: int) -> str:
    """1,234 bytes as 1.2 kB."""
    size, units = float(count), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"


def dataset_numbers(manifest: Manifest) -> DatasetNumbers:
    """What a dataset holds; of the clips' fates those that its encode counted."""
    totals = manifest.totals
    shards = [shard for bucket in manifest.buckets.values() for c in bucket.columns.values() for shard in c.shards]
    samples = sum(bucket.samples for bucket in manifest.buckets.values())
    size = readable_bytes(sum(shard.tar_bytes for shard in shards))
    names = {"rows": "rows of metadata"} | {key: key for key in ("clips", "written", "filtered", "duplicates")}
    rows = [(name, f"{totals[key]:,}") for key, name in names.items() if key in totals]
    rejected = (totals["rejected"] or {"any_reason": 0}) if "rejected" in totals else {}
    for reason, count in sorted(rejected.items()):
        rows.append((f"rejected: {reason.replace('_', ' ')}", f"{count:,}"))
    for bucket, entry in manifest.buckets.items():
        rows.append((f"bucket {bucket.replace('x', ' × ')}", f"{entry.samples:,} samples"))
    rows.append(("shards", f"{sum(len(entry.columns[LATENTS].shards) for entry in manifest.buckets.values()):,}"))
    return DatasetNumbers(samples, size, [*rows, ("size", size)])


def _splits(score: Score | None) -> Iterator[tuple[str, SplitScore, list[tuple[str, Proportion, float]]]]:
    """Of each kind of combination that was sampled: its name, its score, and each (attribute, share, chance)."""
    if score is None:
        return
    for name, split in (("held-out", score.held_out), ("seen", score.seen)):
        if split.colour.total:
            yield name, split, [(label, getattr(split, key), chance) for label, key, chance in _ATTRIBUTES]


def _charts(training: Training) -> list[tuple[str, str, Chart]]:
    """(title, unit of y, chart) of what is drawn over the training steps."""
    charts = [
        ("Loss", "loss", line_chart(training.steps, training.losses)),
        ("Speed", "clips a second", line_chart(training.steps, training.clips_per_s, from_zero=True)),
    ]
    if training.validation:
        charts.insert(1, ("Held-out loss", "loss", line_chart(*zip(*training.validation, strict=True))))
    return charts


def _sections(page: Page) -> Iterator[Section]:
    groups: dict[tuple[str, str], Group] = {}
    for clip in page.clips:
        kind = "other" if clip.expected is None else "held-out" if clip.held_out else "seen"
        groups.setdefault((kind, clip.prompt), Group(clip.prompt)).clips.append(clip)
    kinds = ("held-out", "seen", "other")
    ordered = sorted(groups.items(), key=lambda item: kinds.index(item[0][0]))
    _embed([group for _, group in ordered], page.video_budget_bytes)
    for kind in kinds:
        found = [group for (its_kind, _), group in ordered if its_kind == kind and group.shown]
        if found:
            yield Section(kind, found)


def _embed(groups: Sequence[Group], budget_bytes: int) -> None:
    """Show the first sample of every prompt, then the second of each, until the budget is spent; one in any case."""
    spent = 0
    for group, clip in _in_turn(groups):
        size = clip.path.stat().st_size
        if spent and spent + size > budget_bytes:
            continue
        spent += size
        group.shown.append((clip, data_uri("video/mp4", clip.path.read_bytes())))


def _in_turn(groups: Iterable[Group]) -> Iterator[tuple[Group, Clip]]:
    for turn in range(max((len(group.clips) for group in groups), default=0)):
        for group in groups:
            if turn < len(group.clips):
                yield group, group.clips[turn]
