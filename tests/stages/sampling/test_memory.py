"""The arithmetic of sampling's memory against PyTorch's own account of it, on tensors without contents."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from models.presets import preset
from models.transformer import Transformer, TransformerConfig
from models.weights import find_checkpoint, read_info
from stages.sampling.config import SampleConfig, TextEncoderConfig
from stages.sampling.memory import decode_numbers, forward_numbers, peak_of
from stages.sampling.sample import describe
from tests.stages.small_run import small_run

XL = preset("XL/2", {"num_layers": 2})
ROWS, FRAMES, SIDE, TEXT = 2, 16, 16, 128


@pytest.mark.parametrize("config", [XL, preset("S/2", {"num_layers": 3, "mlp_ratio": 2})], ids=["XL/2", "another"])
def test_a_forward_takes_what_arithmetic_says(config: TransformerConfig) -> None:
    """Within 2 %: latents and modulations are left out."""
    with FakeTensorMode(), torch.no_grad():
        model = Transformer(config)
        latents, timestep = torch.empty(ROWS, config.in_channels, FRAMES, SIDE, SIDE), torch.ones(ROWS)
        text, mask = torch.empty(ROWS, TEXT, config.text_dim), torch.ones(ROWS, TEXT, dtype=torch.bool)
        found = peak_bytes(model, lambda: model(latents, timestep, model.read_text(text, mask)))
    expected = forward_numbers(config, ROWS, config.tokens(FRAMES, SIDE, SIDE), TEXT)
    assert found == pytest.approx(4 * expected, rel=0.02)


@pytest.mark.parametrize("channels", [(128, 256, 512, 512), (16, 24), (8, 64, 64), (64,)], ids=str)
def test_a_decode_takes_what_arithmetic_says(channels: tuple[int, ...]) -> None:
    with FakeTensorMode(), torch.no_grad():
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
        )
        latents = torch.empty(3, 4, 96, 64)
        found = peak_bytes(vae, lambda: vae.decode(latents).sample)
    assert found == pytest.approx(4 * 3 * decode_numbers(channels, 96, 64), rel=0.02)


def peak_bytes(model: torch.nn.Module, call: Callable[[], Any]) -> int:
    """Of all storages that exist during a call, without the weights."""
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        call()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"] - sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "shape", "peak", "part"),
    [
        ({"batch_size": 1}, (4, 56, 32, 32), 3.07, "transformer 2.11 + 0.96 GB for 2 rows of 14,336 tokens"),
        ({"batch_size": 8}, (4, 56, 32, 32), 9.79, "7.68 GB for 16 rows of 14,336 tokens"),
        ({"batch_size": 1}, (4, 128, 64, 64), 10.61, "8.49 GB for 2 rows of 131,072 tokens"),
        ({"batch_size": 1, "guidance_scale": 1}, (4, 128, 64, 64), 6.36, "4.25 GB for 1 rows"),
        ({"batch_size": 1, "sequence_parallel": 2}, (4, 128, 64, 64), 6.38, "of 65,536 tokens"),
        (
            {"batch_size": 8, "text_encoder": TextEncoderConfig(device="cpu")},
            (4, 56, 32, 32),
            9.79,
            "weights + activations): transf",
        ),
    ],
)
def test_the_largest_of_the_models_is_the_peak(
    settings: dict[str, Any], shape: tuple[int, int, int, int], peak: float, part: str, tmp_path: Path
) -> None:
    """Of XL/2 in bf16, beside a tiny T5 and VAE; these are the numbers of docs/sample.md."""
    info = replace(read_info(find_checkpoint(str(small_run(tmp_path / "run")))), transformer=preset("XL/2", {}))
    told = peak_of(SampleConfig(precision="bf16", **settings), info, shape)
    assert part in told and f"{peak:.2f} GB of the device's memory" in told
    assert ("T5 0.00" in told) == ("text_encoder" not in settings) and "VAE 0.00" in told


def test_a_dry_run_tells_it(tmp_path: Path) -> None:
    told = describe(SampleConfig(text_prompt="a ball", ckpt=str(small_run(tmp_path / "run")), steps=2))
    assert "1 samples in 1 or more batches of 1: latents [4, 4, 8, 8] from" in told.splitlines()[0]
    assert "by arithmetic 0.0" in told.splitlines()[1]
    many = SampleConfig(text_prompt=["a ball"] * 17, ckpt=str(tmp_path / "run"))
    assert "17 samples in 3 or more batches of 8" in describe(many)


def test_a_decode_in_bands_is_bounded_by_the_band_and_the_middle() -> None:
    """By hand, of 1024² pixels: three tensors of the upsampled 256 channels; eight of the middle's 512 on 128²."""
    channels = (128, 256, 512, 512)
    assert decode_numbers(channels, 128, 128) == 3 * 256 * 1024**2
    assert decode_numbers(channels, 128, 128, band_rows=128) == 3 * 256 * 130 * 1024
    assert decode_numbers(channels, 128, 128, band_rows=16) == 8 * 512 * 128**2
