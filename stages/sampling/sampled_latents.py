"""Samples before they are decoded: a file of latents with all that it takes to make videos of them.

A safetensors file of ``latents``, float16 as in shards, and of JSON in its metadata.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from shards import storage
from stages.errors import ConfigError

LATENTS, ABOUT = "latents", "samples"


@dataclass(frozen=True, eq=False)
class SampledLatents:
    """N samples: their latents as the VAE decodes them, unscaled, and where they come from.

    step: of the weights. vae: the identity of the VAE that decodes them. settings: of each, those of `sample` that make
    it alone; of samples that no such command can make there are none.
    """

    latents: torch.Tensor  # [N, C, T, h, w]
    prompts: list[str]
    seeds: list[int]
    step: int
    vae: Mapping[str, Any]
    fps: float
    settings: Sequence[Mapping[str, Any]] = ()

    def save(self, path: Path) -> None:
        """Whole or not at all; an existing file is replaced."""
        about = asdict(replace(self, latents=torch.empty(0)))
        del about[LATENTS]
        with storage.write_whole(path) as file:
            file.write(save({LATENTS: self.latents.half().cpu().contiguous()}, {ABOUT: json.dumps(about)}))

    @classmethod
    def read(cls, path: Path) -> "SampledLatents":
        """Raises ConfigError where there is no such file."""
        if not path.is_file():
            raise ConfigError(f"no file at {path}: give latents= a file of a run's samples folder")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()[ABOUT])
                found = cls(latents=file.get_tensor(LATENTS).float(), **about)
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds no samples of a run ({error!r}): give latents= another file") from None
        return found
