"""Which ``vae.batch_frames`` is the fastest here. It only tells: the number is part of a dataset's fingerprint."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from models.compute import default_device
from models.vae import FrozenVAE
from stages.encode_config import EncodeConfig
from stages.latent_worker import load_vae
from stages.planning.plan import bucket_sizes
from stages.timing import timed

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = 2.0  # for each of them


@dataclass(frozen=True)
class Speed:
    """Of the VAE's encoder with one size of batch. peak_gb: of the GPU's memory, None on a CPU."""

    batch_frames: int
    frames_per_s: float
    peak_gb: float | None


def tune(config: EncodeConfig) -> str:
    """The speeds as a table, and which is the best."""
    speeds = list(measure(config))
    how = f"{config.vae.compute} on this machine's {default_device().type}"
    lines = [f"{'batch_frames':>12}  {'frames/s':>8}  {'peak GB':>7}   {how}"]
    for speed in speeds:
        peak = "" if speed.peak_gb is None else f"{speed.peak_gb:.1f}"
        lines.append(f"{speed.batch_frames:>12}  {speed.frames_per_s:>8.1f}  {peak:>7}")
    best = max(speeds, key=lambda speed: speed.frames_per_s)
    return "\n".join([*lines, f"for a new dataset: vae.batch_frames={best.batch_frames}"])


def measure(config: EncodeConfig) -> Iterator[Speed]:
    """The encoder's speed at the largest frames that are asked for, batch by batch until memory is full.

    Precision, layout and compilation are those of the settings.
    """
    torch.set_num_threads(config.runtime.threads)
    height, width = max(bucket_sizes(config.clip), key=np.prod)
    frames = np.random.default_rng(0).integers(0, 256, (BATCHES[-1], height, width, 3), np.uint8)
    for batch_frames in BATCHES:
        vae = load_vae(replace(config.vae, batch_frames=batch_frames))
        try:
            yield _measure(vae, frames[:batch_frames])
        except torch.OutOfMemoryError:
            return


def _measure(vae: FrozenVAE, batch: np.ndarray) -> Speed:
    cuda = default_device().type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, _ = timed(lambda: vae.encode(batch), SECONDS)
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return Speed(vae.batch_frames, len(batch) / seconds, peak_gb)
