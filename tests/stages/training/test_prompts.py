"""Which captions are sampled while training, and that the samples do not depend on the number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from models.flow import FlowConfig
from models.objective import ObjectiveConfig
from models.presets import preset
from models.transformer import Transformer
from models.weights import CheckpointInfo
from shards.dataset import Dataset, compact, create_dataset, ensure_fingerprint
from shards.loader import DataConfig
from shards.schema import LATENTS, MEAN, TEXT, Bucket, Sample, make_key, text_column
from shards.writer import write_shard
from stages.errors import ConfigError
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Request, denoise
from stages.sampling.sampled_latents import SampledLatents
from stages.training.held_out import ValidationConfig
from stages.training.prompts import Prompts
from tests.stages.training.mixed_dataset import COUNTS, VAE, mixed_dataset

T5 = text_column("t5")
NULL_TEXT = torch.full((1, 6), 0.5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(mixed_dataset(tmp_path_factory.mktemp("mixed")))


def _open(shards: str, filter: str = "", rank: int = 0, world: int = 1, **settings: float) -> Prompts:
    config = ValidationConfig(sample_every=10, sample_steps=3, **settings)
    prompts = Prompts.open(config, DataConfig(shards, filter=filter), list(COUNTS), rank, world)
    assert prompts is not None
    return prompts


def _expected(shards: str, bucket: str, count: int, filter: str = "") -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Texts and latents of a bucket's clips with the smallest hashes."""
    dataset = Dataset.open(shards, text=T5, filter=filter)
    keys = dataset.index(bucket)["key"].to_pylist()
    rows = sorted(range(len(keys)), key=lambda row: xxhash.xxh3_64_intdigest(keys[row].encode()))[:count]
    return [dataset.read(bucket, row, T5)[TEXT] for row in rows], [
        dataset.read(bucket, row, LATENTS)[MEAN] for row in rows
    ]


@pytest.mark.parametrize(
    ("filter", "holdout", "bucket", "condition"),
    [
        ("", 0.0, "64x128x8", ""),
        ("", 0.4, "64x128x8", "split < 0.4"),
        ("duration_s < 0.9", 0.0, "64x64x1", "duration_s < 0.9"),
        ("duration_s < 0.9", 0.2, "64x64x1", "duration_s < 0.9 and split < 0.2"),
    ],
)
def test_the_captions_are_of_the_largest_bucket_that_has_such_clips(
    shards: str, filter: str, holdout: float, bucket: str, condition: str
) -> None:
    prompts = _open(shards, filter, holdout=holdout, sample_prompts=3)
    texts, clips = _expected(shards, bucket, 3, condition)
    assert 0 < len(texts) == len(prompts.texts) == len(prompts.captions)
    for found, text in zip(prompts.texts, texts, strict=True):
        assert np.array_equal(found.numpy(), text)
    assert np.array_equal(prompts.clips, np.stack(clips))
    which = "held-out" if holdout else "training"
    assert str(prompts) == f"samples the captions of {len(texts)} {which} clips of {bucket} every 10 steps"


def test_fewer_clips_than_prompts_are_all_sampled_once(shards: str) -> None:
    assert len(_open(shards, sample_prompts=100).captions) == sum(COUNTS["64x128x8"])


def test_nothing_is_sampled_unless_asked_for(shards: str) -> None:
    assert Prompts.open(ValidationConfig(holdout=0.4), DataConfig(shards), list(COUNTS), 0, 1) is None


def test_a_share_that_holds_no_clip_is_named(shards: str) -> None:
    with pytest.raises(ConfigError, match="validation.holdout is 1e-06"):
        _open(shards, holdout=1e-6)


def test_a_caption_is_that_of_the_first_text_column(tmp_path: Path) -> None:
    """Which a text column has where it differs from the clip's own."""
    root, bucket, key = create_dataset(tmp_path, "captioned"), Bucket(64, 64, 1), make_key("clip", "captioned")
    attributes = {"duration_s": 1.0, "caption": "the clip's own", "source": "1.mp4", "start_s": 0.0}
    attributes |= dict.fromkeys(("aesthetic", "umt", "matching_score", "desirable_filtering")) | {"latent_motion": 0.0}
    columns = {LATENTS: Sample(key, {MEAN: np.zeros((1, 4, 8, 8), np.float16)}, attributes)}
    for name, caption in (("t5", None), ("short", "a short one")):
        text = {"tokens": 2, "caption_hash": "00", "caption": caption}
        columns[text_column(name)] = Sample(key, {TEXT: np.full((2, 6), len(name), np.float16)}, text)
    for column, sample in columns.items():
        fingerprint = ensure_fingerprint(root, bucket, column, {"schema_version": 1})
        write_shard(root / bucket.name / column, 0, [sample], fingerprint_hash=fingerprint)
    compact(root, {})
    config = ValidationConfig(sample_every=1)
    for text, caption, value in (("t5", "the clip's own", 2), ({"short": 0.1, "t5": 0.9}, "a short one", 5)):
        prompts = Prompts.open(config, DataConfig(str(tmp_path), text=text), [bucket.name], 0, 1)
        assert prompts is not None and prompts.captions == [caption] and (prompts.texts[0] == value).all()


@pytest.mark.parametrize("settings", [{"sample_every": 0}, {"sample_prompts": 0}, {"sample_steps": 0}])
def test_settings_that_cannot_be(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ValidationConfig(**settings)


def _model() -> tuple[Transformer, CheckpointInfo]:
    torch.manual_seed(0)
    model = Transformer(preset("tiny", {"num_layers": 1, "text_dim": 6}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    objective = ObjectiveConfig("velocity", flow=FlowConfig((1,), (2.0,)))
    return model, CheckpointInfo(0, model.config, objective, VAE, {}, 1 / 4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_samples_are_the_same_on_any_number_of_ranks(
    shards: str, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, info = _model()
    texts, clips = _expected(shards, "64x128x8", 3)
    channels, frames = clips[0].shape[1], clips[0].shape[0]
    expected = torch.cat([
        denoise(model.eval(), info, [Request(torch.from_numpy(text), NULL_TEXT, seed)],
                (channels, frames, *clips[0].shape[2:]), DenoiseConfig(steps=3, guidance_scale=guidance_scale))
        for seed, text in enumerate(texts)
    ]) / VAE["scaling_factor"]  # fmt: skip
    assert expected.std() > 1 and not torch.allclose(expected[0], expected[1], atol=0.1)

    model.train()
    calls: list[bool] = []
    model.register_forward_hook(lambda *_: calls.append(model.training or torch.is_grad_enabled()))
    random_state = torch.get_rng_state()
    for world in (1, 2, 4):
        sent: list[list[torch.Tensor]] = []
        counts = []
        for rank in reversed(range(world)):
            rounds: list[torch.Tensor] = []

            def stacked(tensor: torch.Tensor) -> torch.Tensor | None:
                rounds.append(tensor)  # noqa: B023
                place = len(rounds) - 1  # noqa: B023
                return torch.stack([tensor, *(other[place] for other in reversed(sent))]) if rank == 0 else None  # noqa: B023

            monkeypatch.setattr("stages.training.prompts.stacked_on_main", stacked)
            calls.clear()
            prompts = _open(shards, "", rank, world, sample_prompts=3, sample_guidance_scale=guidance_scale)
            found = prompts.sample(model, info, NULL_TEXT, 20)
            sent.append(rounds)
            counts.append(len(calls))
            assert calls and not any(calls)
            assert (found is None) == (rank > 0)
        assert len(set(counts)) == 1, "ZeRO-3 hangs unless all ranks make as many calls"
        assert counts[0] == 3 * -(-3 // world)
        assert found is not None and torch.equal(found.latents, expected)
        assert (found.seeds, found.step, found.fps, found.vae) == ([0, 1, 2], 20, 4.0, VAE)
    assert torch.equal(torch.get_rng_state(), random_state) and model.training


def test_a_picture_has_the_colours_of_the_latents_frame_by_frame(shards: str) -> None:
    prompts = _open(shards, sample_prompts=2)
    latents = np.random.default_rng(0).uniform(size=(2, 8, 4, 8, 16))
    picture = prompts.picture(latents, [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
    height, width, times = 8 * 16, 16 * 16, 16  # enlarged to 256 pixels
    for row in range(2):
        for frame in range(8):
            top, left = 4 + 14 + row * (14 + height + 4), 4 + frame * (width + 4)
            shown = picture[top : top + height, left : left + width].reshape(8, times, 16, times, 3)
            assert (shown == shown[:, :1, :, :1]).all()
            expected = (latents[row, frame, :3] * 255).round().transpose(1, 2, 0)
            assert np.array_equal(shown[:, 0, :, 0], expected)


def test_saved_latents_are_read_as_they_were(tmp_path: Path) -> None:
    latents = torch.randn(2, 4, 3, 6, 5).half().float()
    path = tmp_path / "step.safetensors"
    SampledLatents(torch.zeros(1), [], [], 0, {}, 1.0).save(path)
    SampledLatents(latents, ["a ball", "Ein Ball, größer 球"], [3, 4], 500, VAE, 8.0).save(path)
    found = SampledLatents.read(path)
    assert torch.equal(found.latents, latents) and found.latents.dtype == torch.float32
    assert (found.prompts, found.seeds, found.step) == (["a ball", "Ein Ball, größer 球"], [3, 4], 500)
    assert (found.vae, found.fps) == (VAE, 8.0)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size < 2 * latents.numel() + 1000
