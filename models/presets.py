"""The named sizes of the transformer.

S, B, L and XL have the widths and depths of DiT (arXiv:2212.09748, table 1), here of spatial and temporal
blocks each; the number after the slash is the patch size. XL/2 is PixArt-alpha's and Latte's. `tiny` is
made for 64 px clips of moving shapes on a CPU. docs/model.md has the table with parameter counts.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from models.transformer import TransformerConfig

PRESETS: dict[str, TransformerConfig] = {
    "tiny": TransformerConfig(num_layers=3, num_heads=4, head_dim=24, text_dim=64, sample_size=8, pooled_text=True),
    "S/2": TransformerConfig(num_layers=12, num_heads=6, head_dim=64),
    "B/2": TransformerConfig(num_layers=12, num_heads=12, head_dim=64),
    "L/2": TransformerConfig(num_layers=24, num_heads=16, head_dim=64),
    "XL/2": TransformerConfig(num_layers=28, num_heads=16, head_dim=72),
}


def preset(name: str, overrides: Mapping[str, Any] | None = None) -> TransformerConfig:
    """The preset of that name with some fields replaced; ValueError names a misspelt preset or field."""
    overrides = overrides or {}
    _known(name, list(PRESETS), "preset")
    for key in overrides:
        _known(key, [field.name for field in fields(TransformerConfig)], "transformer field")
    return replace(PRESETS[name], **overrides)


def _known(name: str, names: list[str], kind: str) -> None:
    if name not in names:
        nearest = get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; expected one of {', '.join(names)}"
        raise ValueError(f"there is no {kind} {name!r}{hint}")
