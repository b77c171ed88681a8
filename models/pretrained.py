"""What readers of weights return: what the weights are of, before any of their numbers are read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from models.transformer import Prediction, TransformerConfig

Kind = Literal["checkpoint", "Latte", "PixArt"]

# What published files hold beside parameters, under our names: PixArt's own empty caption, and tables that are
# computed here for any size.
NULL_TEXT = "caption_projection.y_embedding"
SPATIAL_TABLE = "pos_embed.pos_embed"
NOT_PARAMETERS = (NULL_TEXT, SPATIAL_TABLE, "temp_pos_embed")

TEMPORAL_BLOCKS = "temporal_transformer_blocks."
# PixArt-alpha's 1024 px model is told the size and aspect ratio of the picture.
SIZE_EMBEDDERS = ("adaln_single.emb.resolution_embedder.", "adaln_single.emb.aspect_ratio_embedder.")


@dataclass(frozen=True)
class Pretrained:
    """Weights on disk.

    config: the network that they are of; of a PixArt, the video model that computes the same for each frame.
    takes_over: the fields of config, other than sizes of layers, that a model which starts from them takes over.
    read: reads all tensors, by our names, NOT_PARAMETERS among them.
    """

    path: Path
    kind: Kind
    config: TransformerConfig
    prediction: Prediction
    takes_over: tuple[str, ...]
    read: Callable[[], dict[str, Tensor]]

    @property
    def knows_its_positions(self) -> bool:
        """Whether the source says for which size its spatial positions are."""
        return "sample_size" in self.takes_over

    @property
    def has_temporal_blocks(self) -> bool:
        return self.kind != "PixArt"


def position_range(config: TransformerConfig) -> float:
    """The end of the range that spatial positions span, whatever the size of the video."""
    return config.sample_size // config.patch_size / config.position_scale


def taken_over(kind: Kind, *, positions: bool = True) -> tuple[str, ...]:
    """What a model that starts from PixArt or Latte takes over; positions: whether the source knows its own."""
    fields = ("temporal_pos", "temporal_init", "size_conditioning") if kind == "PixArt" else ("temporal_pos",)
    return ("sample_size", "position_scale", *fields) if positions else fields
