"""PyTorch's attention kernels, of which device, number type and shape decide which is the fastest: it is measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from models.layers import Attention
from models.transformer import TransformerConfig

AttentionKernel = Literal["cudnn", "flash", "efficient"]

KERNELS: dict[AttentionKernel, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ROUNDS = 10


@contextmanager
def preferring(kernel: AttentionKernel) -> Iterator[None]:
    """Within it PyTorch takes this kernel wherever it can, such as without a mask, and else one of the others."""
    first = KERNELS[kernel]
    others = [other for other in (*KERNELS.values(), SDPBackend.MATH) if other is not first]
    with sdpa_kernel([first, *others], set_priority=True):
        yield


def kernel_seconds(
    config: TransformerConfig, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> dict[AttentionKernel, float]:
    """What the self-attentions of a spatial and a temporal block take, forward and backward, by the kernels that can.

    shape: samples, frames and tokens a frame. Projections are included, as each kernel likes its inputs laid out.
    """
    samples, frames, tokens = shape
    attention = Attention(config.width, config.num_heads).to(device, dtype)
    spatial = torch.randn(samples * frames, tokens, 1, config.width, device=device, dtype=dtype)
    temporal = torch.randn(samples, frames, tokens, config.width, device=device, dtype=dtype)

    def work() -> None:
        for x in (spatial, temporal):
            attention(x, x).sum().backward()

    seconds: dict[AttentionKernel, float] = {}
    for kernel in get_args(AttentionKernel):
        with sdpa_kernel(KERNELS[kernel]):
            try:
                work()
            except RuntimeError:  # no such kernel for this device, type or head
                continue
            seconds[kernel] = Timer("work()", globals={"work": work}).timeit(ROUNDS).mean
    return seconds
