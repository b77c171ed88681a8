"""Are samples copies of training clips? The nearest training clip of each sample, and of clips that are no copies.

Clips are compared as their latents, averaged down to a small size: a copy stays near, whatever the VAE's rounding or
a change of brightness did to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import adaptive_avg_pool3d

from shards.dataset import Dataset
from shards.memory import empty_rows
from shards.schema import KEY, LATENTS, MEAN, Bucket
from stages.evaluation.intervals import Estimate, Proportion, estimate_mean
from stages.output import progress_bar
from stages.training.held_out import draw_clips

MOST_FRAMES, MOST_PX = 8, 16
READ_AT_ONCE = 64
YARDSTICK = 0.05
NAMED = 8


@dataclass(frozen=True)
class Pair:
    """A sample and the training clip that is nearest to it."""

    sample: str
    clip: str
    source: str
    start_s: float
    distance: float


@dataclass(frozen=True)
class Nearest:
    """training: how many training clips were looked through. samples, real: the mean distance to the nearest.

    threshold: 5 % of the real clips have a training clip nearer than that. nearer: how many samples have.
    pairs: the nearest of all, nearest first.
    """

    training: int
    samples: Estimate
    real: Estimate
    threshold: float
    nearer: Proportion
    pairs: list[Pair]


def signature(latents: np.ndarray) -> np.ndarray:
    """[T, C, h, w] -> float32 [D] of length 1, whose dot product with another is the correlation of the two clips.

    Each channel's own mean is taken out.
    """
    frames, _, height, width = latents.shape
    size = (min(frames, MOST_FRAMES), min(height, MOST_PX), min(width, MOST_PX))
    small = adaptive_avg_pool3d(torch.from_numpy(latents.astype(np.float32)).transpose(0, 1), size)  # [C, t, h, w]
    centred = (small - small.mean((1, 2, 3), keepdim=True)).flatten()
    return (centred / centred.norm().clamp(min=1e-12)).numpy()


def nearest_clips(
    training: Dataset, bucket: Bucket, rows: Sequence[int], queries: np.ndarray, sources: Sequence[str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Of queries [n, D], `signature`s, the least 1 - correlation to any of ``rows``, [n], and that row, [n].

    sources: clips of these are not looked at, for each query; infinite and -1 where no clip is left.
    Reads some clips at a time, whatever their number.
    """
    distance, row_of = np.full(len(queries), np.inf), np.full(len(queries), -1)
    numbers = {source: number for number, source in enumerate(dict.fromkeys(sources)) if source is not None}
    own = np.array([numbers[source] if source is not None else -1 for source in sources])  # -1 and -2 are nobody's
    of_rows = training.index(bucket)["source"]
    layout = training.layout(bucket, rows[0], LATENTS)
    with progress_bar(len(rows), "nearest", "clip") as bar:
        for start in range(0, len(rows), READ_AT_ONCE):
            some = np.array(rows[start : start + READ_AT_ONCE])
            memory = empty_rows(len(some), layout.length)
            training.read_records(training.records(bucket, some, LATENTS, memory))
            found = np.stack([signature(latents) for latents in layout.members(memory)[MEAN]])
            apart = 1 - queries @ found.T  # [n, some]
            theirs = np.array([numbers.get(of_rows[row].as_py(), -2) for row in some.tolist()])
            apart[own[:, None] == theirs] = np.inf
            best = apart.argmin(1)
            least = apart[np.arange(len(queries)), best]
            nearer = least < distance
            distance[nearer], row_of[nearer] = least[nearer], some[best[nearer]]
            bar.update(len(some))
    return distance, row_of


def measure_nearest(
    training: Dataset,
    bucket: Bucket,
    count: int,
    samples: tuple[np.ndarray, Sequence[str], Sequence[str]],
    real: tuple[np.ndarray, Sequence[str]],
) -> Nearest | None:
    """From the signatures [n, D] of samples, with their names and prompts, and of real clips, with their sources.

    Real clips are compared with training clips of other sources alone. count: at most so many training clips.
    None where the training clips are all of one source.
    """
    rows = [row for _, row in draw_clips(training, [bucket], count)]
    queries = np.concatenate([samples[0], real[0]])
    sources = [*[None] * len(samples[0]), *real[1]]
    distance, row_of = nearest_clips(training, bucket, sorted(rows), queries, sources)
    own, theirs = distance[: len(samples[0])], distance[len(samples[0]) :]
    if not np.isfinite(theirs).all():
        return None
    threshold = float(np.quantile(theirs, YARDSTICK))
    index = training.index(bucket)
    pairs = [_pair(index, samples[1][place], row_of.item(place), own.item(place)) for place in own.argsort()[:NAMED]]
    return Nearest(
        len(rows),
        estimate_mean(own, samples[2]),
        estimate_mean(theirs, real[1]),
        threshold,
        Proportion(int((own < threshold).sum()), len(own)),
        pairs,
    )


def _pair(index: pa.Table, sample: str, row: int, distance: float) -> Pair:
    key, source, start_s = (index[name][row].as_py() for name in (KEY, "source", "start_s"))
    return Pair(sample, key, source, start_s, distance)
