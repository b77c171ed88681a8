"""Which clips are held out, and their losses on one rank and on two against a plain loop over them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from models.flow import FlowConfig, RectifiedFlow
from models.latents import LatentStats
from shards.dataset import Dataset, compact, create_dataset, ensure_fingerprint, write_null_text
from shards.loader import DataConfig
from shards.schema import LATENTS, MEAN, TEXT, Bucket, Sample, make_key, text_column
from shards.writer import write_shard
from stages.errors import ConfigError
from stages.training.held_out import ValidationConfig, training_filter
from stages.training.loss import LatentLoss, held_out_noise
from stages.training.validate import HeldOut

T5 = text_column("t5")
BUCKETS = {"64x64x2": (2, 4, 3, 3), "64x64x3": (3, 4, 3, 3)}
LEVELS = (0.125, 0.375, 0.625, 0.875)


class Scale(torch.nn.Module):
    """A model whose output depends on everything that it is given, and that knows whether it was called in training."""

    def forward(self, latents, timestep, text, mask, *, frame_interval_s, size):
        assert not self.training and not torch.is_grad_enabled()
        mask = torch.ones(text.shape[:2]) if mask is None else mask
        told = timestep / 1000 + (text * mask[:, :, None]).sum((1, 2)) / mask.sum(1)
        return latents * 0.5 + told[:, None, None, None, None]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """40 sources with one clip in each of two buckets."""
    root = create_dataset(tmp_path / "shards", "test")
    for bucket, shape in BUCKETS.items():
        drawn = {make_key(f"clip-{number}", "test", bucket, number): number for number in range(40)}
        for column in (LATENTS, T5):
            fingerprint = ensure_fingerprint(root, Bucket.parse(bucket), column, {"schema_version": 1})
            samples = [_sample(key, drawn[key], column, shape) for key in sorted(drawn)]
            write_shard(root / bucket / column, 0, samples, (), fingerprint_hash=fingerprint)
    write_null_text(root, T5, np.full((1, 6), 0.5, np.float16))
    compact(root, {})
    return str(root)


def _sample(key: str, number: int, column: str, shape: tuple[int, ...]) -> Sample:
    draw = np.random.default_rng(number)
    if column == T5:
        text = draw.normal(size=(1 + number % 4, 6)).astype(np.float16)
        return Sample(key, {TEXT: text}, {"tokens": len(text), "caption_hash": "00", "caption": None})
    attributes = {"duration_s": 1.0, "caption": "", "source": f"{number}.mp4", "start_s": 0.0, "latent_motion": 0.1}
    attributes |= {"aesthetic": float(number % 10), "umt": None, "matching_score": None, "desirable_filtering": None}
    return Sample(key, {MEAN: draw.normal(size=shape).astype(np.float16)}, attributes)


def _open(shards: str, filter: str) -> dict[str, set[str]]:
    """The sources of each bucket that a filter leaves."""
    dataset = Dataset.open(shards, text=T5, filter=filter)
    return {bucket.name: set(dataset.index(bucket)["source"].to_pylist()) for bucket in dataset.buckets}


def test_a_source_is_trained_on_or_held_out_with_all_its_clips(shards: str) -> None:
    config = ValidationConfig(holdout=0.3)
    trained = _open(shards, training_filter("", config))
    held_out = _open(shards, "split < 0.3")
    assert trained["64x64x2"] == trained["64x64x3"] and held_out["64x64x2"] == held_out["64x64x3"]
    assert not trained["64x64x2"] & held_out["64x64x2"]
    assert trained["64x64x2"] | held_out["64x64x2"] == {f"{number}.mp4" for number in range(40)}
    assert 6 <= len(held_out["64x64x2"]) <= 18
    # The same for ever: a run that goes on must not train on what it validated on.
    numbers = {
        f"{number}.mp4": xxhash.xxh3_64_intdigest(f"split {number}.mp4".encode()) / 2**64 for number in range(40)
    }
    assert held_out["64x64x2"] == {source for source, number in numbers.items() if number < 0.3}


def test_the_users_own_filter_holds_on_both_sides(shards: str) -> None:
    config = ValidationConfig(holdout=0.3)
    either = "aesthetic >= 8 or aesthetic < 1"
    trained = _open(shards, training_filter(either, config))["64x64x2"]
    assert trained and trained == _open(shards, either)["64x64x2"] - _open(shards, "split < 0.3")["64x64x2"]
    assert training_filter(either, ValidationConfig()) == either


def _loss_of() -> LatentLoss:
    return LatentLoss(
        RectifiedFlow(FlowConfig()), LatentStats(0.5, 0.1), torch.full((1, 6), 0.5), frame_interval_s=1 / 8,
        caption_dropout=1.0, seed=0, device=torch.device("cpu"),
    )  # fmt: skip


def _expected(shards: str, filter: str, samples: int) -> dict[str, float]:
    dataset = Dataset.open(shards, text=T5, filter=filter)
    rows = [(key, bucket, row) for bucket in dataset.buckets
            for row, key in enumerate(dataset.index(bucket)["key"].to_pylist())]  # fmt: skip
    rows = sorted(rows, key=lambda entry: xxhash.xxh3_64_intdigest(entry[0].encode()))[:samples]
    assert {bucket.name for _, bucket, _ in rows} == set(BUCKETS)
    losses = np.zeros((len(LEVELS), len(rows)))
    for column, (key, bucket, row) in enumerate(rows):
        latents = dataset.read(bucket, row, LATENTS)[MEAN].astype(np.float64).swapaxes(0, 1)
        text = dataset.read(bucket, row, T5)[TEXT].astype(np.float64)
        for place, level in enumerate(LEVELS):
            data = (latents - 0.1) * 0.5
            noise = held_out_noise([key], level, torch.Size(data.shape))[0].double().numpy()
            output = 0.5 * ((1 - level) * data + level * noise) + level + text.sum() / len(text)
            losses[place, column] = ((output - (noise - data)) ** 2).mean()
    by_level = dict(zip((f"validation_loss/level_{level}" for level in LEVELS), losses.mean(1), strict=True))
    return {"validation_loss": losses.mean(), **by_level}


@pytest.mark.parametrize(("samples", "filter"), [(7, ""), (1000, "aesthetic < 7")])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_losses_are_those_of_a_plain_loop(
    shards: str, samples: int, filter: str, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ValidationConfig(holdout=0.3, samples=samples, levels=4)
    monkeypatch.setattr("stages.training.validate.mean_over_ranks", lambda values: values)
    condition = f"({filter}) and split < 0.3" if filter else "split < 0.3"
    expected = _expected(shards, condition, samples)
    for world in (1, 2):
        model, calls = Scale().train(), []
        model.register_forward_hook(lambda *_: calls[-1].append(1))  # noqa: B023
        found = []
        random_state = torch.get_rng_state()
        for rank in range(world):
            calls.append([])
            sizes = dict.fromkeys(BUCKETS, micro_batch * world)
            held_out = HeldOut.open(config, DataConfig(shards, filter=filter), sizes, rank, world)
            held_out.read()
            found.append(held_out.losses(model, _loss_of()))
            assert list(found[-1]) == list(expected)
        assert torch.equal(torch.get_rng_state(), random_state) and model.training
        assert len({len(made) for made in calls}) == 1, "ZeRO-3 hangs unless all ranks make as many calls"
        for name, value in expected.items():
            assert np.mean([losses[name] for losses in found]) == pytest.approx(value, rel=1e-5)


def test_nothing_held_out_validates_nothing(shards: str) -> None:
    assert HeldOut.open(ValidationConfig(), DataConfig(shards), dict.fromkeys(BUCKETS, 1), 0, 1) is None


def test_a_share_that_holds_no_clip_is_named(shards: str) -> None:
    with pytest.raises(ConfigError, match="validation.holdout is 1e-06: .* none of the 80 samples"):
        HeldOut.open(ValidationConfig(holdout=1e-6), DataConfig(shards), dict.fromkeys(BUCKETS, 1), 0, 1)


@pytest.mark.parametrize("settings", [{"holdout": 1.0}, {"holdout": -0.1}, {"samples": 0}, {"levels": 0}, {"every": 0}])
def test_settings_that_cannot_be(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ValidationConfig(**settings)
