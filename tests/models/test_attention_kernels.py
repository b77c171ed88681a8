from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from models.attention_kernels import KERNELS, AttentionKernel, kernel_seconds, preferring
from tests.models.networks import SMALL, assert_close, inputs, random_transformer


def test_the_kernels_of_a_device_are_found_and_timed() -> None:
    """Of these, PyTorch has flash attention alone for CPUs."""
    seconds = kernel_seconds(SMALL, (1, 3, 16), torch.device("cpu"), torch.float32)
    assert list(seconds) == ["flash"] and seconds["flash"] > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_preferred_kernel_comes_first_and_what_it_cannot_do_is_done_by_others(kernel: AttentionKernel) -> None:
    model, given = random_transformer(SMALL), inputs(lengths=(7, 3))
    expected, before = model(*given), _cur_sdpa_kernel_backends(with_priority=True)
    with preferring(kernel):
        order = _cur_sdpa_kernel_backends(with_priority=True)
        assert order[0] is KERNELS[kernel] and SDPBackend.MATH in order
        assert_close(model(*given), expected)
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_several_kernels_that_agree() -> None:
    device = torch.device("cuda")
    config = replace(SMALL, head_dim=72)  # as PixArt's and Latte's
    seconds = kernel_seconds(config, (1, 3, 16), device, torch.bfloat16)
    assert len(seconds) > 1
    model, given = random_transformer(config).to(device), [x.to(device) for x in inputs()]
    exact = model(*given)
    model.to(torch.bfloat16)
    for kernel in seconds:
        with preferring(kernel):
            assert_close(model(*given).float(), exact, share=6e-2)  # of bfloat16 itself, more than half
