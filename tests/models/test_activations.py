"""What is kept for the backward pass changes memory alone: gradients against plain autograd's, and against Latte's."""

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import saved_bytes
from models import activations, layers
from models.activations import ActivationMemory
from models.transformer import Transformer, TransformerConfig
from tests.models.networks import SMALL, inputs, latte, random_transformer
from tests.models.test_options import EVERYTHING, SIZE

POLICIES = get_args(ActivationMemory)
CONFIGS = {
    "stream": SMALL,
    "everything": EVERYTHING,
    "full and rope": replace(SMALL, temporal_attention="full", temporal_pos="rope"),
}
BFLOAT16 = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def small_tensors_are_forgotten_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SMALLEST_FORGOTTEN_BYTES", 0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model(*inputs(shape=(3, 4, 6)), size=SIZE).double().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture
def everything_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Plain autograd."""
    with monkeypatch.context() as patch:
        patch.setattr(layers, "through", lambda costly, cheap, *sources: costly(cheap(*sources)))
        yield patch


@pytest.mark.parametrize("dtype", BFLOAT16.values(), ids=BFLOAT16)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_policy_changes_a_bit(
    config: TransformerConfig, dtype: torch.dtype, everything_kept: pytest.MonkeyPatch
) -> None:
    expected = gradients(random_transformer(config).to(dtype))
    everything_kept.undo()
    for policy in POLICIES:
        model = random_transformer(config).to(dtype)
        model.activation_memory = policy
        found = gradients(model)
        assert found.keys() == expected.keys() and len(found) > 50
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), (policy, name)


@pytest.mark.parametrize("trained", ["attn2.to_k", "temporal_transformer_blocks.1.ff", "scale_shift_table"])
def test_frozen_weights_change_no_gradient_of_the_others(trained: str, everything_kept: pytest.MonkeyPatch) -> None:
    def some() -> Transformer:
        model = random_transformer()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        return model

    expected = gradients(some())
    everything_kept.undo()
    for policy in POLICIES:
        model = some()
        model.activation_memory = policy
        found = gradients(model)
        assert found.keys() == expected.keys() and found
        assert all(torch.equal(found[name], expected[name]) for name in found), policy


@pytest.mark.parametrize("policy", POLICIES)
def test_an_mlp_in_chunks_gives_the_same_up_to_rounding(policy: ActivationMemory) -> None:
    model, chunked = random_transformer().double(), random_transformer().double()
    chunked.activation_memory = policy
    chunked.chunk_mlp(7)  # of which the last has fewer
    expected, found = gradients(model), gradients(chunked)
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert any(not torch.equal(found[name], expected[name]) for name in found), "nothing was cut into chunks"
    assert all((found[name] - expected[name]).abs().max() <= 1e-13 * scale for name in expected)


def test_small_tensors_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = random_transformer(), inputs(shape=(3, 4, 6))
    without, _ = saved_bytes(model, *given)
    largest = given[0].shape[0] * 3 * 2 * 3 * SMALL.width * 4  # batch, frames, rows and columns of patches
    for bytes_, kept in ((largest, False), (largest + 1, True)):
        monkeypatch.setattr(activations, "SMALLEST_FORGOTTEN_BYTES", bytes_)
        assert (saved_bytes(model, *given)[0] > without) is kept


def test_latte_has_the_same_gradients_and_keeps_more_bytes() -> None:
    """At XL/2's width: the reach is 0.70, by arithmetic it is 27 widths a token and pair of Latte's 44."""
    config = replace(SMALL, num_layers=1, num_heads=16, head_dim=72)
    model, reference = random_transformer(config), latte(config, 4)
    reference.load_state_dict(model.state_dict())
    latents, timestep, text, mask = inputs(config, shape=(4, 8, 8), lengths=(7,))
    kept, outputs = [], []
    for network, arguments in ((model, (text, mask)), (reference, (text,))):
        saved, output = saved_bytes(network, latents, timestep, *arguments)
        output.square().mean().backward()
        kept.append(saved)
        outputs.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert kept[0] <= 0.66 * kept[1]
    for name, gradient in outputs[1].items():
        assert (outputs[0][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name
