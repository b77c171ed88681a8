"""What was measured of a checkpoint, and the same as plain numbers and in words."""

from dataclasses import asdict, dataclass, field
from typing import Any

from stages.evaluation.clip_score import ClipScore
from stages.evaluation.frechet import FrechetDistance
from stages.evaluation.held_out_loss import HeldOutLoss
from stages.evaluation.intervals import Estimate
from stages.evaluation.nearest import Nearest
from stages.page import percent


@dataclass(frozen=True)
class Beside:
    """A measure of samples, and the same of real clips."""

    name: str
    unit: str
    samples: Estimate
    real: Estimate


@dataclass(frozen=True)
class Measured:
    """What was measured; of samples, beside ``real_clips``: "held-out" or "training" ones.

    notes: what could not be measured, and why.
    """

    loss: HeldOutLoss | None = None
    real_clips: str = ""
    frechet: list[FrechetDistance] = field(default_factory=list)
    motion: list[Beside] = field(default_factory=list)
    nearest: Nearest | None = None
    clip_score: ClipScore | None = None
    notes: list[str] = field(default_factory=list)


def plain_numbers(measured: Measured) -> dict[str, Any]:
    """For metrics.json."""
    found = asdict(measured)
    for entry, distance in zip(found["frechet"], measured.frechet, strict=True):
        entry["warning"] = distance.warning
    if measured.nearest:
        found["nearest"]["nearer"] |= {"interval": measured.nearest.nearer.interval}
    return found


def headlines(measured: Measured) -> list[str]:
    """The most important, a line each."""
    lines = []
    if measured.loss:
        loss = measured.loss
        lines.append(f"loss on {loss.clips} clips: {in_words(loss.checkpoint.overall)}")
        if loss.difference and loss.against:
            lines.append(f"less that of {loss.against.name}: {in_words(loss.difference.overall)}, below 0 is better")
    for distance in measured.frechet:
        kind = "Fréchet distance, diagnostic" if distance.diagnostic else "Fréchet distance"
        low, high = distance.interval
        lines.append(
            f"{kind} ({distance.features}): {distance.distance:.4g} ({low:.4g} to {high:.4g}; {distance.samples} "
            f"samples; {distance.extrapolated:.4g} for endless ones)"
        )
        if distance.warning:
            lines.append(f"warning: {distance.warning}")
    if measured.clip_score:
        lines.append(f"CLIP score: {in_words(measured.clip_score.samples)}")
    if measured.nearest:
        nearer = measured.nearest.nearer
        lines.append(
            f"near-duplicates of training clips: {percent(nearer.value)} of {nearer.total} samples are nearer to one "
            "than 95 % of real clips are; 5 % is what chance gives"
        )
    return [*lines, *(f"note: {note}" for note in measured.notes)]


def in_words(estimate: Estimate) -> str:
    """A value with its interval and what it was measured on."""
    return f"{estimate.value:.4g} ({interval_in_words(estimate)}; {estimate.samples:,} samples)"


def interval_in_words(estimate: Estimate) -> str:
    if estimate.interval is None:
        return "no interval: one source"
    low, high = estimate.interval
    return f"{low:.4g} to {high:.4g}"
