"""Pictures and clips in one training, some with frames given, in batches of about as many tokens; and a rank whose data
is damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from models.latents import LatentStats
from models.loading import load_transformer
from models.objective import ObjectiveConfig, make_objective
from pipelines.config import load_config
from shards.dataset import Dataset
from shards.loader import Loader
from shards.schema import LATENTS
from stages.training.config import TrainConfig
from stages.training.loss import LatentLoss, draw_given
from stages.training.source import open_source
from tests.resident import ResidentRanks
from tests.running import TRAIN, deepspeed, run
from tests.stages.training.mixed_dataset import mixed_dataset

STEPS = 6


def settings(shards: Path, folder: Path) -> list[str]:
    return [
        f"data.shards={shards}", f"output={folder}", f"train.steps={STEPS}", "train.save_every=3", "train.log_every=1",
        "train.log_sample_ids=true", "train.batch_tokens=1152", "train.batch_multiple=4",
        "train.gradient_accumulation=2", "train.precision=fp32", "model={preset: tiny, num_layers: 1}",
        "optimizer.lr=0.003", "optimizer.warmup_steps=1", "conditioning={first: 0.3, loop: 0.4}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def mixed(resident_ranks: ResidentRanks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset, and the run of two ranks over it."""
    folder = tmp_path_factory.mktemp("mixed")
    shards = mixed_dataset(folder / "shards")
    resident_ranks.run(2, TRAIN, *settings(shards, folder / "run"))
    return shards, folder / "run"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_pictures_and_clips_train_together_and_go_on_with_another_number_of_ranks(
    mixed: tuple[Path, Path], resident_ranks: ResidentRanks, tmp_path: Path
) -> None:
    shards, whole = mixed
    lines = metrics(whole)
    sizes = [len(line["sample_ids"]) for line in lines]
    assert set(sizes) == {72, 8, 4}  # of pictures, clips and wide clips
    assert json.loads((whole / "summary.json").read_text())["samples_seen"] == sum(sizes)
    stopped = tmp_path / "run"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / f"step-{STEPS:07d}")
    told = resident_ranks.run(1, TRAIN, *settings(shards, stopped), "train.gradient_accumulation=1").stdout
    assert "continues at step 3" in told and "72 of 64x64x1 (1152 tokens)" in told
    again = metrics(stopped)
    assert [line["sample_ids"] for line in again] == [line["sample_ids"] for line in lines]
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in lines], rel=1e-5)
    assert json.loads((stopped / "summary.json").read_text())["samples_seen"] == sum(sizes)


def test_the_loss_of_a_step_is_that_of_the_frames_asked_for(mixed: tuple[Path, Path]) -> None:
    shards, whole = mixed
    config = load_config(TrainConfig, None, settings(shards, whole))
    source, model = open_source(config), load_transformer(whole / "checkpoints" / "step-0000003", "model")
    (batch,) = source.loader.batches(3, 4)
    given = draw_given(config.conditioning, config.seed, batch.positions, frames=8)
    assert given.any() and not given.any(1).all()
    loss_of = LatentLoss(
        make_objective(ObjectiveConfig("velocity")), LatentStats.of(source.vae), source.null_text,
        frame_interval_s=1 / 8, caption_dropout=config.train.caption_dropout, seed=config.seed,
        device=torch.device("cpu"), conditioning=config.conditioning,
    )  # fmt: skip
    loss = loss_of.training(model, batch, source.sample_tokens[batch.bucket.name])
    assert metrics(whole)[3]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_other_batches_or_masks_are_another_run(mixed: tuple[Path, Path], resident_ranks: ResidentRanks) -> None:
    shards, whole = mixed
    other = ["train.batch_tokens=2304", "conditioning.loop=0", "conditioning.first=0.5"]
    done = resident_ranks.run(1, TRAIN, *settings(shards, whole), *other, status=2)
    told = "batch_sizes.64x128x8 was 4, is 8; batch_sizes.64x64x1 was 72, is 144; batch_sizes.64x64x8 was 8, is 16"
    assert f"belongs to another run ({told}; conditioning was " in done.stderr


def test_no_rank_waits_for_one_that_cannot_read(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    shards = shutil.copytree(mixed[0], tmp_path / "shards")
    config = load_config(TrainConfig, None, settings(shards, tmp_path / "run"))
    first, second = (open_source(config, rank, 2).loader for rank in range(2))
    bucket, key = next(drawn for drawn in drawn_by(second) if drawn not in drawn_by(first))
    row = next(row for row in Dataset.open(shards).index(bucket).to_pylist() if row["key"] == key)
    tar = sorted((shards / bucket / LATENTS).glob("*.tar"))[row["shard"]]
    with tar.open("r+b") as file:
        file.seek(row["latents.offset"] + 700)
        file.write(b"\xff\xff")
    done = run(*deepspeed(2), *settings(shards, tmp_path / "run"), status=1)
    assert f"failed: {tar}: the record of {key}" in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob(f"step-{STEPS:07d}"))


def drawn_by(loader: Loader) -> list[tuple[str, str]]:
    return [(batch.bucket.name, key) for batch in loader.batches(0, STEPS) for key in batch.keys]
