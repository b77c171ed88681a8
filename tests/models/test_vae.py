"""The frozen VAE against diffusers' own AutoencoderKL, and its promise that a frame's latent is its own."""

import json
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from models.errors import WeightsError
from models.vae import FrozenVAE

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (11, 32, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def odd_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE that shares no number with the usual ones: factor 4, 6 channels, a shift."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("odd") / "vae"
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        latent_channels=6,
        norm_num_groups=2,
        scaling_factor=0.7,
        shift_factor=0.25,
    ).save_pretrained(folder)
    return folder


def test_identity_is_read_from_the_models_own_config(odd_vae: Path):
    assert {k: v for k, v in FrozenVAE.load(str(odd_vae)).identity.items() if k != "weights_hash"} == {
        "class": "AutoencoderKL",
        "latent_channels": 6,
        "spatial_factor": 4,
        "temporal_factor": 1,
        "scaling_factor": 0.7,
        "shift_factor": 0.25,
    }
    tiny = FrozenVAE.load("tiny").identity
    assert (tiny["latent_channels"], tiny["spatial_factor"], tiny["shift_factor"]) == (4, 8, None)
    assert json.loads(json.dumps(tiny)) == tiny


def test_encode_and_decode_agree_with_diffusers(odd_vae: Path):
    vae, reference = FrozenVAE.load(str(odd_vae)), AutoencoderKL.from_pretrained(odd_vae)
    pixels = torch.from_numpy(FRAMES).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = reference.encode(pixels).latent_dist
        pictures = reference.decode(posterior.mean).sample
    mean, std = vae.encode_posterior(FRAMES)
    assert mean.dtype == std.dtype == np.float32 and mean.shape == (11, 6, 8, 12)
    np.testing.assert_allclose(mean, posterior.mean, atol=1e-5)
    np.testing.assert_allclose(std, posterior.std, rtol=1e-4)
    np.testing.assert_array_equal(vae.encode(FRAMES), mean)
    decoded = vae.decode(mean)
    wanted = ((pictures.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert decoded.dtype == np.uint8 and decoded.shape == FRAMES.shape
    assert np.abs(decoded - wanted).max() <= 0.51
    np.testing.assert_array_equal(vae.decode(torch.from_numpy(mean)), decoded)


def test_batches_go_on_from_clip_to_clip_and_give_each_clip_its_own():
    vae = FrozenVAE.load("tiny", batch_frames=4)
    asked: list[int] = []

    def clips():
        for start, end in ((0, 1), (1, 3), (3, 9), (9, 11)):
            asked.append(end)
            yield FRAMES[start:end]

    found = vae.encode_clips(clips())
    first = next(found)
    assert asked == [1, 3, 9]  # no further than the first batch needs
    means, stds = zip(first, *found, strict=True)
    assert [len(mean) for mean in means] == [1, 2, 6, 2]
    mean, std = vae.encode_posterior(FRAMES)
    np.testing.assert_array_equal(np.concatenate(means), mean)
    np.testing.assert_array_equal(np.concatenate(stds), std)


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_a_frames_latent_and_picture_are_bitwise_its_own(name: str, odd_vae: Path):
    vae = FrozenVAE.load("tiny" if name == "tiny" else str(odd_vae), batch_frames=4)
    together = vae.encode(FRAMES)
    pictures = vae.decode(together)
    for count in (1, 3, 4, 9):
        np.testing.assert_array_equal(vae.encode(FRAMES[:count]), together[:count])
        np.testing.assert_array_equal(vae.decode(together[:count]), pictures[:count])
    others = FRAMES.copy()
    others[np.arange(len(FRAMES)) != 5] ^= 0xFF
    np.testing.assert_array_equal(vae.encode(others)[5], together[5])
    order = np.random.default_rng(1).permutation(len(FRAMES))
    np.testing.assert_array_equal(vae.encode(FRAMES[order]), together[order])


def test_other_kernels_give_the_same_latents_but_for_rounding_at_any_number_of_sizes(
    odd_vae: Path, monkeypatch: pytest.MonkeyPatch
):
    """Traced as torch.compile traces it, but run by PyTorch's own kernels: a C++ compiler takes minutes."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    # pytest's monkeypatch would leave the setting deleted.
    with torch._dynamo.config.patch(recompile_limit=1):
        plain = FrozenVAE.load(str(odd_vae), batch_frames=4)
        other = FrozenVAE.load(str(odd_vae), batch_frames=4, channels_last=True, compiled=True)
        for width in (8, 16, 48):
            frames = FRAMES[:, :, :width]
            latents = other.encode(frames)
            np.testing.assert_allclose(latents, plain.encode(frames), atol=1e-5)
            np.testing.assert_array_equal(other.encode(frames[2:3])[0], latents[2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3


def test_every_batch_that_runs_has_the_fixed_shape(odd_vae: Path, monkeypatch: pytest.MonkeyPatch):
    vae, shapes = FrozenVAE.load(str(odd_vae), batch_frames=4), []
    real = AutoencoderKL.encode

    def spying(model: AutoencoderKL, pixels: torch.Tensor, *args, **kwargs):
        shapes.append(tuple(pixels.shape))
        return real(model, pixels, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "encode", spying)
    vae.encode(FRAMES)
    assert shapes == [(4, 3, 32, 48)] * 3


def test_the_tiny_vae_takes_any_picture():
    vae = FrozenVAE.load("tiny")
    noise = RNG.integers(0, 256, (4, 64, 64, 3), np.uint8)
    latents = vae.encode(noise)
    assert np.isfinite(latents).all() and np.abs(latents * vae.identity["scaling_factor"]).max() < 30
    ramp = np.linspace(30, 220, 64).astype(np.uint8)
    ramps = np.stack([np.broadcast_to(r[..., None], (64, 64, 3)) for r in (ramp[None], ramp[:, None])])
    restored = vae.decode(vae.encode(ramps)).astype(float)
    assert np.abs(restored - ramps).mean() < 40
    assert min(np.corrcoef(restored[i].ravel(), ramps[i].ravel())[0, 1] for i in (0, 1)) > 0.5


def test_read_only_frames_are_taken(odd_vae: Path):
    frames = FRAMES.copy()
    frames.setflags(write=False)
    latents = FrozenVAE.load(str(odd_vae)).encode(frames)
    np.testing.assert_array_equal(latents, FrozenVAE.load(str(odd_vae)).encode(FRAMES))


def test_half_precision_gives_float32_latents(odd_vae: Path):
    low, full = (FrozenVAE.load(str(odd_vae), dtype=d).encode(FRAMES) for d in (torch.bfloat16, torch.float32))
    assert low.dtype == np.float32
    np.testing.assert_allclose(low, full, atol=0.1)


def test_wrong_inputs_are_named(odd_vae: Path):
    vae = FrozenVAE.load(str(odd_vae))
    with pytest.raises(ValueError, match="expected uint8"):
        vae.encode(FRAMES.astype(np.float32))
    with pytest.raises(ValueError, match="multiples of 4 pixels"):
        vae.encode(FRAMES[:, :30])
    with pytest.raises(ValueError, match="N > 0"):
        vae.encode(FRAMES[:0])
    with pytest.raises(ValueError, match=r"expected \[N, 6, h, w\]"):
        vae.decode(np.zeros((1, 4, 8, 8), np.float32))


def test_a_model_of_another_class_or_with_missing_weights_is_refused(odd_vae: Path, tmp_path: Path):
    config = json.loads((odd_vae / "config.json").read_text())
    weights = (odd_vae / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderTiny"}))
    with pytest.raises(WeightsError, match="AutoencoderTiny; expected AutoencoderKL"):
        FrozenVAE.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(WeightsError, match="missing"):
        FrozenVAE.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_channels": 5}))
    with pytest.raises(WeightsError, match="could not be loaded"):
        FrozenVAE.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(WeightsError, match="could not be loaded"):
        FrozenVAE.load(str(tmp_path))
