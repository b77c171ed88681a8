"""Compiled blocks: the same results, one compilation for all blocks of a kind, whatever the bucket."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models.activations import ActivationMemory
from models.transformer import Transformer
from tests.models.networks import SMALL, assert_close, inputs, random_transformer

# PyTorch's compiler hides this warning about a look of its own, but cannot where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

BRANCH = replace(SMALL, temporal_pos="branch")
# Frames, height and width of latents, and the lengths of captions: of three buckets.
BUCKETS = [((3, 8, 8), (5, 3)), ((5, 4, 12), (7, 6)), ((4, 12, 8), (3, 9))]
MEMORIES: tuple[ActivationMemory, ...] = ("none", "block", "pair")


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Traced as torch.compile traces it, but run by PyTorch's own kernels: a C++ compiler takes minutes."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # restored afterwards
        yield counter
    torch._dynamo.reset()


def step(model: Transformer, bucket: tuple) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients."""
    shape, lengths = bucket
    model.zero_grad()
    output = model(*(x.to(model.scale_shift_table.device) for x in inputs(shape=shape, lengths=lengths)))
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: Transformer, plain: Transformer, bucket: tuple) -> None:
    found, expected = step(model, bucket), step(plain, bucket)
    assert_close(found[0], expected[0], share=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max()
        assert (found[1][name] - gradient).abs().max() <= 1e-4 * scale + 1e-6, name


def test_blocks_of_a_kind_share_one_compilation_over_all_buckets_and_memories(
    compilations: CompileCounterWithBackend,
) -> None:
    plain, model = random_transformer(BRANCH), random_transformer(BRANCH)
    model.compile_blocks(any_size=True)
    counts = []
    for memory, bucket in product(MEMORIES, BUCKETS):
        model.activation_memory = memory
        assert_same_step(model, plain, bucket)
        counts.append(compilations.frame_count)
    # Of four blocks, one of each kind; the first one twice, as the compiler first takes NORM_EPS for a number that may
    # change, and begins anew when it finds that a norm's cannot.
    assert counts == [counts[0]] * len(counts) and counts[0] <= 3


def test_parameters_keep_their_names(compilations: CompileCounterWithBackend) -> None:
    model = Transformer(SMALL)
    names = list(model.state_dict())
    model.compile_blocks(any_size=True)
    assert list(model.state_dict()) == names


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:TensorFloat32")  # the compiler's own
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_compiler_s_own_kernels_give_the_same_on_a_gpu(memory: ActivationMemory) -> None:
    torch._dynamo.reset()
    plain, model = (random_transformer(BRANCH).to("cuda") for _ in range(2))
    model.compile_blocks(any_size=True)
    model.activation_memory = memory
    for bucket in BUCKETS:
        assert_same_step(model, plain, bucket)
