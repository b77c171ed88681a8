"""Samples as files: their names, and the formats that are asked for."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards import storage
from stages.animation import write_animation
from stages.contact_sheet import contact_sheet
from stages.errors import ConfigError
from stages.output import output_folder, progress_bar
from stages.sampling import ranks
from stages.sampling.config import Format, SampleConfig
from stages.sampling.models import Models
from stages.sampling.prompts import slug
from stages.sampling.record import tags
from stages.sampling.sampled_latents import SampledLatents
from stages.video import write_mp4

SHEET_ROWS = 24
LATENTS_FILE = "latents.safetensors"
VBENCH = "vbench"
LONGEST_STEM_BYTES = 213
"""A file system takes names of 255 bytes, and a file that is being written bears a longer one."""


def file_stems(prompts: Sequence[str], names: str) -> list[str]:
    """Each sample's path in the output folder, without its suffix.

    VBench's evaluator (vbench/__init__.py, build_full_info_json) looks for PROMPT-INDEX with the index from 0 to 4,
    and takes the suffix from any file of the folder: there must be nothing but videos in it.
    Raises ConfigError for a prompt that cannot be a file's name.
    """
    if names != VBENCH:
        return [f"{number:04d}-{slug(prompt)}" for number, prompt in enumerate(prompts)]
    stems, seen = [], Counter[str]()
    for prompt in prompts:
        stem = f"{prompt}-{seen[prompt]}"
        if "/" in stem or "\0" in stem or len(stem.encode()) > LONGEST_STEM_BYTES:
            raise ConfigError(
                f"names=vbench: {stem!r} cannot name a file, expected no slash and at most {LONGEST_STEM_BYTES} bytes: "
                "change the prompt, or give names=numbered"
            )
        stems.append(f"{VBENCH}/{stem}")
        seen[prompt] += 1
    return stems


def write_samples(
    output: Path, stems: Sequence[str], samples: SampledLatents, config: SampleConfig, models: Models
) -> list[str]:
    """All formats of all samples and, unless latents are all that is asked for, a contact sheet.

    Each rank makes the files of a share of the samples, rank 0 what is made once.
    Returns of each sample the file that shows it: of the formats the first, as a path in ``output``.
    """
    if "latents" in config.formats and ranks.rank() == 0:
        samples.save(output / LATENTS_FILE)
    shown = [kind for kind in config.formats if kind != "latents"]
    if not shown:
        return [LATENTS_FILE] * len(stems)
    files = [f"{stem}.{shown[0]}" for stem in stems]
    for folder in {(output / stem).parent for stem in stems}:
        output_folder(str(folder))
    vae = models.vae(
        config.pretrained_model_path,
        models.device,
        batch_frames=config.vae_batch_frames,
        band_rows=config.vae_band_rows,
    )
    rows: list[np.ndarray] = []
    mine = range(ranks.rank(), len(stems), ranks.world())
    in_sheet = range(min(SHEET_ROWS, len(stems)) if ranks.rank() == 0 else 0)
    numbers = sorted({*mine, *in_sheet})
    with progress_bar(len(numbers), "decode", "video") as bar:
        for number in numbers:
            frames = vae.decode(samples.latents[number].transpose(0, 1))  # of [C, T, h, w]
            about = tags(config, samples, number)
            for kind in shown if number in mine else []:
                _write(output / f"{stems[number]}.{kind}", kind, frames, config.fps or samples.fps, about)
            rows += [frames] if number in in_sheet else []
            bar.update()
    if not rows:
        return files
    with storage.write_whole(output / "contact_sheet.png") as file:
        contact_sheet(rows, samples.prompts[:SHEET_ROWS]).save(file, "png")
    return files


def _write(path: Path, kind: Format, frames: np.ndarray, fps: float, about: dict[str, str]) -> None:
    if kind == "mp4":
        write_mp4(path, frames, fps, tags=about)
    elif kind in ("gif", "png"):
        write_animation(path, frames, fps, kind)
