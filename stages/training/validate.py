"""The loss on clips that training never sees, at fixed levels of fixed noise: comparable between steps and runs.

The clips are of the same dataset. A share of its sources is held out, by the filters' ``split`` column: a pure
function of the source, so that a run that is resumed, or started from another, holds out the same. The weights
are those being trained; their average is spread over the ranks and is not looked at here.
"""

import heapq
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
import xxhash

from shards.dataset import Dataset
from shards.errors import DatasetError
from shards.loader import Batch, DataConfig, Loader
from shards.node_tables import Share, own_table
from shards.order import FixedOrder
from shards.schema import KEY, SPLIT, Bucket
from stages.engine import mean_over_ranks
from stages.errors import ConfigError, at_least
from stages.training.loss import LatentLoss


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


def open_held_out_clips(
    config: ValidationConfig, data: DataConfig, buckets: Sequence[str], share: Share = own_table
) -> Dataset:
    """The dataset of the held-out clips alone. Raises ConfigError where the share holds no clip."""
    condition = _joined(data.filter, f"{SPLIT} < {config.holdout}")
    try:
        columns = list(data.text_columns())
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


class HeldOut:
    """The held-out clips that are looked at, divided over the ranks."""

    def __init__(self, loader: Loader, order: FixedOrder, samples: int, levels: int, world: int):
        self.samples = samples
        self._loader, self._order, self._world = loader, order, world
        self._batches: list[Batch] = []
        self._levels = [(place + 0.5) / levels for place in range(levels)]

    @classmethod
    def open(
        cls,
        config: ValidationConfig,
        data: DataConfig,
        batch_sizes: Mapping[str, int],
        rank: int,
        world: int,
        share: Share = own_table,
    ) -> "HeldOut | None":
        """Choose the clips; None where nothing is held out.

        Whole clips, whatever part of them ``data`` trains on. batch_sizes: by bucket, of all ranks together.
        Raises ConfigError where the share holds no clip.
        """
        if not config.holdout:
            return None
        dataset = open_held_out_clips(config, data, list(batch_sizes), share)
        drawn = draw_clips(dataset, dataset.buckets, config.samples)
        rows = {bucket.name: [row for name, row in drawn if name == bucket.name] for bucket in dataset.buckets}
        order = FixedOrder(rows, batch_sizes)
        whole = replace(data, strides=(1,), subclip_frames=())
        return cls(Loader(dataset, whole, order, rank, world), order, len(drawn), config.levels, world)

    def read(self) -> None:
        """Read the clips once, to be kept in memory: what cannot be read is told before the first step."""
        with closing(self._loader.batches(0, len(self._order))) as batches:
            self._batches = list(batches)

    @torch.no_grad()
    def losses(self, model: torch.nn.Module, loss_of: LatentLoss) -> dict[str, float]:
        """``validation_loss``, the mean over the clips as read and levels, and each level's; every rank must call.

        All ranks make the same calls of the model, as ZeRO-3 needs: what fills up a batch is not counted.
        """
        sums = torch.zeros(len(self._levels), dtype=torch.float64)
        model.eval()
        for batch in self._batches:
            counted = torch.from_numpy(batch.positions >= 0)
            for place, level in enumerate(self._levels):
                losses = loss_of.held_out(model, batch, level).double().cpu()
                sums[place] += losses[counted].sum()
        model.train()
        means = mean_over_ranks(sums.to(loss_of.device)) * self._world / self.samples
        by_level = {
            f"validation_loss/level_{level:g}": mean for level, mean in zip(self._levels, means.tolist(), strict=True)
        }
        return {"validation_loss": float(means.mean()), **by_level}
