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
from stages.sampling.config import DecodeConfig


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

    def vae_for(self, config: DecodeConfig) -> FrozenVAE:
        """As it is set, to encode and to decode alike: kept models then hold one."""
        return self.vae(
            config.pretrained_model_path,
            self.device,
            batch_frames=config.vae_batch_frames,
            band_rows=config.vae_band_rows,
        )
