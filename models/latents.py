"""Between the VAE's raw latents, which shards hold, and the normalised ones that the transformer sees."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LatentStats:
    """The VAE's own factors, as diffusers applies them: normalised = (raw - shift_factor) * scaling_factor."""

    scaling_factor: float
    shift_factor: float

    @classmethod
    def of(cls, vae: Mapping[str, Any]) -> "LatentStats":
        """From a VAE's identity, as a dataset's fingerprint and a checkpoint record it."""
        return cls(vae["scaling_factor"], vae["shift_factor"] or 0.0)

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw - self.shift_factor) * self.scaling_factor

    def denormalise(self, normalised: torch.Tensor) -> torch.Tensor:
        return normalised / self.scaling_factor + self.shift_factor
