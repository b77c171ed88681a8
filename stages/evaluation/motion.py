"""Motion, flicker, frozen frames, sharpness and colour drift of a clip, from its pixels.

No number of these is good or bad by itself: each is read beside the same number of real clips.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, pad

LUMA = (0.2126, 0.7152, 0.0722)  # BT.709
WINDOW_PX = 7
COARSEST_PX = 12
ITERATIONS = 4
LEAST_GRADIENT = 1.0
"""Levels of 255 a pixel: a window with less has no flow to speak of."""
PAIRS_AT_ONCE = 16
BLOCK_PX = 8
FROZEN_LEVELS = 1.0

MEASURES = {  # name -> unit
    "motion": "pixels a frame",
    "flicker": "levels of 255",
    "frozen": "share of frames",
    "sharpness": "levels² of 255",
    "colour_drift": "levels of 255",
}


@torch.no_grad()
def measure_clip(frames: np.ndarray, device: torch.device) -> dict[str, float]:
    """Of uint8 [T, H, W, 3], by the names of MEASURES; a clip of fewer than 3 frames has a sharpness alone.

    motion: the mean length of the optical flow from each frame to the next.
    flicker: how far a frame is from the middle of its neighbours, both taken along the flow: the mean of
      |½ (I[t+1](x + f) + I[t-1](x - f)) - I[t](x)|. The warping error of Lai et al. (arXiv:1808.00449, section 4.2)
      made symmetric, so that a steady motion or fade gives 0.
    frozen: the share of frames in which no block of 8 x 8 pixels differs from the frame before by more than one level
      on average.
    sharpness: the variance of the Laplacian (Pech-Pacheco et al., ICPR 2000), its mean over the frames.
    colour_drift: how far the mean colour of the last quarter of the frames is from that of the first.
    """
    pixels = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float()  # [T, 3, H, W]
    grey = (pixels * torch.tensor(LUMA, device=device)[:, None, None]).sum(1, keepdim=True)  # [T, 1, H, W]
    found = {"sharpness": _sharpness(grey)}
    if len(frames) < 3:
        return found
    flow = torch.cat([optical_flow(a, b) for a, b in zip(grey[:-1].split(PAIRS_AT_ONCE), grey[1:].split(PAIRS_AT_ONCE),
                                                         strict=True)])  # fmt: skip
    change = avg_pool2d((pixels[1:] - pixels[:-1]).abs().mean(1, keepdim=True), BLOCK_PX, ceil_mode=True)
    quarter = math.ceil(len(frames) / 4)
    drift = pixels[-quarter:].mean((0, 2, 3)) - pixels[:quarter].mean((0, 2, 3))
    return found | {
        "motion": float(flow.norm(dim=1).mean()),
        "flicker": _flicker(grey, flow),
        "frozen": float((change.amax((1, 2, 3)) <= FROZEN_LEVELS).float().mean()),
        "colour_drift": float(drift.norm()),
    }


def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Where each pixel of the first picture is in the second: [N, 1, H, W] of 0 to 255 -> (x, y) pixels [N, 2, H, W].

    Lucas & Kanade (1981) on a pyramid, as Bouguet (2000) describes it, densely. Where nothing has an edge it is 0.
    """
    pyramid = [(first, second)]
    while min(pyramid[-1][0].shape[2:]) >= 2 * COARSEST_PX:
        pyramid.append((avg_pool2d(pyramid[-1][0], 2), avg_pool2d(pyramid[-1][1], 2)))
    flow = torch.zeros(len(first), 2, *pyramid[-1][0].shape[2:], device=first.device)
    for one, other in reversed(pyramid):
        if flow.shape[2:] != one.shape[2:]:
            flow = 2 * interpolate(flow, size=one.shape[2:], mode="bilinear", align_corners=False)
        flow = _refined(one, other, flow)
    return flow


def _refined(first: Tensor, second: Tensor, flow: Tensor) -> Tensor:
    """Gauss-Newton steps to the flow at which each window of the first picture, moved as a whole, fits the second.

    The pixels of a window were warped by their own flows: what differs from the window's is added to their error, along
    the gradient.
    """
    x, y = _gradients(first)
    damping = LEAST_GRADIENT**2
    xx, xy, yy = _windows(x * x) + damping, _windows(x * y), _windows(y * y) + damping
    determinant = xx * yy - xy * xy
    for _ in range(ITERATIONS):
        along = first - _warped(second, flow) + x * flow[:, :1] + y * flow[:, 1:]
        right, down = _windows(x * along) + damping * flow[:, :1], _windows(y * along) + damping * flow[:, 1:]
        found = torch.cat([yy * right - xy * down, xx * down - xy * right], 1) / determinant
        flow = flow + (found - flow).clamp(-1, 1)  # beyond a pixel the gradients say nothing
    return flow


def _flicker(grey: Tensor, flow: Tensor) -> float:
    """From [T, 1, H, W] and the flow from each frame to the next, [T - 1, 2, H, W]."""
    along = flow[1:]  # from t to t + 1, for each t that has both neighbours
    middle = (_warped(grey[2:], along) + _warped(grey[:-2], -along)) / 2
    return float((middle - grey[1:-1]).abs().mean())


def _sharpness(grey: Tensor) -> float:
    laplacian = (
        grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:] + grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1]
        - 4 * grey[..., 1:-1, 1:-1]
    )  # fmt: skip
    return float(laplacian.var((1, 2, 3)).mean())


def _gradients(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y; the border's are those of its own pixel repeated."""
    wide = pad(picture, (1, 1, 1, 1), mode="replicate")
    return (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2, (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2


def _windows(values: Tensor) -> Tensor:
    """The mean over the window around each pixel."""
    return avg_pool2d(values, WINDOW_PX, stride=1, padding=WINDOW_PX // 2, count_include_pad=False)


def _warped(picture: Tensor, flow: Tensor) -> Tensor:
    """The picture [N, 1, H, W] at x + flow, its border repeated outside."""
    height, width = picture.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij"
    )
    at = torch.stack([(x + flow[:, 0]) * 2 / (width - 1) - 1, (y + flow[:, 1]) * 2 / (height - 1) - 1], -1)
    return grid_sample(picture, at, padding_mode="border", align_corners=True)
