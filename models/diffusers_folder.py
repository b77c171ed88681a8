"""Latte's and PixArt-alpha's weights in diffusers' layout: reads both, writes Latte. Only safetensors are opened."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import WeightsError
from models.layers import NORM_EPS
from models.pretrained import Kind, Pretrained, position_range, taken_over
from models.transformer import TransformerConfig

CONFIG = "config.json"
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
# The fields of TransformerConfig that a Latte folder can express; all others must have their default.
EXPRESSED = (
    "in_channels",
    "out_channels",
    "patch_size",
    "num_layers",
    "num_heads",
    "head_dim",
    "text_dim",
    "sample_size",
    "position_scale",
    "temporal_pos_per_s",
    "temporal_init",
)
DIFFUSERS_VERSION = "0.32.0"
_MAKES: dict[Kind, str] = {"Latte": "video", "PixArt": "image"}


def find(path: Path) -> Path | None:
    """The folder with a diffusers model's config.json: `path`, its `transformer`, or None."""
    for folder in (path, path / "transformer"):
        if (folder / CONFIG).is_file() and "_class_name" in read_json(folder / CONFIG):
            return folder
    return None


def open_folder(folder: Path) -> Pretrained:
    """The Latte or PixArt transformer in this folder; WeightsError where our network differs from it."""
    config = read_json(folder / CONFIG)
    found = config["_class_name"]
    if found not in (LATTE, PIXART):
        raise WeightsError(f"{folder} holds a {found}; expected a {LATTE} or a {PIXART}")
    kind: Kind = "Latte" if found == LATTE else "PixArt"
    wrong = [f"{k} is {config.get(k)!r}, not {v!r}" for k, v in REQUIRED.items() if config.get(k) != v]
    if wrong:
        raise WeightsError(f"{folder} is not a {kind} text-to-{_MAKES[kind]} model: {'; '.join(wrong)}")
    try:
        # Latte's class has no interpolation_scale, and follows the rule that PixArt's has as its default.
        scale = config.get("interpolation_scale") or default_position_scale(config["sample_size"])
        sized = config.get("use_additional_conditions")
        sized = config["sample_size"] == 128 if sized is None else sized  # diffusers' own default
        ours = TransformerConfig(
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            patch_size=config["patch_size"],
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            text_dim=config["caption_channels"],
            sample_size=config["sample_size"],
            position_scale=float(scale),
            temporal_pos="stream" if kind == "Latte" else "branch",
            temporal_init="normal" if kind == "Latte" else "zero",
            size_conditioning=kind == "PixArt" and sized,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / CONFIG} does not describe a {kind} model: {error!r}") from error
    return Pretrained(folder, kind, ours, "epsilon", taken_over(kind), lambda: read_tensors(folder))


def default_position_scale(sample_size: int) -> int:
    """What diffusers divides spatial positions by when its config does not say."""
    return max(sample_size // 64, 1)


def latte_settings(config: TransformerConfig, frames: int, frame_interval_s: float) -> dict[str, Any]:
    """The config.json with which diffusers' Latte computes what our network does for videos of this many frames.

    frames are latent frames, `frame_interval_s` apart. Raises WeightsError naming all that Latte cannot express.
    """
    reasons = [
        f"{field.name} is {getattr(config, field.name)!r}, and Latte knows {field.default!r} alone"
        for field in fields(TransformerConfig)
        if field.name not in EXPRESSED and getattr(config, field.name) != field.default
    ]
    step = frame_interval_s * config.temporal_pos_per_s
    if frames > 1 and not math.isclose(step, 1, rel_tol=1e-6):
        reasons.append(
            f"frames every {frame_interval_s:g} s at temporal_pos_per_s {config.temporal_pos_per_s:g} are {step:g} "
            "temporal positions apart, and Latte counts 0, 1, 2, ..."
        )
    sizes = [size for size in (config.sample_size, _unscaled(config)) if _latte_range(size, config) == _range(config)]
    if not sizes:
        reasons.append(
            f"sample_size {config.sample_size} with position_scale {config.position_scale:g} puts spatial positions "
            f"from 0 to {position_range(config):g}, for which Latte has no sample_size"
        )
    if reasons:
        raise WeightsError(f"diffusers' Latte cannot express this model: {'; '.join(reasons)}")
    return {
        "_class_name": LATTE,
        "_diffusers_version": DIFFUSERS_VERSION,
        **REQUIRED,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "cross_attention_dim": config.width,
        "caption_channels": config.text_dim,
        "sample_size": sizes[0],
        "video_length": frames,
        "num_embeds_ada_norm": 1000,
        "norm_eps": NORM_EPS,
    }


def write_latte(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a Latte of `latte_settings` into an existing folder; its parameters have our names."""
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})


def _range(config: TransformerConfig) -> float:
    return round(position_range(config), 6)


def _unscaled(config: TransformerConfig) -> int:
    """The sample size that gives the config's range of positions without a scale."""
    return round(position_range(config) * config.patch_size)


def _latte_range(sample_size: int, config: TransformerConfig) -> float:
    return round(sample_size // config.patch_size / default_position_scale(sample_size), 6)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights in the folder, in one file or in the several that an index names."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        tensors |= read_safetensors(path)
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


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
