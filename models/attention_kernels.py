"""PyTorch's attention kernels, of which device, number type and shape decide which is the fastest: it is measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from models.layers import Attention
from models.text_lengths import USUAL_TOKENS
from models.transformer import TransformerConfig

AttentionKernel = Literal["flash", "efficient", "cudnn"]

KERNELS: dict[AttentionKernel, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ROUNDS = 10


@contextmanager
def preferring(kernel: AttentionKernel) -> Iterator[None]:
    """Within it PyTorch takes this kernel wherever it can, such as without a mask, and else the first that can."""
    first = KERNELS[kernel]
    others = [other for other in (*KERNELS.values(), SDPBackend.MATH) if other is not first]
    with sdpa_kernel([first, *others], set_priority=True):
        yield


def kernel_seconds(
    config: TransformerConfig, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> dict[AttentionKernel, float]:
    """What the attentions of a spatial and a temporal block take, forward and backward, by the kernels that can attend
    to the video; to the text once without and once with padding, which is attended to by whatever PyTorch then takes.

    shape: samples, frames and tokens a frame. Projections are included, as each kernel likes its inputs laid out.
    """
    samples, frames, tokens = shape
    attention = Attention(config.width, config.num_heads).to(device, dtype)
    spatial = torch.randn(samples * frames, tokens, 1, config.width, device=device, dtype=dtype)
    temporal = torch.randn(samples, frames, tokens, config.width, device=device, dtype=dtype)
    text = torch.randn(samples, USUAL_TOKENS, 1, config.width, device=device, dtype=dtype)
    mask = torch.arange(USUAL_TOKENS, device=device).expand(samples, 1, 1, -1) > 0

    def attend_to_video() -> None:
        for x in (spatial, temporal):
            attention(x, x).sum().backward()

    def attend() -> None:
        attend_to_video()
        for padding in (None, mask):
            attention(temporal.flatten(1, 2)[:, :, None], text, padding).sum().backward()

    seconds: dict[AttentionKernel, float] = {}
    for kernel in get_args(AttentionKernel):
        try:
            with sdpa_kernel(KERNELS[kernel]):
                attend_to_video()
            with preferring(kernel):
                seconds[kernel] = Timer("attend()", globals={"attend": attend}).timeit(ROUNDS).mean
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no such kernel for this device, type or head
            continue
    return seconds
