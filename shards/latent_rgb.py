"""A linear map from latents to colours: enough to see what latents show where no VAE is at hand.

It is fitted by least squares, rgb ~ [latent, 1] @ map, to the first frame of every clip. A shard keeps the sums of
its normal equations, which add up over shards.
"""

from collections.abc import Iterable

import numpy as np

RGB = 3


class LatentRgbFit:
    """The normal equations of the pixels added so far."""

    def __init__(self) -> None:
        self._sums: np.ndarray | None = None  # [C + 1, C + 1 + 3] float64

    def add(self, latents: np.ndarray, frame: np.ndarray) -> None:
        """One frame: its latents [C, h, w], and its picture [H, W, 3] uint8, H and W the same multiple of h and w."""
        channels, height, width = latents.shape
        factor = len(frame) // height
        colours = frame.reshape(height, factor, width, factor, RGB).mean(axis=(1, 3), dtype=np.float64) / 255
        inputs = np.concatenate(
            [latents.reshape(channels, -1).T, np.ones((height * width, 1))], axis=1, dtype=np.float64
        )
        sums = inputs.T @ np.concatenate([inputs, colours.reshape(-1, RGB)], axis=1)
        self._sums = sums if self._sums is None else self._sums + sums

    def sums(self) -> list[list[float]]:
        """[C + 1][C + 1 + 3]; empty if nothing was added."""
        return [] if self._sums is None else self._sums.tolist()


def solve(sums: Iterable[list[list[float]]]) -> list[list[float]]:
    """The map, [C + 1][3] with the constant last, from the sums of all shards; empty if none has any."""
    added = [np.array(one) for one in sums if one]
    if not added:
        return []
    total = np.sum(added, axis=0)
    size = len(total)
    return np.linalg.lstsq(total[:, :size], total[:, size:], rcond=None)[0].tolist()


def to_rgb(latents: np.ndarray, rgb_map: list[list[float]]) -> np.ndarray:
    """What latents show: [..., C, h, w] -> uint8 [..., h, w, 3]."""
    weights = np.asarray(rgb_map)
    colours = np.moveaxis(np.asarray(latents, np.float64), -3, -1) @ weights[:-1] + weights[-1]
    return (colours.clip(0, 1) * 255).round().astype(np.uint8)
