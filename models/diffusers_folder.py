"""Reads Latte's and PixArt-alpha's weights from folders that diffusers wrote. Only safetensors are opened."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.errors import WeightsError
from models.transformer import TransformerConfig

LATTE = "LatteTransformer3DModel"
PIXART = "PixArtTransformer2DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Values of a folder's config without which its weights compute something else than our network.
REQUIRED: dict[str, Any] = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


def find(path: Path) -> Path | None:
    """The folder with a diffusers model's config.json: `path`, its `transformer`, or None."""
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file() and "_class_name" in read_json(folder / "config.json"):
            return folder
    return None


def class_name(folder: Path) -> str:
    """The diffusers class whose weights the folder holds."""
    return read_json(folder / "config.json")["_class_name"]


def latte_config(folder: Path) -> TransformerConfig:
    """The config of the Latte transformer in this folder; WeightsError where our network differs from it."""
    config = read_json(folder / "config.json")
    if config["_class_name"] != LATTE:
        raise WeightsError(f"{folder} holds a {config['_class_name']}; expected a {LATTE}")
    wrong = [f"{k} is {config.get(k)!r}, not {v!r}" for k, v in REQUIRED.items() if config.get(k) != v]
    if wrong:
        raise WeightsError(f"{folder} is not a Latte text-to-video model: {'; '.join(wrong)}")
    try:
        return TransformerConfig(
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            patch_size=config["patch_size"],
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            text_dim=config["caption_channels"],
            sample_size=config["sample_size"],
            position_scale=max(config["sample_size"] // 64, 1),
            temporal_pos="stream",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / 'config.json'} does not describe a Latte model: {error!r}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights in the folder, in one file or in the several that an index names."""
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return read_safetensors(folder / WEIGHTS)
    names = sorted(set(read_json(index)["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_safetensors(folder / name)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; WeightsError when it is absent or damaged."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; expected weights in the safetensors format there")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file: {error}") from error


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file; WeightsError when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value
