"""Compiled blocks: the same results, one compilation for all blocks of a kind, whatever the bucket."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models.transformer import Transformer
from tests.models.networks import SMALL, assert_close, inputs, random_transformer

# PyTorch's compiler hides this warning about a look of its own, but cannot where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

DEEP = replace(SMALL, num_layers=4, temporal_pos="branch")
# Frames, height and width of latents, and the lengths of captions: of three buckets.
BUCKETS = [((3, 8, 8), (5, 3)), ((5, 4, 12), (7, 6)), ((4, 12, 8), (3, 9))]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model: Transformer, bucket: tuple) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients."""
    shape, lengths = bucket
    model.zero_grad()
    output = model(*inputs(shape=shape, lengths=lengths))
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_of_a_kind_share_one_compilation_over_all_buckets(checkpointing: bool) -> None:
    plain, model, compilations = (
        random_transformer(DEEP),
        random_transformer(DEEP),
        CompileCounterWithBackend("aot_eager"),
    )
    model.activation_checkpointing = checkpointing
    model.compile_blocks(compilations)
    counts = []
    for bucket in BUCKETS:
        found, expected = step(model, bucket), step(plain, bucket)
        assert_close(found[0], expected[0], share=1e-5)
        assert found[1].keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            scale = gradient.abs().max()
            assert (found[1][name] - gradient).abs().max() <= 1e-4 * scale + 1e-6, name
        counts.append(compilations.frame_count)
    assert counts == [counts[0]] * len(BUCKETS) and counts[0] <= 3  # of 8 blocks


def test_parameters_keep_their_names() -> None:
    model = Transformer(SMALL)
    names = list(model.state_dict())
    model.compile_blocks()
    assert list(model.state_dict()) == names
