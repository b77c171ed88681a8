"""What a step takes where pictures and clips are mixed, and where a budget of tokens sets the batches."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.flops import count_flops
from models.flow import FlowConfig, RectifiedFlow
from models.latents import LatentStats
from models.objective import ObjectiveConfig
from models.transformer import TransformerConfig
from shards.errors import DatasetError
from shards.loader import DataConfig
from stages.engine import Ranks
from stages.errors import ConfigError
from stages.output import save_settings
from stages.train import describe
from stages.training.batches import micro_batches, settle_batches, states_of
from stages.training.config import StepConfig, TrainConfig, check, settled
from stages.training.loss import LatentLoss
from stages.training.network import build_model, settle_attention
from stages.training.source import open_source
from tests.stages.training.mixed_dataset import COUNTS, VAE, mixed_dataset

# Latents are 8 x 8 and 8 x 16, patches 2 x 2: 16 tokens a frame, and 32.
TOKENS = {"64x64x1": 16, "64x64x8": 128, "64x128x8": 256}
BUDGET = {"64x64x1": 72, "64x64x8": 8, "64x128x8": 4}  # of 1152 tokens, in multiples of 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_dataset(tmp_path_factory.mktemp("mixed") / "shards")


def config(shards: Path, data: dict | None = None, **train) -> TrainConfig:
    train = {"batch_tokens": 1152, "batch_multiple": 4, "steps": 40} | train
    return TrainConfig(
        data=DataConfig(shards=str(shards), **data or {}), model={"preset": "tiny"}, train=StepConfig(**train)
    )


def test_a_budget_of_tokens_gives_pictures_large_batches(shards: Path) -> None:
    source = open_source(config(shards))
    assert source.sample_tokens == TOKENS and source.order.batch_size == BUDGET
    same = open_source(config(shards, batch_tokens=None, batch_size=4))
    assert same.order.batch_size == dict.fromkeys(TOKENS, 4)
    told = describe(config(shards), 1)
    assert "72 of 64x64x1 (1152 tokens)" in told and "8 of 64x64x8 (1024 tokens)" in told


def test_a_dry_run_tells_the_hours_on_a_known_device(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(config(shards))
    network = build_model(settled(config(shards), None), source).config
    flops = sum(
        count_flops(network, len(batch.keys), *batch.latent_shape, int(batch.text_mask.sum())).training
        for batch in source.loader.batches(0, 40)
    )
    assert "is not known" in describe(config(shards), 1)
    monkeypatch.setattr("stages.train.peak_flops_per_s", lambda device: 1e9)
    told = describe(config(shards), 2)
    found = re.search(r"([\d.]+) PFLOP of .*: ([\d.]+) hours on 2 GPUs at 40% of", told)
    assert found, told
    assert float(found[1]) == pytest.approx(flops / 1e15, rel=0.02)
    assert float(found[2]) == pytest.approx(flops / (0.4 * 1e9 * 2) / 3600, rel=0.02)


def test_auto_takes_the_largest_batches_that_fit(shards: Path) -> None:
    auto = settled(config(shards, batch_size="auto", batch_tokens=None), None)
    single = settled(config(shards, batch_tokens=None, batch_size=2), None)
    source = open_source(single)
    model = build_model(single, source)
    wide, states = micro_batches(single, source, model, 2)["64x128x8"].activation_bytes, states_of(single, model, 2)
    found = settle_batches(auto, 2, (states + 3.5 * wide) / 0.9)  # nine tenths of the room are used
    assert open_source(found).order.batch_size == {"64x64x1": 96, "64x64x8": 12, "64x128x8": 6}  # of two ranks
    largest = settle_batches(auto, 1, 1e15)  # no more tokens than the largest bucket has: 19 x 128
    assert open_source(largest).order.batch_size == {"64x64x1": 144, "64x64x8": 18, "64x128x8": 9}
    with pytest.raises(ConfigError, match="(?s)auto, and not one clip fits: .* NOT FIT .* smaller batches"):
        settle_batches(auto, 2, states)


def test_what_auto_was_settled_to_stays_when_the_run_goes_on(shards: Path, tmp_path: Path) -> None:
    auto = replace(config(shards, batch_size="auto", batch_tokens=None), objective=ObjectiveConfig("velocity"))
    before = settle_batches(auto, 2, 1e15)
    before = replace(before, train=replace(before.train, attention="flash"))
    save_settings(tmp_path, before)
    again = settle_batches(settled(auto, tmp_path), 1, 1e9)
    assert again.train == before.train
    with pytest.raises(ConfigError, match="train.batch_multiple: found 2, expected a multiple of 3"):
        settle_batches(settled(auto, tmp_path), 3, 1e9)


def test_a_gpu_takes_the_kernel_that_is_measured_to_be_the_fastest(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    def measured(network: TransformerConfig, *case: object) -> dict[str, float]:
        asked.append(case)
        return {"cudnn": 2e-3, "flash": 1e-3}

    monkeypatch.setattr("stages.training.network.kernel_seconds", measured)
    monkeypatch.setattr("stages.training.network.from_main", lambda value: value)
    auto, gpu = settled(config(shards), None), torch.device("cuda")
    source = open_source(auto)
    network = build_model(auto, source).config
    assert settle_attention(auto, network, source, Ranks(0, 1, gpu)).train.attention == "flash"
    assert asked == [((1, 8, 32), gpu, torch.bfloat16)]  # of the largest bucket: 8 frames of 32 tokens
    assert "flash, the fastest for 64x128x8: cudnn 2.00 ms, flash 1.00 ms" in capsys.readouterr().out
    assert settle_attention(auto, network, source, Ranks(0, 1, torch.device("cpu"))) is auto
    chosen = settled(config(shards, attention="cudnn"), None)
    assert settle_attention(chosen, network, source, Ranks(0, 1, gpu)) is chosen


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(shards: Path) -> None:
    wholes = list(open_source(config(shards)).loader.batches(0, 20))
    assert {len(batch.keys) for batch in wholes} == set(BUDGET.values())
    for world in (2, 4):
        sources = [open_source(config(shards), rank, world) for rank in range(world)]
        for whole, *parts in zip(wholes, *(source.loader.batches(0, 20) for source in sources), strict=True):
            assert [key for part in parts for key in part.keys] == whole.keys
            assert len({(part.mean.shape, part.text.shape) for part in parts}) == 1  # no rank has more to do
            assert np.array_equal(np.concatenate([part.mean for part in parts]), whole.mean)


def test_an_epoch_mixes_pictures_and_clips_and_takes_every_sample_once(shards: Path) -> None:
    order = open_source(config(shards, batch_tokens=None, batch_size=1)).order
    total = sum(map(sum, COUNTS.values()))
    drawn = [order.batch(step) for step in range(total)]
    assert len({(bucket, *rows.tolist()) for bucket, rows, _ in drawn}) == total
    assert order.epoch(total - 1) == 0 and order.epoch(total) == 1
    first = Counter(bucket for bucket, _, _ in drawn[: total // 2])
    assert all(0 < first[bucket] < sum(counts) for bucket, counts in COUNTS.items())


def test_a_bucket_that_the_filter_empties_has_no_batch(shards: Path) -> None:
    source = open_source(config(shards, {"filter": "duration_s < 0.5"}))
    assert source.order.batch_size == {"64x64x1": 72}
    assert next(source.loader.batches(0, 1)).mean.shape == (72, 1, 4, 8, 8)


def test_the_ranks_cut_the_same_sub_clips_of_a_step(shards: Path) -> None:
    cut = config(shards, {"strides": (1, 2), "subclip_frames": (3, 4)})
    stored = {batch.step: batch for batch in open_source(config(shards)).loader.batches(0, 20)}
    wholes = list(open_source(cut).loader.batches(0, 20))
    assert {(batch.frame_stride, batch.mean.shape[1]) for batch in wholes} == {(1, 1), (1, 3), (1, 4), (2, 3), (2, 4)}
    sources = [open_source(cut, rank, 2) for rank in range(2)]
    for whole, *parts in zip(wholes, *(source.loader.batches(0, 20) for source in sources), strict=True):
        assert np.array_equal(np.concatenate([part.mean for part in parts]), whole.mean)
        assert {part.frame_stride for part in parts} == {whole.frame_stride}
        for clip, of in zip(whole.mean, stored[whole.step].mean, strict=True):
            stride, length = whole.frame_stride, (len(clip) - 1) * whole.frame_stride + 1
            windows = [of[start : start + length : stride] for start in range(len(of) - length + 1)]
            assert sum(np.array_equal(clip, window) for window in windows) == 1
    (later,) = open_source(cut).loader.batches(13, 14)
    assert np.array_equal(later.mean, wholes[13].mean)


def test_the_model_is_told_the_time_between_the_frames_that_are_left(shards: Path) -> None:
    source = open_source(config(shards, {"strides": (2,)}))
    told = []

    def model(latents: torch.Tensor, *_: torch.Tensor, frame_interval_s: float, **size: object) -> torch.Tensor:
        told.append((latents.shape[2], frame_interval_s))
        return latents

    loss = LatentLoss(
        RectifiedFlow(FlowConfig()), LatentStats.of(source.vae), source.null_text, frame_interval_s=1 / source.fps,
        caption_dropout=0.1, seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    for batch in source.loader.batches(0, 12):
        loss.training(model, batch, 16)
    assert set(told) == {(1, 1 / 8), (4, 2 / 8)}  # pictures, and clips of 8 frames


def test_latents_of_several_frames_are_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VAE, "temporal_factor", 4)
    shards = mixed_dataset(tmp_path / "shards")
    open_source(config(shards))
    with pytest.raises(DatasetError, match="holds 4 frames in each latent, which cannot be cut"):
        open_source(config(shards, {"strides": (1, 2)}))


@pytest.mark.parametrize(
    ("train", "world", "message"),
    [
        ({"batch_tokens": None}, 1, "batch_size None and train.batch_tokens None, expected one of them"),
        ({"batch_size": 8}, 1, "batch_size 8 and train.batch_tokens 1152, expected one of them"),
        ({}, 3, "train.batch_multiple: found 4, expected a multiple of 3"),
        ({"gradient_accumulation": 4}, 2, "train.batch_multiple: found 4, expected a multiple of 8"),
        ({"batch_tokens": None, "batch_size": 6}, 4, "train.batch_size: found 6, expected a multiple of 4"),
    ],
)
def test_batches_that_cannot_be_are_refused(shards: Path, train: dict, world: int, message: str) -> None:
    check(config(shards, gradient_accumulation=2), 2)
    with pytest.raises(ConfigError) as error:
        check(config(shards, **train), world)
    assert message in str(error.value)
