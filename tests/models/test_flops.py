"""The formula of the model's arithmetic against PyTorch's counter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.flops import count_flops, peak_flops_per_s
from models.presets import preset
from models.transformer import TransformerConfig
from tests.models.networks import SMALL, inputs, random_transformer

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temporal_attention": "full"},
    {"temporal_pos": "rope", "qk_norm": True},
    {"pooled_text": True},
    {"size_conditioning": True},
    {"fps_conditioning": True},
    {"num_layers": 3, "mlp_ratio": 3, "patch_size": 4, "in_channels": 6, "text_dim": 9},
]
SHAPES = [(1, 8, 8), (3, 16, 4), (5, 4, 8)]


def counted(config: TransformerConfig, shape: tuple[int, int, int], lengths: tuple[int, ...]) -> tuple[int, int]:
    """Forward, and forward and backward; attention in plain products, as the counter knows no CPU kernel of it."""
    model, arguments = random_transformer(config), inputs(config, shape=shape, lengths=lengths)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(*arguments, size=(64, 64))
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_the_formula_is_what_pytorch_counts(option: dict[str, Any], shape: tuple[int, int, int]) -> None:
    config = replace(SMALL, **option)
    for lengths in ((5,), (7, 7, 7)):
        found = count_flops(config, len(lengths), *shape, sum(lengths))
        assert (found.forward, found.training) == counted(config, shape, lengths)


def test_padding_is_computed_but_not_counted() -> None:
    found = count_flops(SMALL, 3, *SHAPES[1], 7 + 1 + 4)
    padded = count_flops(SMALL, 3, *SHAPES[1], 3 * 7)
    assert found.training < padded.training
    assert (padded.forward, padded.training) == counted(SMALL, SHAPES[1], (7, 1, 4))


@pytest.mark.parametrize(("frames", "size", "teraflops"), [(16, 32, 8.14), (56, 32, 28.5), (128, 64, 274.8)])
def test_the_published_size(frames: int, size: int, teraflops: float) -> None:
    """XL/2 with 120 text tokens: 2 x 28 x 26 D^2 a token in linear layers, and the attentions."""
    found = count_flops(preset("XL/2"), 1, frames, size, size, 120).forward / 1e12
    assert found == pytest.approx(teraflops, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989.5),
    ],
)
def test_peaks_go_by_the_name_of_the_gpu(name: str, teraflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops_per_s(torch.device("cuda", 0)) == teraflops * 1e12


def test_devices_without_a_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GT 710")
    assert peak_flops_per_s(torch.device("cuda", 0)) is None
    assert peak_flops_per_s(torch.device("cpu")) is None
