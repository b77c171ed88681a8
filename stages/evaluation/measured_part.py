"""The page's part about what was measured: rows of text and charts, for ``measured.html`` to lay out."""

from collections.abc import Iterator
from dataclasses import dataclass

from stages.chart import IntervalChart, interval_chart
from stages.evaluation.clip_score import ClipScore
from stages.evaluation.frechet import FrechetDistance
from stages.evaluation.held_out_loss import Curve, HeldOutLoss
from stages.evaluation.intervals import Estimate
from stages.evaluation.measured import Beside, Measured, interval_in_words
from stages.evaluation.nearest import Nearest, Pair
from stages.page import percent

HINTS = {
    "motion": "how far things move",
    "flicker": "change that is not motion",
    "frozen": "frames that repeat the one before",
    "sharpness": "variance of the Laplacian",
    "colour_drift": "from the first quarter to the last",
}


@dataclass(frozen=True)
class Cell:
    """A number, and under it what it was measured on, and its interval."""

    value: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One measure: what it is, how to read it, and its cells."""

    name: str
    hint: str
    cells: list[Cell]


@dataclass(frozen=True)
class LossChart:
    """legend: the names of the series, in their order."""

    title: str
    unit: str
    legend: list[str]
    chart: IntervalChart


@dataclass(frozen=True)
class MeasuredPart:
    """What ``measured.html`` shows; tables without rows are left out."""

    loss: list[Row]
    loss_clips: str
    loss_charts: list[LossChart]
    samples: list[Row]
    real_clips: str
    frechet: list[Row]
    nearest: Nearest | None
    pairs: list[Pair]
    notes: list[str]


def measured_part(measured: Measured) -> MeasuredPart:
    """The numbers in words, and as charts."""
    warnings = list(dict.fromkeys(distance.warning for distance in measured.frechet if distance.warning))
    return MeasuredPart(
        loss=list(_loss_rows(measured.loss)) if measured.loss else [],
        loss_clips=measured.loss.clips if measured.loss else "",
        loss_charts=list(_loss_charts(measured.loss)) if measured.loss else [],
        samples=list(_sample_rows(measured)),
        real_clips=measured.real_clips,
        frechet=[_frechet_row(distance) for distance in measured.frechet],
        nearest=measured.nearest,
        pairs=measured.nearest.pairs if measured.nearest else [],
        notes=[*warnings, *measured.notes],
    )


def _loss_rows(loss: HeldOutLoss) -> Iterator[Row]:
    yield Row(loss.checkpoint.name, "lower is better", [_cell(loss.checkpoint.overall)])
    if loss.against and loss.difference:
        yield Row(loss.against.name, "on the same clips, levels and noise", [_cell(loss.against.overall)])
        yield Row("the first less the second", "clip by clip; below 0 the first is better",
                  [_cell(loss.difference.overall)])  # fmt: skip


def _loss_charts(loss: HeldOutLoss) -> Iterator[LossChart]:
    curves = [loss.checkpoint, *([loss.against] if loss.against else [])]
    yield LossChart("Loss by noise level", "loss", [curve.name for curve in curves], _by_level(loss, curves))
    if loss.difference:
        yield LossChart("The first less the second", "difference of loss", [], _by_level(loss, [loss.difference]))


def _by_level(loss: HeldOutLoss, curves: list[Curve]) -> IntervalChart:
    bounds = [
        [(level.value, *(level.interval or (level.value, level.value))) for level in curve.by_level] for curve in curves
    ]
    return interval_chart(loss.levels, bounds, x_end=1)


def _sample_rows(measured: Measured) -> Iterator[Row]:
    if measured.clip_score:
        yield from _clip_rows(measured.clip_score)
    for beside in measured.motion:
        yield _beside_row(beside)
    if measured.nearest:
        yield Row("distance to the nearest training clip", "1 - correlation of latents; near 0 is a copy",
                  [_cell(measured.nearest.samples), _cell(measured.nearest.real)])  # fmt: skip


def _clip_rows(score: ClipScore) -> Iterator[Row]:
    yield Row("CLIP score", "higher is better; real clips with their captions",
              [_cell(score.samples), _cell(score.real)])  # fmt: skip
    if score.other_prompts and score.samples_apart:
        apart = score.samples_apart
        hint = f"what chance gives; own prompts score {apart.value:.3g} more ({interval_in_words(apart)})"
        yield Row("CLIP score with other samples' prompts", hint, [_cell(score.other_prompts), Cell("")])


def _beside_row(beside: Beside) -> Row:
    if beside.name == "frozen":
        unit, cells = "", [_cell(beside.samples, share=True), _cell(beside.real, share=True)]
    else:
        unit, cells = f", {beside.unit}", [_cell(beside.samples), _cell(beside.real)]
    return Row(beside.name.replace("_", " ") + unit, f"{HINTS[beside.name]}; like real clips is good", cells)


def _frechet_row(distance: FrechetDistance) -> Row:
    low, high = distance.interval
    hint = f"{'a diagnostic; ' if distance.diagnostic else ''}{distance.dimensions} features; lower is better"
    cells = [
        Cell(f"{distance.at_half:.4g}", f"{distance.samples // 2:,} samples"),
        Cell(f"{distance.distance:.4g}", f"{low:.4g} to {high:.4g}; {distance.samples:,} samples"),
        Cell(f"{distance.extrapolated:.4g}", "extrapolated"),
    ]
    return Row(distance.features, hint, cells)


def _cell(estimate: Estimate, *, share: bool = False) -> Cell:
    interval = interval_in_words(estimate)
    if share and estimate.interval:
        interval = " to ".join(map(percent, estimate.interval))
    value = percent(estimate.value) if share else f"{estimate.value:.4g}"
    return Cell(value, f"{interval}; {estimate.samples:,} clips")
