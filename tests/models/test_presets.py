"""The preset table and its overrides."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from models.presets import PRESETS, preset
from models.transformer import Transformer, TransformerConfig
from tests.models.networks import latte, pixart

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "model.md"


def _parameters(config: TransformerConfig, without: tuple[str, ...] = ()) -> int:
    with torch.device("meta"):
        named = Transformer(config).named_parameters()
    return sum(parameter.numel() for name, parameter in named if not name.startswith(without))


def test_the_largest_has_lattes_and_pixarts_size() -> None:
    """Our default predicts 4 channels, theirs 8: the mean of the noise and its variance."""
    config = preset("XL/2", {"out_channels": 8})
    with torch.device("meta"):
        video, image = latte(config, frames=16), pixart(config)
    assert _parameters(config) == video.num_parameters() == 1_057_246_880
    assert image.num_parameters() == _parameters(config, without=("temporal_",)) == 610_856_096  # as published


def test_the_documented_table_is_the_true_one() -> None:
    rows = [row for row in DOCUMENT.read_text().splitlines() if re.match(r"\| `(tiny|\w+/\d)` \|", row)]
    expected = [
        f"| `{name}` | {c.num_layers} + {c.num_layers} | {c.num_heads} × {c.head_dim} | {c.width} "
        f"| {_parameters(c) / 1e6:.3f} | {_parameters(c, without='temporal_') / 1e6:.3f} |"
        for name, c in PRESETS.items()
    ]
    assert rows == expected


def test_sizes_ascend_and_the_tiny_one_stays_under_a_million() -> None:
    sizes = [_parameters(config) for config in PRESETS.values()]
    assert list(PRESETS) == ["tiny", "S/2", "B/2", "L/2", "XL/2"]
    assert sizes == sorted(sizes)
    assert sizes[0] < 1_000_000


def test_the_published_models_shape_has_no_options() -> None:
    """All fields but the sizes of a preset are the defaults, which are Latte's."""
    sizes = {"num_layers", "num_heads", "head_dim"}
    plain = asdict(TransformerConfig())
    for name, config in PRESETS.items():
        changed = {field for field, value in asdict(config).items() if value != plain[field]}
        assert changed <= sizes | ({"text_dim", "sample_size", "pooled_text"} if name == "tiny" else set()), name
    options = ("pooled_text", "qk_norm", "size_conditioning", "fps_conditioning")
    assert not any(plain[option] for option in options)
    assert (plain["temporal_pos"], plain["temporal_attention"]) == ("stream", "axial")


def test_overrides_replace_fields() -> None:
    config = preset("B/2", {"text_dim": 32, "temporal_pos": "branch"})
    assert (config.text_dim, config.temporal_pos, config.num_heads) == (32, "branch", 12)
    assert PRESETS["B/2"].text_dim == 4096


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("XL", {}, "no preset 'XL'; did you mean XL/2"),
        ("?", {}, "expected one of tiny, S/2, B/2, L/2, XL/2"),
        ("tiny", {"num_layer": 2}, "no transformer field 'num_layer'; did you mean num_layers"),
        ("tiny", {"temporal_pos": "none"}, "expected stream or branch or rope"),
    ],
)
def test_mistakes_are_named(name: str, overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(name, overrides)
