"""How much of a clip its latents keep, and whether latents look as their VAE says. Plain numbers, no pictures."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.diffusers_folder import read_json
from models.latents import LatentStats
from models.source import CONFIG_NAME, resolve_model

MOST_DB = 120.0
"""What two equal arrays get; nothing stored as float16 comes near it otherwise."""
LEAST_SNR_DB = 40.0
"""Latents that are this close to the fp32 ones train the same model; a coarser compute type is not used."""
FAR_MEAN, FAR_STD = 1.0, 2.0
"""A channel is far off when its mean lies more than so many expected deviations from the expected mean, or its
deviation is more than so many times, or less than one such part of, the expected one."""


def psnr_db(frames: np.ndarray, source: np.ndarray) -> float:
    """Peak signal to noise ratio of a whole clip: two uint8 arrays [T, H, W, 3] of one shape."""
    pairs = zip(frames, source, strict=True)
    error = float(np.mean([np.square(a.astype(np.float32) - b).mean(dtype=np.float64) for a, b in pairs]))
    return _decibels(255.0**2, error)


def snr_db(found: np.ndarray, reference: np.ndarray) -> float:
    """Power of ``reference`` over the power of its difference from ``found``: two arrays of one shape."""
    exact = reference.astype(np.float64)
    return _decibels(float(np.square(exact).mean()), float(np.square(found - exact).mean()))


def least_and_median(values: Iterable[float | None]) -> dict[str, float] | None:
    """Of those that are known, rounded; None if there are none."""
    known = [value for value in values if value is not None]
    return {"least": round(min(known), 2), "median": round(statistics.median(known), 2)} if known else None


@dataclass(frozen=True)
class Expected:
    """The mean and the deviation of each raw latent channel that a VAE's config states, [C] each."""

    mean: Sequence[float]
    std: Sequence[float]
    stated_by: str


@dataclass(frozen=True)
class Channel:
    """One latent channel of a dataset. ``place`` and ``spread`` are its mean and deviation in expected deviations."""

    mean: float
    std: float
    place: float
    spread: float

    @property
    def far_off(self) -> bool:
        return not (abs(self.place) <= FAR_MEAN and 1 / FAR_STD <= self.spread <= FAR_STD)


class ChannelSums:
    """Adds up latents, one clip at a time, so that any number of them takes the memory of one."""

    def __init__(self) -> None:
        self.clips = 0
        self._values = 0
        self._sums = self._squares = np.zeros(0)

    def add(self, latents: np.ndarray) -> None:
        """latents: [T, C, h, w] of one clip, C always the same."""
        values = latents.astype(np.float64)
        if not self.clips:
            self._sums = self._squares = np.zeros(values.shape[1])
        self.clips += 1
        self._values += values[:, 0].size
        self._sums = self._sums + values.sum(axis=(0, 2, 3))
        self._squares = self._squares + np.square(values).sum(axis=(0, 2, 3))

    def channels(self, expected: Expected) -> list[Channel]:
        """Each channel beside what is expected of it; none before the first clip."""
        if not self.clips:
            return []
        means = self._sums / self._values
        stds = np.sqrt(np.maximum(self._squares / self._values - means**2, 0))
        rows = zip(means.tolist(), stds.tolist(), expected.mean, expected.std, strict=True)
        return [Channel(mean, std, (mean - middle) / width, std / width) for mean, std, middle, width in rows]


def expected_latents(vae: str, identity: Mapping[str, Any]) -> Expected:
    """What a VAE (a name, a folder or a hub id) states of its raw latents. identity: see ``vae_identity``."""
    config = read_json(resolve_model(vae, "vae") / CONFIG_NAME)
    if config.get("latents_mean") and config.get("latents_std"):
        return Expected(config["latents_mean"], config["latents_std"], "latents_mean and latents_std")
    stats, channels = LatentStats.of(identity), identity["latent_channels"]
    stated_by = f"scaling_factor {stats.scaling_factor:g}"
    return Expected([stats.shift_factor] * channels, [1 / stats.scaling_factor] * channels, stated_by)


def _decibels(signal: float, noise: float) -> float:
    if noise <= signal * 10 ** (-MOST_DB / 10):
        return MOST_DB
    return 10 * math.log10(signal / noise) if signal else -MOST_DB
