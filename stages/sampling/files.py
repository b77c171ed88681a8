"""Samples as files: their names, and the formats that are asked for."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards import storage
from shards.schema import Bucket
from stages.animation import write_animation
from stages.contact_sheet import COLUMNS, contact_sheet, picked
from stages.errors import ConfigError
from stages.launched import rank, world
from stages.output import SUMMARY, output_folder, progress_bar, save_settings, save_summary
from stages.sampling import ranks
from stages.sampling.config import DecodeConfig, Format
from stages.sampling.models import Models
from stages.sampling.prompts import slug
from stages.sampling.record import carries, tags
from stages.sampling.sampled_latents import SampledLatents
from stages.video import read_frames, write_mp4

SHEET_ROWS = 24
LATENTS_FILE, SHEET_FILE = "latents.safetensors", "contact_sheet.png"
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


class SampleFiles:
    """What a command leaves of its samples in ``output``: each rank makes the files of a share of them, the first what
    is made once.

    The contact sheet, the file of latents and the summary are those of the last command. Files of single samples stay:
    each says of itself how it was made. size: of the videos.
    """

    def __init__(self, output: Path, stems: Sequence[str], size: Bucket, config: DecodeConfig):
        self._output, self._stems, self._config = output, stems, config
        self._kinds = [kind for kind in config.formats if kind != "latents"]
        sheet = (min(SHEET_ROWS, len(stems)), min(COLUMNS, size.frames), size.height, size.width, 3)
        self._sheet = torch.zeros(sheet, dtype=torch.uint8)

    def missing(self, samples: SampledLatents) -> list[int]:
        """The numbers of those to make: all but what is there, and says that the same settings made it."""
        missing = torch.zeros(len(self._stems), dtype=torch.uint8)
        for number in range(len(missing)) if rank() == 0 else ():  # it looks for all
            missing[number] = not self._is_there(number, tags(self._config, samples, number))
        return ranks.summed(missing).nonzero().flatten().tolist()

    def _is_there(self, number: int, about: Mapping[str, str]) -> bool:
        if not resumes(self._config.formats) or not all(self._path(number, kind).is_file() for kind in self._kinds):
            return False
        video = self._path(number, "mp4")
        if not carries(video, about):
            return False
        if number < len(self._sheet):
            self._show(number, read_frames(video))
        return True

    def begin(self) -> None:
        """Once nothing can be refused any more: the settings, and nothing that speaks for other samples."""
        if rank() != 0:
            return
        save_settings(self._output, self._config)
        for path in (self._output / name for name in (LATENTS_FILE, SHEET_FILE, SUMMARY)):
            if path.exists() and not (self._config.latents and path.samefile(self._config.latents)):
                path.unlink()

    def write(self, numbers: Sequence[int], samples: SampledLatents, models: Models) -> None:
        """All formats of these samples; with latents among the formats they are all that there are."""
        if "latents" in self._config.formats and rank() == 0:
            samples.save(self._output / LATENTS_FILE)
        mine = range(rank(), len(numbers), world()) if self._kinds else range(0)
        if not mine:
            return
        vae = models.vae_for(self._config)
        with progress_bar(len(mine), "decode", "video") as bar:
            for place in mine:
                frames = vae.decode(samples.latents[place].transpose(0, 1))  # of [C, T, h, w]
                about = tags(self._config, samples, place)
                for kind in self._kinds:
                    path = self._path(numbers[place], kind)
                    output_folder(str(path.parent))
                    _write(path, kind, frames, self._config.fps or samples.fps, about)
                self._show(numbers[place], frames)
                bar.update()

    def _path(self, number: int, kind: Format) -> Path:
        return self._output / f"{self._stems[number]}.{kind}"

    def _show(self, number: int, frames: np.ndarray) -> None:
        if number < len(self._sheet):
            self._sheet[number] = torch.from_numpy(picked(frames))

    def finish(self, samples: SampledLatents, source: Mapping[str, Any]) -> dict[str, Any]:
        """The contact sheet and the summary, of all samples and where they come from; returns the summary."""
        files = [f"{stem}.{self._kinds[0]}" if self._kinds else LATENTS_FILE for stem in self._stems]
        rows = zip(files, samples.prompts, samples.seeds, strict=True)
        summary = {"samples": [{"file": file, "prompt": prompt, "seed": seed} for file, prompt, seed in rows], **source}
        sheet = ranks.summed(self._sheet).numpy()  # and every rank's files are there
        if rank() == 0:
            if self._kinds:
                with storage.write_whole(self._output / SHEET_FILE) as file:
                    contact_sheet(list(sheet), samples.prompts[:SHEET_ROWS]).save(file, "png")
            save_summary(self._output, summary)
            self._tell_of_others()
        return summary

    def _tell_of_others(self) -> None:
        """Of files like ours, beside ours."""
        ours = {self._path(number, kind) for number in range(len(self._stems)) for kind in self._kinds}
        theirs = [path for folder in {path.parent for path in ours} for path in folder.glob(f"*.{self._kinds[0]}")]
        others = sorted({path.name for path in theirs} - {path.name for path in ours} - {SHEET_FILE})
        if others:
            print(f"beside them are {len(others)} files of other commands, such as {others[0]}", flush=True)


def resumes(formats: Sequence[Format]) -> bool:
    """Whether a sample that is there can be left out: an .mp4 says how it was made, and no file holds all samples."""
    return "mp4" in formats and "latents" not in formats


def _write(path: Path, kind: Format, frames: np.ndarray, fps: float, about: dict[str, str]) -> None:
    if kind == "mp4":
        write_mp4(path, frames, fps, tags=about)
    elif kind in ("gif", "png"):
        write_animation(path, frames, fps, kind)
