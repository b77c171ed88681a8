"""The loss on clips that training never sees, at fixed levels of fixed noise: comparable between steps and runs.

The weights are those being trained; their average is spread over the ranks and is not looked at here.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

import torch

from shards.loader import Batch, DataConfig, Loader
from shards.node_tables import Share, own_table
from shards.order import FixedOrder
from stages.engine import mean_over_ranks
from stages.training.held_out import ValidationConfig, fixed_order, noise_levels, open_clips
from stages.training.loss import LatentLoss


class HeldOut:
    """The held-out clips that are looked at, divided over the ranks."""

    def __init__(self, loader: Loader, order: FixedOrder, levels: int, world: int):
        self.samples = order.samples
        self._loader, self._order, self._world = loader, order, world
        self._batches: list[Batch] = []
        self._levels = noise_levels(levels)

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
        dataset = open_clips(config, data, list(batch_sizes), share)
        order = fixed_order(dataset, config.samples, batch_sizes)
        whole = replace(data, strides=(1,), subclip_frames=())
        return cls(Loader(dataset, whole, order, rank, world), order, config.levels, world)

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
