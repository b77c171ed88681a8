"""The loss by noise level of one checkpoint, or of two on the same clips, levels and noise.

The grid is the trainer's own (`stages.training.held_out`): a sample's noise at a level is the same in every run, so
that losses may be subtracted sample by sample.
"""

from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from models.latents import LatentStats
from models.objective import make_objective
from models.weights import read_null_text
from shards.dataset import Dataset
from shards.loader import Batch, Loader
from shards.schema import KEY
from stages.errors import ConfigError
from stages.evaluation.config import LossConfig
from stages.evaluation.intervals import Estimate, estimate_means
from stages.evaluation.trained import Execution, Trained
from stages.output import progress_bar
from stages.training.held_out import fixed_order, noise_levels
from stages.training.loss import LatentLoss


@dataclass(frozen=True)
class Curve:
    """A loss, or a difference of two: over all levels, and at each."""

    name: str
    overall: Estimate
    by_level: list[Estimate]


@dataclass(frozen=True)
class HeldOutLoss:
    """``clips`` says whether they were "held-out" or "training" ones. difference: the checkpoint's loss minus the
    other's on the same samples, below 0 where the checkpoint is better."""

    clips: str
    prediction: str
    levels: list[float]
    checkpoint: Curve
    against: Curve | None = None
    difference: Curve | None = None


def measure_loss(config: LossConfig, trained: Trained, against: Trained | None, run: Execution) -> HeldOutLoss:
    """The losses, with 95 % intervals over the clips' sources. Raises ConfigError where two cannot be compared."""
    if against:
        trained = comparable(trained, against)
    buckets = [name for name in trained.info.buckets if not against or name in against.info.buckets]
    dataset = trained.open_clips(buckets)
    losses = clip_losses(dataset, trained, trained, config, run)
    groups = sources_of(dataset, losses)
    own, name = np.array(list(losses.values())), str(trained.checkpoint)
    levels = noise_levels(config.levels)
    found = HeldOutLoss(trained.clips, trained.info.prediction, levels, _curve(name, own, groups))
    if not against:
        return found
    by_key = clip_losses(dataset, against, trained, config, run)
    theirs = np.array([by_key[key] for key in losses])
    return replace(
        found,
        against=_curve(str(against.checkpoint), theirs, groups),
        difference=_curve("difference", own - theirs, groups),
    )


def comparable(trained: Trained, against: Trained) -> Trained:
    """The first with the clips that neither was trained on. Raises ConfigError where their losses do not compare."""
    ours, theirs = (
        {
            "prediction": run.info.prediction,
            "min_snr_gamma": run.info.objective.diffusion.min_snr_gamma,
            "vae": run.info.vae,
            "text_encoder": run.info.text_encoder,
            "frame_interval_s": run.info.frame_interval_s,
            "dataset": run.dataset_name,
            "clips": run.clips,
        }
        for run in (trained, against)
    )
    differing = [f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in ours if theirs[name] != ours[name]]
    if not set(trained.info.buckets) & set(against.info.buckets):
        differing.append(f"buckets {', '.join(against.info.buckets)}, not {', '.join(trained.info.buckets)}")
    if differing:
        raise ConfigError(
            f"the losses of {against.checkpoint} and {trained.checkpoint} do not compare: the former has "
            f"{'; '.join(differing)}. Give against= a run of the same objective and dataset"
        )
    return replace(trained, holdout=min(trained.holdout, against.holdout))


def clip_losses(
    dataset: Dataset, model_of: Trained, clips_of: Trained, config: LossConfig, run: Execution
) -> dict[str, list[float]]:
    """By the clip's key, of each level in turn; of ``model_of``'s weights on captions as ``clips_of`` reads them."""
    order = fixed_order(dataset, config.samples, dict.fromkeys(map(str, dataset.buckets), run.batch_size))
    loader = Loader(dataset, clips_of.data, order, rank=0, world=1)
    model = run.load(model_of)
    loss_of = LatentLoss(
        make_objective(model_of.info.objective),
        LatentStats.of(model_of.info.vae),
        read_null_text(model_of.checkpoint),
        frame_interval_s=model_of.info.frame_interval_s,
        caption_dropout=0,
        seed=0,
        device=run.device,
    )
    levels, found = noise_levels(config.levels), dict[str, list[float]]()
    with closing(loader.batches(0, len(order))) as batches, progress_bar(order.samples, "loss", "clip") as bar:
        for batch in batches:
            # What fills up a batch is in it already.
            found |= dict(zip(batch.keys, _of_batch(model, loss_of, batch, levels), strict=True))
            bar.update(len(found) - bar.n)
    return found


@torch.no_grad()
def _of_batch(model: torch.nn.Module, loss_of: LatentLoss, batch: Batch, levels: Sequence[float]) -> list[list[float]]:
    """Of each clip its loss at each level."""
    return torch.stack([loss_of.held_out(model, batch, level).double() for level in levels], 1).tolist()


def _curve(name: str, losses: np.ndarray, groups: Sequence[str]) -> Curve:
    """From [clips, levels]."""
    overall, *by_level = estimate_means(np.column_stack([losses.mean(1), losses]), groups)
    return Curve(name, overall, by_level)


def sources_of(dataset: Dataset, keys: Collection[str]) -> list[str]:
    """Of each clip, by its key, the video that it was cut from."""
    found: dict[str, str] = {}
    for bucket in dataset.buckets:
        chosen = dataset.index(bucket).select([KEY, "source"])
        chosen = chosen.filter(pc.is_in(chosen[KEY], pa.array(list(keys))))
        found |= dict(zip(chosen[KEY].to_pylist(), chosen["source"].to_pylist(), strict=True))
    return [found[key] for key in keys]
