"""The loss by noise level against a plain loop, paired differences, and pairs that cannot be compared."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.latents import LatentStats
from models.loading import load_transformer
from models.objective import ObjectiveConfig
from shards.dataset import Dataset
from shards.schema import LATENTS, MEAN, TEXT
from stages.errors import ConfigError
from stages.evaluation.config import LossConfig
from stages.evaluation.held_out_loss import comparable, measure_loss
from stages.evaluation.trained import Execution, Trained
from stages.training.loss import held_out_noise
from tests.stages.evaluation.tiny_run import SIZE, T5, vae, write_dataset, write_run

EXECUTION = Execution(torch.device("cpu"), "fp32", 5, "ema")
LEVELS = (0.125, 0.375, 0.625, 0.875)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def run(shards: Path) -> Path:
    return write_run(shards.parent / "run", shards)


@torch.no_grad()
def plain_losses(shards: Path, run: Path, weights: str = "ema") -> dict[str, list[float]]:
    """Of the clips held out of three tenths of the sources, each alone: at each level its loss."""
    dataset = Dataset.open(shards, text=T5, filter="split < 0.3")
    model, stats = load_transformer(run, weights), LatentStats.of(vae())
    losses = {}
    for row, key in enumerate(dataset.index(SIZE)["key"].to_pylist()):
        raw = torch.from_numpy(dataset.read(SIZE, row, LATENTS)[MEAN].astype(np.float32)).transpose(0, 1)[None]
        text = torch.from_numpy(dataset.read(SIZE, row, T5)[TEXT].astype(np.float32))[None]
        data, mask = stats.normalise(raw), torch.ones(1, text.shape[1], dtype=torch.bool)
        losses[key] = []
        for level in LEVELS:
            noise = held_out_noise([key], level, data.shape[1:])
            seen, told = (1 - level) * data + level * noise, torch.tensor([1000 * level])
            output = model(seen, told, text, mask, frame_interval_s=1 / 8, size=(64, 64))
            losses[key].append(float((output - (noise - data)).double().square().mean()))
    assert len(losses) > 6
    return losses


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_the_loss_is_that_of_a_plain_loop(shards: Path, run: Path, weights: str) -> None:
    found = measure_loss(LossConfig(levels=4), Trained.open(str(run)), None, replace(EXECUTION, weights=weights))
    losses = np.array(list(plain_losses(shards, run, weights).values()))
    assert (found.clips, found.levels, found.against, found.difference) == ("held-out", list(LEVELS), None, None)
    assert found.checkpoint.overall.value == pytest.approx(losses.mean(), rel=1e-5)
    assert [level.value for level in found.checkpoint.by_level] == pytest.approx(losses.mean(0), rel=1e-5)
    for estimate in (found.checkpoint.overall, *found.checkpoint.by_level):
        assert (estimate.samples, estimate.groups) == (len(losses), len(losses) // 2)
        low, high = estimate.interval
        assert low < estimate.value < high


def test_two_checkpoints_are_compared_clip_by_clip(shards: Path, run: Path, tmp_path: Path) -> None:
    """The interval of the difference is that of the clips' differences, not of two unrelated losses."""
    other = write_run(tmp_path / "other", shards, seed=1)
    found = measure_loss(LossConfig(levels=4), Trained.open(str(run)), Trained.open(str(other)), EXECUTION)
    assert found.against and found.difference
    ours, theirs = (plain_losses(shards, folder) for folder in (run, other))
    differences = np.array([np.subtract(ours[key], theirs[key]) for key in ours])
    assert found.difference.overall.value == pytest.approx(differences.mean(), rel=1e-4)
    assert [level.value for level in found.difference.by_level] == pytest.approx(differences.mean(0), rel=1e-4)
    of_difference, of_first, of_second = (
        np.ptp(curve.overall.interval) for curve in (found.difference, found.checkpoint, found.against)
    )
    assert of_difference < 0.8 * np.hypot(of_first, of_second)
    itself = measure_loss(LossConfig(levels=2), Trained.open(str(run)), Trained.open(str(run)), EXECUTION)
    assert itself.difference and itself.difference.overall.interval == (0, 0)


def test_the_batch_changes_nothing_but_rounding(run: Path) -> None:
    one, many = (
        measure_loss(LossConfig(9, 2), Trained.open(str(run)), None, replace(EXECUTION, batch_size=size))
        for size in (1, 8)
    )
    assert one.checkpoint.overall.samples == many.checkpoint.overall.samples == 9
    assert one.checkpoint.overall.value == pytest.approx(many.checkpoint.overall.value, rel=1e-5)


def test_a_run_that_held_out_nothing_is_measured_on_what_it_was_trained_on(shards: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", shards, holdout=0)
    found = measure_loss(LossConfig(20, 2), Trained.open(str(run)), None, EXECUTION)
    assert (found.clips, found.checkpoint.overall.samples) == ("training", 20)


def test_of_two_runs_the_clips_are_those_that_neither_was_trained_on(shards: Path, run: Path, tmp_path: Path) -> None:
    other = Trained.open(str(write_run(tmp_path / "other", shards, holdout=0.15)))
    assert comparable(Trained.open(str(run)), other).holdout == 0.15
    assert comparable(other, Trained.open(str(run))).holdout == 0.15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": ObjectiveConfig("epsilon")}, "prediction 'epsilon', not 'velocity'"),
        ({"holdout": 0}, "clips 'training', not 'held-out'"),
        ({"text_encoder": {"weights_hash": "cc", "dim": 6}}, "text_encoder .*cc"),
        ({"vae": {**vae(), "weights_hash": "other"}}, "vae .*other"),
        ({"frame_interval_s": 1 / 4}, "frame_interval_s 0.25, not 0.125"),
        ({"buckets": ("64x64x16",)}, "buckets 64x64x16, not 64x64x8"),
    ],
)
def test_runs_that_do_not_compare_are_named(
    shards: Path, run: Path, tmp_path: Path, settings: dict, message: str
) -> None:
    other = write_run(tmp_path / "other", shards, **settings)
    with pytest.raises(ConfigError, match=f"do not compare: the former has {message}.*Give against="):
        measure_loss(LossConfig(), Trained.open(str(run)), Trained.open(str(other)), EXECUTION)


def test_another_dataset_is_named(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "run", write_dataset(tmp_path / "shards", 4, name="mine"))
    with pytest.raises(ConfigError, match="dataset 'mine', not 'shapes'"):
        comparable(Trained.open(str(run)), Trained.open(str(other)))
