"""The preset table and its overrides."""

import pytest
import torch

from models.presets import PRESETS, preset
from models.transformer import Transformer, TransformerConfig
from tests.models.networks import latte, pixart


def _parameters(config: TransformerConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def test_the_largest_has_lattes_and_pixarts_size() -> None:
    """Our default predicts 4 channels, theirs 8: the mean of the noise and its variance."""
    config = preset("XL/2", {"out_channels": 8})
    with torch.device("meta"):
        video, image = latte(config, frames=16), pixart(config)
    assert _parameters(config) == video.num_parameters() == 1_057_246_880
    assert image.num_parameters() == 610_856_096  # as published


def test_sizes_ascend_and_the_tiny_one_stays_under_a_million() -> None:
    sizes = [_parameters(config) for config in PRESETS.values()]
    assert list(PRESETS) == ["tiny", "S/2", "B/2", "L/2", "XL/2"]
    assert sizes == sorted(sizes)
    assert sizes[0] < 1_000_000


def test_the_published_models_shape_has_no_pooled_text() -> None:
    assert not any(config.pooled_text for name, config in PRESETS.items() if name != "tiny")


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
