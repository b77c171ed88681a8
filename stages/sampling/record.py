"""What an .mp4 says of how it was made, enough to make it again: JSON in its comment, the prompt in its title."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av

from models.source import hash_files
from models.weights import INFO, NULL_TEXT
from stages.errors import ConfigError
from stages.sampling.config import DecodeConfig, SampleConfig
from stages.sampling.sampled_latents import SampledLatents
from stages.video import read_tags

AGAIN = "outputs/again"
"""Where a video is made again, unless output says otherwise: never over the first one."""


def checkpoint_hash(checkpoint: Path, weights: str) -> str:
    """Of the files that sampling reads, 32 hex digits."""
    return hash_files([checkpoint / name for name in (INFO, f"{weights}.safetensors", NULL_TEXT)])


def check_hash(config: SampleConfig, checkpoint: Path, found: str) -> None:
    """Raises ConfigError where other weights than these are expected."""
    if config.ckpt_hash and found != config.ckpt_hash:
        raise ConfigError(
            f"{checkpoint} has the hash {found}, expected {config.ckpt_hash}: its {config.weights} weights are "
            "others now; give ckpt= the folder that has those, or ckpt_hash= (empty) to sample with these"
        )


def tags(config: DecodeConfig, samples: SampledLatents, number: int) -> dict[str, str]:
    """For `stages.video.write_mp4`: what made one of the samples, with the settings that make it alone as far as they
    are known."""
    prompt, seed = samples.prompts[number], samples.seeds[number]
    decoding = asdict(replace(DecodeConfig.part_of(config), names="numbered"))
    settings = {**(samples.settings[number] if samples.settings else {}), **decoding}
    del settings["output"]
    about = {"made_by": "wisesora", "prompt": prompt, "seed": seed, "step": samples.step, "settings": settings}
    return {"title": prompt, "comment": json.dumps(about)}


def carries(path: Path, expected: Mapping[str, str]) -> bool:
    """Whether a video says that it was made so."""
    try:
        return read_tags(path)["comment"] == expected["comment"]
    except (OSError, av.FFmpegError, KeyError):
        return False


def read_record(path: Path) -> dict[str, Any]:
    """prompt, seed, step (of the weights) and settings of an .mp4 of `sample`. Raises ConfigError for other files."""
    if not path.is_file():
        raise ConfigError(f"no file at {path}: expected an .mp4 that sample wrote")
    try:
        about = json.loads(read_tags(path)["comment"])
        if about["made_by"] != "wisesora":
            raise KeyError("made_by")
    except (OSError, av.FFmpegError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not say how it was made ({error!r}): expected an .mp4 that sample wrote, unchanged"
        ) from None
    return about


def settings_to_remake(path: Path) -> dict[str, Any]:
    """Settings that make the video at ``path`` again. Raises ConfigError where no settings do."""
    settings = read_record(path)["settings"]
    if settings["latents"]:
        raise ConfigError(
            f"{path} was decoded from stored latents: decode them again with latents={settings['latents']}"
        )
    return settings | {"output": AGAIN}
