"""What makes latents and embeddings comparable: of a VAE and of a text encoder, found in their files.

Without the weights in memory, and without the libraries that run them, which take seconds to load.
"""

import json
from pathlib import Path
from typing import Any

from models.errors import WeightsError
from models.source import CONFIG_NAME, resolve_model, tokenizer_hash, weights_hash
from models.text_lengths import LENGTHS

CLEANING = "strip, collapse white space, lower case"
VAE_CLASS, TEXT_ENCODER_CLASS = "AutoencoderKL", "T5EncoderModel"
# What an old config leaves out, by the classes' own defaults; and transformers writes only what differs from them.
VAE_DEFAULTS: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": [64],
    "scaling_factor": 0.18215,
    "shift_factor": None,
}
TEXT_DEFAULTS: dict[str, Any] = {"d_model": 512}


def clean_caption(text: str) -> str:
    """A caption as the tokenizer sees it, when encoding and when sampling: see CLEANING."""
    return " ".join(text.split()).lower()


def vae_identity(name: str) -> dict[str, Any]:
    """``weights_hash``, ``class``, ``latent_channels``, ``spatial_factor``, ``temporal_factor`` (1: frames are encoded
    one by one), ``scaling_factor`` and ``shift_factor`` (None for none).

    Raises WeightsError where there is no VAE of diffusers' AutoencoderKL.
    """
    config = vae_config(name)
    return {
        "weights_hash": weights_hash(resolve_model(name, "vae")),
        "class": VAE_CLASS,
        "latent_channels": config["latent_channels"],
        "spatial_factor": 2 ** (len(config["block_out_channels"]) - 1),
        "temporal_factor": 1,
        "scaling_factor": config["scaling_factor"],
        "shift_factor": config["shift_factor"],
    }


def vae_config(name: str) -> dict[str, Any]:
    """The settings of a VAE, an old one's completed by defaults. Raises WeightsError as `vae_identity` does."""
    folder = resolve_model(name, "vae")
    config = VAE_DEFAULTS | _read_config(folder)
    if config.get("_class_name") != VAE_CLASS:
        raise WeightsError(f"{folder / CONFIG_NAME} describes {config.get('_class_name')}; expected {VAE_CLASS}")
    return config


def text_encoder_identity(name: str, max_tokens: int = 120) -> dict[str, Any]:
    """``weights_hash``, ``tokenizer_hash``, ``class``, ``dim``, ``max_tokens``, ``cleaning``.

    Raises WeightsError where encoder or tokenizer is absent, ValueError for ``max_tokens`` that no fixed length holds.
    """
    if not 1 <= max_tokens <= LENGTHS[-1]:
        raise ValueError(f"max_tokens is {max_tokens}; expected 1 to {LENGTHS[-1]}")
    folder = resolve_model(name, "text_encoder")
    return {
        "weights_hash": weights_hash(folder),
        "tokenizer_hash": tokenizer_hash(resolve_model(name, "tokenizer")),
        "class": TEXT_ENCODER_CLASS,
        "dim": (TEXT_DEFAULTS | _read_config(folder))["d_model"],
        "max_tokens": max_tokens,
        "cleaning": CLEANING,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} could not be read: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds a {type(config).__name__}; expected a model's settings")
    return config
