"""Decoding in bands of rows against the same decode at once."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode

from models.vae import FrozenVAE
from models.vae_bands import decode_in_bands

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Three levels of different widths, every parameter drawn: norms with a gain and an offset too."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 24),
        layers_per_block=1,
        norm_num_groups=4,
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 5, 8, 1000])
def test_pictures_in_bands_are_those_at_once(rows: int, vae: AutoencoderKL) -> None:
    latents = 3 * torch.randn(2, 4, 6, 5)
    expected = vae.decode(latents).sample
    banded = deepcopy(vae)
    decode_in_bands(banded.decoder, rows)
    assert expected.std() > 0.1
    torch.testing.assert_close(banded.decode(latents).sample, expected, rtol=0, atol=1e-5)


def test_the_tiny_vae_decodes_the_same_pixels_in_bands() -> None:
    whole, banded = FrozenVAE.load("tiny", batch_frames=2), FrozenVAE.load("tiny", batch_frames=2, band_rows=7)
    latents = whole.encode(RNG.integers(0, 256, (3, 32, 48, 3), np.uint8))
    expected = whole.decode(latents).astype(int)
    assert expected.std() > 10
    assert np.abs(banded.decode(latents) - expected).max() <= 1
    np.testing.assert_array_equal(banded.encode(expected.astype(np.uint8)), whole.encode(expected.astype(np.uint8)))


class Heights(TorchDispatchMode):
    """The rows that convolutions see, and the kinds of norms that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.norms = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.rows.append(args[0].shape[2])
        self.norms += function is torch.ops.aten.native_group_norm.default
        return function(*args, **kwargs or {})


def test_no_layer_sees_more_rows_than_asked(vae: AutoencoderKL) -> None:
    """But for the middle, which is as small as the latents: 3 rows here, of 12."""
    banded = deepcopy(vae)
    decode_in_bands(banded.decoder, 4)
    with Heights() as whole:
        vae.decode(torch.randn(1, 4, 3, 5))
    with Heights() as seen:
        banded.decode(torch.randn(1, 4, 3, 5))
    assert max(whole.rows) == 12 and max(seen.rows) == 4 + 2
    assert seen.norms == 5 < whole.norms  # the middle's alone


def test_a_layer_that_cannot_is_refused(vae: AutoencoderKL) -> None:
    other = deepcopy(vae)
    other.decoder.conv_out = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has a Linear, which cannot work in bands"):
        decode_in_bands(other.decoder, 4)
