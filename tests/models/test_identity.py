"""What is read from a model's files is what diffusers and transformers would read from them."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel

from models.errors import WeightsError
from models.identity import text_encoder_identity, vae_identity


def write_model(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "spiece.model").write_bytes(b"pieces")
    return str(folder)


@pytest.mark.parametrize("written", [{}, {"latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.1}])
def test_an_old_vae_config_is_completed_as_diffusers_completes_it(written: dict[str, Any], tmp_path: Path) -> None:
    expected = AutoencoderKL.from_config(written).config
    found = vae_identity(write_model(tmp_path, {"_class_name": "AutoencoderKL", **written}))
    assert found["class"] == AutoencoderKL.__name__
    for name in ("latent_channels", "scaling_factor", "shift_factor"):
        assert found[name] == expected[name]
    assert found["spatial_factor"] == 2 ** (len(expected["block_out_channels"]) - 1)


def test_a_t5_config_is_completed_as_transformers_completes_it(tmp_path: Path) -> None:
    found = text_encoder_identity(write_model(tmp_path, {"model_type": "t5"}))
    assert (found["class"], found["dim"]) == (T5EncoderModel.__name__, T5Config().d_model)


def test_a_config_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    name = write_model(tmp_path, {})
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        for identity in (vae_identity, text_encoder_identity):
            with pytest.raises(WeightsError, match="config.json"):
                identity(name)
