"""Does a clip show what its prompt says? Colour, shape and direction of motion, measured from the pixels.

Made for generated samples, so nothing needs clean edges or exact colours: the background is what most pixels show,
the shape is what differs from it, and what cannot be told is None, which counts as wrong.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.evaluation.intervals import Proportion
from stages.shapes.render import BACKGROUND, COLOURS, DIRECTIONS, SHAPES, held_out, parse_caption, shape_coverage
from stages.video import read_frames

LEAST_CONTRAST = 40
"""A shape differs from the background by at least so many of 255 levels in some channel."""
LEAST_TRAVEL_SHARE = 1 / 16
"""A shape that moves less than this share of the picture's longer side stands still."""
EDGE = 0.4
"""Share of the shape's contrast above which a pixel belongs to the shape."""


@dataclass(frozen=True)
class Observed:
    """What a clip shows; None for what cannot be told."""

    colour: str | None
    shape: str | None
    direction: str | None


@dataclass(frozen=True)
class SplitScore:
    """The shares of one kind of combination in which each attribute, or several at once, are as the prompt says."""

    colour: Proportion
    shape: Proportion
    direction: Proportion
    colour_and_direction: Proportion
    all_three: Proportion


@dataclass(frozen=True)
class Score:
    """Shares right of the combinations that training saw and of those held out of it."""

    seen: SplitScore
    held_out: SplitScore


def check_video(frames: np.ndarray) -> Observed:
    """Measure uint8 [T, H, W, 3], T >= 2: one bright shape on a plain background."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < 2:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T >= 2, H, W, 3]")
    background = np.median(frames.reshape(-1, 3), axis=0)
    difference = frames.astype(np.float32) - background.astype(np.float32)  # [T, H, W, 3]
    contrast = np.abs(difference).max(axis=3)  # [T, H, W]
    full = np.quantile(contrast, 1 - 0.01)
    if full < LEAST_CONTRAST:
        return Observed(None, None, None)
    cover = np.clip(contrast / full, 0, 1)
    inside = cover > EDGE
    clear = inside.sum(axis=(1, 2)) > 0.25 * np.median(inside.sum(axis=(1, 2)))  # frames that show the shape whole
    centres = _centres(np.where(inside, cover, 0)[clear])
    return Observed(
        colour=_colour(difference[inside]),
        shape=_shape(np.where(cover > EDGE / 2, cover, 0)[clear], centres),
        direction=_direction(np.flatnonzero(clear), centres, len(frames), max(frames.shape[1:3])),
    )


def check_file(path: Path) -> Observed:
    """Decode a video file and measure it."""
    return check_video(read_frames(path))


def score(samples: Iterable[tuple[str, Observed]]) -> Score:
    """Compare what samples show with their prompts; ConfigError for a prompt that is no caption of this dataset."""
    unseen = set(held_out())
    verdicts: dict[bool, list[tuple[bool, bool, bool]]] = {False: [], True: []}
    for prompt, observed in samples:
        expected = parse_caption(prompt)
        verdict = (
            observed.colour == expected.colour,
            observed.shape == expected.shape,
            observed.direction == expected.direction,
        )
        verdicts[expected in unseen].append(verdict)
    return Score(seen=_split(verdicts[False]), held_out=_split(verdicts[True]))


def _split(verdicts: list[tuple[bool, bool, bool]]) -> SplitScore:
    total = len(verdicts)
    return SplitScore(
        colour=Proportion(sum(colour for colour, _, _ in verdicts), total),
        shape=Proportion(sum(shape for _, shape, _ in verdicts), total),
        direction=Proportion(sum(direction for _, _, direction in verdicts), total),
        colour_and_direction=Proportion(sum(colour and direction for colour, _, direction in verdicts), total),
        all_three=Proportion(sum(map(all, verdicts)), total),
    )


def _colour(differences: np.ndarray) -> str | None:
    """The hue that more than half of the shape's pixels [n, 3] are nearest to."""
    names = list(COLOURS)
    hues = np.array([COLOURS[name] for name in names], np.float32) - np.array(BACKGROUND, np.float32)
    hues -= hues.mean(axis=1, keepdims=True)
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    chroma = differences - differences.mean(axis=1, keepdims=True)
    coloured = chroma[np.linalg.norm(chroma, axis=1) > LEAST_CONTRAST / 2]
    votes = np.bincount((coloured @ hues.T).argmax(axis=1), minlength=len(names))
    return names[int(votes.argmax())] if 2 * votes.max() > len(differences) else None


def _centres(weights: np.ndarray) -> np.ndarray:
    """Centroids (x, y) in pixels of [t, H, W], pixel centres at whole numbers plus a half: [t, 2]."""
    mass = weights.sum(axis=(1, 2))
    x = weights.sum(axis=1) @ (np.arange(weights.shape[2]) + 0.5) / mass
    y = weights.sum(axis=2) @ (np.arange(weights.shape[1]) + 0.5) / mass
    return np.stack([x, y], axis=1)


def _direction(times: np.ndarray, centres: np.ndarray, frames: int, side_px: int) -> str | None:
    """The way of a straight line through the centres; None when it stands still or moves aslant."""
    if len(times) < 2:
        return None
    travel_px = np.polyfit(times, centres, deg=1)[0] * (frames - 1)  # (x, y)
    along, across = np.abs(travel_px).max(), np.abs(travel_px).min()
    if along < LEAST_TRAVEL_SHARE * side_px or across > along / 2:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], travel_px)))


def _shape(cover: np.ndarray, centres: np.ndarray) -> str | None:
    """The shape whose outline, at the same place and of the same area, differs least from cover [t, H, W]."""
    height, width = cover.shape[1:]
    areas_px = {"ball": math.pi, "square": 4.0, "triangle": 3 * math.sqrt(3)}  # at half size 1
    misfit = dict.fromkeys(SHAPES, 0.0)
    for frame, (x, y) in zip(cover, centres, strict=True):
        for shape in SHAPES:
            half_size_px = math.sqrt(frame.sum() / areas_px[shape])
            ideal = shape_coverage(shape, (x, y), half_size_px, max(height, width))[:height, :width]
            misfit[shape] += float(np.abs(frame - ideal).sum())
    best = min(misfit, key=lambda shape: misfit[shape])
    return best if misfit[best] < 0.5 * float(cover.sum()) else None
