"""The embedded models: what they must keep of captions and pictures, and that the script makes them again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import T5EncoderModel

from models.source import TINY_FOLDER, tokenizer_hash, weights_hash
from models.text import TextEncoder
from models.vae import FrozenVAE
from stages import make_tiny
from stages.shapes.render import caption, combinations, held_out


@pytest.mark.parametrize("attribute", ["colour", "shape", "direction"])
def test_a_linear_map_fitted_on_seen_captions_reads_the_held_out_ones(attribute: str):
    """From the mean over tokens of the tiny T5's output; least squares onto one column a name."""
    everything, unseen = combinations(), set(held_out())
    embeddings = TextEncoder.load("tiny").encode([caption(c) for c in everything])
    means = np.stack([embedding.astype(np.float64).mean(axis=0) for embedding in embeddings])
    inputs = np.hstack([means, np.ones((len(means), 1))])
    names = np.array([getattr(c, attribute) for c in everything])
    columns = np.unique(names)
    fitted = np.array([c not in unseen for c in everything])
    weights = np.linalg.lstsq(inputs[fitted], (names[fitted, None] == columns).astype(float), rcond=None)[0]
    scores = inputs[~fitted] @ weights
    assert len(scores) == 15
    np.testing.assert_array_equal(columns[scores.argmax(axis=1)], names[~fitted])
    runner_up, best = np.sort(scores, axis=1)[:, -2:].T
    assert (best - runner_up).min() > 0.3


def test_the_latents_of_shapes_have_zero_mean_and_unit_scale_in_every_channel():
    vae = FrozenVAE.load("tiny")
    pictures = make_tiny.shape_pictures(128, 64, np.random.default_rng(9))
    latents = vae.encode(pictures) * vae.identity["scaling_factor"]
    np.testing.assert_allclose(latents.mean(axis=(0, 2, 3)), 0, atol=0.15)
    np.testing.assert_allclose(latents.std(axis=(0, 2, 3)), 1, atol=0.15)


def test_the_tiny_vae_restores_shapes():
    vae = FrozenVAE.load("tiny")
    pictures = make_tiny.shape_pictures(32, 64, np.random.default_rng(9))
    error = np.square(vae.decode(vae.encode(pictures)).astype(float) - pictures).mean()
    assert 10 * np.log10(255**2 / error) > 27  # dB


def test_evening_out_changes_the_latents_and_not_the_pictures():
    torch.manual_seed(3)
    vae = make_tiny.new_vae()
    pictures = make_tiny.shape_pictures(16, 32, np.random.default_rng(0))
    inputs = make_tiny.as_input(pictures)
    with torch.no_grad():
        before = vae.encode(inputs).latent_dist
        wanted = vae.decode(before.mean).sample
        make_tiny.even_out(vae, pictures)
        after = vae.encode(inputs).latent_dist
        restored = vae.decode(after.mean).sample
    torch.testing.assert_close(restored, wanted, atol=1e-4, rtol=1e-4)
    scaled = after.mean * vae.config.scaling_factor
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    stretch = after.mean.std((0, 2, 3)) / before.mean.std((0, 2, 3))
    torch.testing.assert_close(after.std / before.std, stretch[None, :, None, None].expand_as(after.std))


def test_the_script_makes_the_same_files_each_time(tmp_path: Path):
    for name in ("one", "two"):
        make_tiny.make_tokenizer(tmp_path / name / "tokenizer")
        make_tiny.make_text_encoder(tmp_path / name / "text_encoder", make_tiny.PIECES)
        make_tiny.make_vae(tmp_path / name / "vae", steps=3)
    one, two = tmp_path / "one", tmp_path / "two"
    assert tokenizer_hash(one / "tokenizer") == tokenizer_hash(two / "tokenizer")
    for part in ("text_encoder", "vae"):
        assert weights_hash(one / part) == weights_hash(two / part)


def test_the_shipped_models_are_of_the_shape_that_the_script_makes(tmp_path: Path):
    make_tiny.make_text_encoder(tmp_path, make_tiny.PIECES)
    for made, shipped in (
        (T5EncoderModel.from_pretrained(tmp_path), T5EncoderModel.from_pretrained(TINY_FOLDER / "text_encoder")),
        (make_tiny.new_vae(), AutoencoderKL.from_pretrained(TINY_FOLDER / "vae", low_cpu_mem_usage=False)),
    ):
        assert {k: v.shape for k, v in made.state_dict().items()} == {
            k: v.shape for k, v in shipped.state_dict().items()
        }


def test_training_lessens_the_error():
    torch.manual_seed(0)
    vae = make_tiny.new_vae()
    inputs = make_tiny.as_input(make_tiny.shape_pictures(16, 32, np.random.default_rng(1)))

    def error() -> float:
        with torch.no_grad():
            mean = vae.encode(inputs).latent_dist.mean
            return make_tiny.picture_error(vae.decode(mean).sample, inputs).mean().item()

    before = error()
    make_tiny.train_vae(vae, steps=12)
    assert error() < 0.8 * before
