"""The three models that sampling takes, and how long each stays in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from models.loading import load_transformer
from models.text import TextEncoder
from models.transformer import Transformer
from models.vae import FrozenVAE
from stages.sampling import ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Models:
    """Loads models for a device. They take turns there: nothing but the work that a model does holds it."""

    device: torch.device
    text_encoder: Callable[..., TextEncoder] = TextEncoder.load
    transformer: Callable[..., Transformer] = load_transformer
    vae: Callable[..., FrozenVAE] = FrozenVAE.load

    @classmethod
    def on_this_machine(cls) -> "Models":
        return cls(ranks.join())

    def kept(self) -> "Models":
        """The same, each model loaded once and held from then on."""
        once = lru_cache(maxsize=1)
        return Models(self.device, once(self.text_encoder), once(self.transformer), once(self.vae))
