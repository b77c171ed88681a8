"""Clips that are held out of training, and which of them are looked at: to validate, to sample and to evaluate.

The clips are of the same dataset. A share of its sources is held out, by the filters' ``split`` column: a pure
function of the source, so that a run that is resumed, or started from another, holds out the same.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xxhash

from shards.dataset import Dataset
from shards.errors import DatasetError
from shards.loader import DataConfig
from shards.node_tables import Share, own_table
from shards.order import FixedOrder
from shards.schema import CAPTION, KEY, SPLIT, Bucket, index_field
from stages.errors import ConfigError, at_least


@dataclass(frozen=True)
class ValidationConfig:
    """holdout: the share of sources whose clips are kept out of training; 0 holds out nothing and validates nothing.

    samples: how many of the held-out clips are looked at. levels: at how many noise levels, in the middle of as many
    equal bins of 0 to 1. every: steps.

    sample_every: steps from one sampling to the next, and one after the last step; null samples nothing.
    sample_prompts: how many clips' captions are sampled. sample_steps, sample_guidance_scale: how.
    """

    holdout: float = 0.0
    samples: int = 64
    levels: int = 10
    every: int = 1000
    sample_every: int | None = None
    sample_prompts: int = 4
    sample_steps: int = 30
    sample_guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        at_least(self, 1, "samples", "levels", "every", "sample_every", "sample_prompts", "sample_steps")
        at_least(self, 0, "sample_guidance_scale")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout: found {self.holdout}, expected a share from 0 to below 1")


def training_filter(filter: str, config: ValidationConfig) -> str:
    """``data.filter`` and the condition that a clip is not held out."""
    return _joined(filter, f"{SPLIT} >= {config.holdout}") if config.holdout else filter


def _joined(filter: str, condition: str) -> str:
    return f"({filter}) and {condition}" if filter else condition


def open_clips(config: ValidationConfig, data: DataConfig, buckets: Sequence[str], share: Share = own_table) -> Dataset:
    """The dataset of the held-out clips alone, or where nothing is held out, of those that are trained on.

    Raises ConfigError where the share holds no clip.
    """
    columns = list(data.text_columns())
    if not config.holdout:
        return Dataset.open(data.shards, buckets=buckets, text=columns, filter=data.filter, share=share)
    condition = _joined(data.filter, f"{SPLIT} < {config.holdout}")
    try:
        return Dataset.open(data.shards, buckets=buckets, text=columns, filter=condition, share=share)
    except DatasetError as error:
        raise ConfigError(f"validation.holdout is {config.holdout}: {error}") from None


def draw_clips(dataset: Dataset, buckets: Sequence[Bucket], count: int) -> list[tuple[str, int]]:
    """Bucket and row of so many clips, or of all: those with the smallest hashes of their keys, in that order."""
    hashed = (
        (xxhash.xxh3_64_intdigest(key.as_py().encode()), bucket.name, row)
        for bucket in buckets
        for row, key in enumerate(dataset.index(bucket)[KEY])
    )
    return [(bucket, row) for _, bucket, row in heapq.nsmallest(count, hashed)]


def largest_filled(dataset: Dataset) -> Bucket:
    """The largest bucket that has clips."""
    filled = [bucket for bucket in dataset.buckets if dataset.index(bucket).num_rows]
    return max(filled, key=lambda bucket: bucket.height * bucket.width * bucket.frames)


def fixed_order(dataset: Dataset, samples: int, batch_sizes: Mapping[str, int]) -> FixedOrder:
    """The clips that `draw_clips` chooses of all buckets, each once; batch_sizes are by bucket."""
    drawn = draw_clips(dataset, dataset.buckets, samples)
    rows = {bucket.name: [row for name, row in drawn if name == bucket.name] for bucket in dataset.buckets}
    return FixedOrder(rows, batch_sizes)


def noise_levels(count: int) -> list[float]:
    """The middles of ``count`` equal bins of 0 to 1."""
    return [(place + 0.5) / count for place in range(count)]


def caption_of(dataset: Dataset, bucket: Bucket, row: int, column: str) -> str:
    """What a text column says of a clip."""
    index = dataset.index(bucket)
    its_own = index[index_field(column, CAPTION)][row].as_py()
    return index[CAPTION][row].as_py() if its_own is None else its_own
