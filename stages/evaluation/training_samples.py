"""Samples over the time of a training, side by side: what a run left in its ``samples`` folder, made videos of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from models.identity import vae_identity
from models.vae import FrozenVAE
from shards.latent_rgb import to_rgb
from stages.output import SAMPLES
from stages.page import mp4_uri
from stages.sampling.sampled_latents import SampledLatents

MOST_STEPS = 6
MOST_PROMPTS = 4
LONGER_SIDE_PX = 160
"""Of a video on the page: so many small ones stay below a few MB."""


@dataclass(frozen=True)
class SampleRow:
    """One prompt and seed. ``videos`` are data URIs, by step; a step at which it was not sampled is absent."""

    prompt: str
    seed: int
    videos: Mapping[int, str]


@dataclass(frozen=True)
class TrainingSamples:
    """steps: those shown, ascending. left_out: how many more there are. decoded: by the VAE, or a linear map."""

    steps: list[int]
    rows: list[SampleRow]
    left_out: int
    decoded: bool
    width: int
    height: int


def read_training_samples(run: str, pretrained_model_path: str, rgb_map: list[list[float]]) -> TrainingSamples | None:
    """The first and the last samples of a run and some between them; None where it left none that can be shown.

    They are decoded by the VAE at ``pretrained_model_path`` where it is theirs; otherwise shown as the dataset's map
    from latents to colours sees them, if it has one. Raises ConfigError for a file that holds no samples.
    """
    files = sorted((Path(run) / SAMPLES).glob("step-*.safetensors"))
    if not files:
        return None
    picked = [files[place] for place in evenly(len(files), MOST_STEPS)]
    samples = [SampledLatents.read(file) for file in picked]
    decoded = all(vae_identity(pretrained_model_path) == one.vae for one in samples)
    if not decoded and not rgb_map:
        return None
    vae = FrozenVAE.load(pretrained_model_path) if decoded else None
    videos: dict[tuple[str, int], dict[int, str]] = {}
    for one in samples:
        for prompt, seed, latents in list(zip(one.prompts, one.seeds, one.latents, strict=True))[:MOST_PROMPTS]:
            clip = latents.transpose(0, 1)  # [T, C, h, w]
            frames = vae.decode(clip) if vae else to_rgb(clip.numpy(), rgb_map)
            shown = resized(frames, smooth=decoded)
            videos.setdefault((prompt, seed), {})[one.step] = mp4_uri(shown, one.fps)
    rows = [SampleRow(prompt, seed, by_step) for (prompt, seed), by_step in videos.items()]
    height, width = shown.shape[1:3]
    return TrainingSamples([one.step for one in samples], rows, len(files) - len(picked), decoded, width, height)


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the places 0 to count - 1, the first and the last among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def resized(frames: np.ndarray, *, smooth: bool) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] whose longer side is about LONGER_SIDE_PX, and even; few pixels stay crisp."""
    height, width = frames.shape[1:3]
    scale = LONGER_SIDE_PX / max(height, width)
    size = (2 * round(width * scale / 2), 2 * round(height * scale / 2))
    how = Image.Resampling.LANCZOS if smooth and scale < 1 else Image.Resampling.NEAREST
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, how)) for frame in frames])
