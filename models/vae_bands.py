"""Decoding large pictures in bands of rows, exactly: no tile has a group norm or an attention of its own, so that there
is no seam.

The decoder's middle, which attends over the whole picture, runs whole: it is as small as the latents. From there on
activations lie in the host's memory, and each convolution and group norm takes them through the device a band of rows
at a time. What needs no weights (SiLU, sums, upsampling) is done on the host.

Shapes: N frames, C channels, G groups, H x W the size at a layer.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.nn import functional


def decode_in_bands(decoder: Decoder, rows: int) -> None:
    """From now on no layer after the decoder's middle sees more than ``rows`` rows, and those beside that its kernel
    needs; its pictures are on the CPU.

    Raises ValueError for a decoder with layers that cannot do so.
    """
    for layer in (*decoder.up_blocks.modules(), decoder.conv_norm_out, decoder.conv_out):
        if isinstance(layer, nn.Conv2d) and layer.stride == layer.dilation == (1, 1):
            layer.forward = partial(_convolved, layer, rows)  # type: ignore[method-assign]
        elif isinstance(layer, nn.GroupNorm):
            layer.forward = partial(_normalised, layer, rows)  # type: ignore[method-assign]
        elif any(True for _ in layer.parameters(recurse=False)):
            raise ValueError(f"the VAE's decoder has a {type(layer).__name__}, which cannot work in bands of rows")
    decoder.mid_block.register_forward_hook(lambda *call: call[-1].cpu())


def _convolved(layer: nn.Conv2d, rows: int, x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C', H', W'], with the rows beside a band that the kernel reaches."""
    above, across = map(int, layer.padding)
    reach, height = layer.kernel_size[0] - 1, x.shape[2]

    def convolved(start: int, end: int) -> Tensor:
        first, last = start - above, end - above + reach
        band = x[:, :, max(first, 0) : last].to(layer.weight.device)
        band = functional.pad(band, (0, 0, max(-first, 0), max(last - height, 0)))
        return functional.conv2d(band, layer.weight, layer.bias, padding=(0, across))

    return _by_bands(convolved, x.new_empty(len(x), layer.out_channels, *x.shape[2:]), rows)


def _normalised(layer: nn.GroupNorm, rows: int, x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, H, W]; mean and variance are those of all rows, put together in float64."""
    device, height = layer.weight.device, x.shape[2]
    mean = square = torch.zeros((), dtype=torch.float64, device=device)
    for start, end in _bands(height, rows):
        values = x[:, :, start:end].to(device).float().unflatten(1, (layer.num_groups, -1)).flatten(2)
        variance, middle = (part.double() for part in torch.var_mean(values, dim=2, correction=0))  # [N, G]
        share = (end - start) / height
        mean, square = mean + share * middle, square + share * (variance + middle**2)
    scale = (square - mean**2 + layer.eps).rsqrt()

    def over(groups: Tensor) -> Tensor:
        return groups.float().repeat_interleave(layer.num_channels // layer.num_groups, dim=1)[:, :, None, None]

    weight, bias = (part.float()[:, None, None] for part in (layer.weight, layer.bias))
    gain, offset = over(scale) * weight, bias - over(mean * scale) * weight

    def normalised(start: int, end: int) -> Tensor:
        return x[:, :, start:end].to(device) * gain + offset

    return _by_bands(normalised, torch.empty_like(x), rows)


def _by_bands(function: Callable[[int, int], Tensor], result: Tensor, rows: int) -> Tensor:
    """``result``, filled by a function of a band's first row and the one after its last."""
    for start, end in _bands(result.shape[2], rows):
        result[:, :, start:end] = function(start, end)
    return result


def _bands(height: int, rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + rows, height)) for start in range(0, height, rows))
