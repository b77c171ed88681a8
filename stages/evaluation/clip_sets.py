"""Samples and real clips as one thing to measure: frames and latents, one clip at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from models.vae import FrozenVAE
from shards.dataset import Dataset
from shards.schema import KEY, LATENTS, MEAN, Bucket
from stages.evaluation.inputs import read_settings
from stages.sampling.files import LATENTS_FILE
from stages.sampling.sampled_latents import SampledLatents
from stages.training.held_out import caption_of, draw_clips
from stages.video import read_frames


@dataclass(frozen=True, eq=False)
class ClipSet:
    """Clips of one size. read(i) gives frames, uint8 [T, H, W, 3], and latents as the VAE has them, [T, C, h, w].

    sources: clips of one source are alike; of samples, those of one prompt.
    """

    names: Sequence[str]
    captions: Sequence[str]
    sources: Sequence[str]
    read: Callable[[int], tuple[np.ndarray, np.ndarray]]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self.read(place) for place in range(len(self.names)))


def sampled(folder: Path, summary: dict[str, Any], vae: FrozenVAE) -> ClipSet:
    """The samples of a folder, with its summary: decoded from their latents, where it has those, of this VAE.

    Otherwise the frames are those of the videos, and the latents are what the VAE makes of these.
    """
    rows = summary["samples"]
    latents = _latents(folder, rows, vae)

    def read(place: int) -> tuple[np.ndarray, np.ndarray]:
        if latents is None:
            frames = read_frames(folder / rows[place]["file"])
            return frames, vae.encode(frames)
        return vae.decode(latents[place].contiguous()), latents[place].numpy()

    prompts = [row["prompt"] for row in rows]
    return ClipSet([row["file"] for row in rows], prompts, prompts, read)


def real(dataset: Dataset, bucket: Bucket, column: str, count: int, vae: FrozenVAE) -> ClipSet:
    """Clips of the dataset, decoded by the VAE as samples are: what the VAE loses counts for neither."""
    rows = [row for _, row in draw_clips(dataset, [bucket], count)]
    index = dataset.index(bucket)

    def read(place: int) -> tuple[np.ndarray, np.ndarray]:
        latents = dataset.read(bucket, rows[place], LATENTS)[MEAN].astype(np.float32)
        return vae.decode(latents), latents

    names, sources = ([index[name][row].as_py() for row in rows] for name in (KEY, "source"))
    return ClipSet(names, [caption_of(dataset, bucket, row, column) for row in rows], sources, read)


def _latents(folder: Path, rows: Sequence[dict[str, Any]], vae: FrozenVAE) -> torch.Tensor | None:
    """[N, T, C, h, w], of the very samples that are listed; None where the folder has none of this VAE.

    A file that an earlier sampling left there is of other prompts or seeds, or, where it is of other weights alone,
    one that the settings of the last sampling neither wrote nor decoded.
    """
    file = folder / LATENTS_FILE
    settings = yaml.safe_load(read_settings(str(folder)) or "{}")
    wrote, decoded = "latents" in settings.get("formats", []), Path(settings.get("latents", "")).name == file.name
    if not file.is_file() or not (wrote or decoded):
        return None
    saved = SampledLatents.read(file)
    listed = [row["prompt"] for row in rows], [row["seed"] for row in rows]
    theirs = (saved.prompts, saved.seeds) == listed and saved.vae == vae.identity
    return saved.latents.transpose(1, 2) if theirs else None
