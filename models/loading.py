"""Opens weights wherever they come from, and starts models from them.

Sources: our checkpoints and runs, diffusers' folders of Latte and PixArt-alpha, their original .pth files, and hub
ids. Nothing here unpickles code. Errors are `WeightsError`, and say what was found and what was expected.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from models import diffusers_folder
from models.errors import WeightsError
from models.original_names import open_original
from models.pretrained import (
    NOT_PARAMETERS,
    NULL_TEXT,
    SIZE_EMBEDDERS,
    TEMPORAL_BLOCKS,
    Pretrained,
    position_range,
)
from models.source import is_hub_id, resolve_model
from models.transformer import Transformer, TransformerConfig
from models.weights import CheckpointInfo, find_checkpoint, read_info, read_null_text, read_weights, some

# The fields of TransformerConfig that are sizes of layers; a model takes over the others from one of our own.
LAYER_SIZES = (
    "in_channels",
    "out_channels",
    "patch_size",
    "num_layers",
    "num_heads",
    "head_dim",
    "mlp_ratio",
    "text_dim",
)
# What is opened beside our checkpoints and runs.
OTHERS = (
    f", a diffusers folder (with the config.json of a {diffusers_folder.LATTE} or {diffusers_folder.PIXART}, itself or "
    "in transformer/), or a .pth of PixArt-alpha or Latte"
)


@dataclass(frozen=True)
class LoadReport:
    """Which parameters a model took from a file, by name.

    matched_share is the share of the model's numbers that were loaded, unexpected_share that of the file's
    numbers that the model has no place for. notes are what else changes from the file to the model. info is the
    checkpoint's, where the file is one of ours; null_text [L, D] the empty caption that the weights were trained
    with, where the file has it.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    matched_share: float
    unexpected_share: float
    notes: tuple[str, ...] = ()
    info: CheckpointInfo | None = None
    null_text: Tensor | None = None

    def __str__(self) -> str:
        counts = (
            f"{len(self.matched)} parameters loaded ({self.matched_share:.1%} of the model), "
            f"{len(self.missing)} not in the file ({some(self.missing)}), "
            f"{len(self.unexpected)} without a place ({self.unexpected_share:.1%} of the file: "
            f"{some(self.unexpected)})"
        )
        return "; ".join((counts, *self.notes))


def open_pretrained(path: str | Path, weights: str = "ema") -> Pretrained:
    """What the weights at `path` are of: a checkpoint, a run's newest, diffusers' Latte or PixArt, or a .pth.

    path: a folder, a file, or a hub id of a repository in diffusers' layout. weights: "ema" or "model"; diffusers
    folders have but one, and a .pth without averaged weights gives those it has.
    """
    place = Path(path).expanduser()
    if not place.exists() and is_hub_id(str(path)):
        place = resolve_model(str(path), "transformer")
    if place.is_file():
        return open_original(place, weights)
    folder = diffusers_folder.find(place)
    if folder is not None:
        return diffusers_folder.open_folder(folder)
    folder = find_checkpoint(place, OTHERS)
    info = read_info(folder)
    takes_over = tuple(field.name for field in fields(TransformerConfig) if field.name not in LAYER_SIZES)
    return Pretrained(
        folder,
        "checkpoint",
        info.transformer,
        info.prediction,
        takes_over,
        lambda: read_weights(folder, weights),
    )


def load_transformer(path: str | Path, weights: str = "ema") -> Transformer:
    """Opens what `open_pretrained` finds at `path`, on the CPU and in eval mode.

    Of a PixArt it is a video model that leaves each frame to the image model. The result's `prediction` says what
    it predicts, its `config` what it is made of.
    """
    source = open_pretrained(path, weights)
    if not source.knows_its_positions:
        raise WeightsError(
            f"{source.path} does not say for which size its spatial positions are (it has no pos_embed): "
            "open the same weights in diffusers' layout, or start a run from it with model.sample_size"
        )
    tensors, _ = _parameters(source)
    # Made without memory of its own, the model takes over the tensors that were read; new blocks need memory.
    with torch.device("meta" if source.has_temporal_blocks else "cpu"):
        model = Transformer(source.config, source.prediction)
    report = _compare(model, tensors, source)
    if report.unexpected or not _own_names(source).isdisjoint(report.missing):
        raise WeightsError(f"{source.path} does not hold the whole transformer and nothing else: {report}")
    model.load_state_dict(tensors, assign=True, strict=False)
    return model.eval()


def load_into(model: Transformer, path: str | Path, weights: str = "ema") -> LoadReport:
    """Starts `model` from the weights that `open_pretrained` finds at `path`, by name.

    Parameters that only the model has (PixArt has no temporal blocks; options that the source was trained without)
    keep their values. Raises WeightsError, leaving the model as it was, when anything else of the source has no
    place, when a shape differs, or when the model would compute something else with the same weights.

    A final projection with a variance beside the prediction (PixArt's and Latte's) gives its first half to a model
    that predicts none, and one without is the first half of a model's that does.
    """
    source = open_pretrained(path, weights)
    _check_same_network(model.config, source)
    tensors, null_text = _parameters(source)
    notes = [f"a {source.kind} with spatial positions to {position_range(source.config):g}"]
    if fitted := _fit_output(tensors, model, source):
        notes.append(fitted)
    if source.prediction != model.prediction:
        notes.append(f"it predicts {source.prediction}, this model is trained for {model.prediction}")
    if any(name.startswith(SIZE_EMBEDDERS) for name in tensors) and not model.config.size_conditioning:
        notes.append("it is told the size of the picture, which this model is not")
    report = _compare(model, tensors, source)
    own = _own_names(source)
    lacking = tuple(name for name in report.missing if name in own)
    homeless = tuple(name for name in report.unexpected if name not in own and not name.startswith(SIZE_EMBEDDERS))
    if lacking or homeless:
        raise WeightsError(
            f"{source.path} is not the whole {source.kind} and nothing else: it lacks {len(lacking)} of its parameters "
            f"({some(lacking)}) and has {len(homeless)} that belong to another model ({some(homeless)}); "
            f"{report.matched_share:.1%} of the configured model would be loaded"
        )
    model.load_state_dict({name: tensors[name] for name in report.matched}, strict=False)
    info = read_info(source.path) if source.kind == "checkpoint" else None
    return replace(report, notes=tuple(notes), info=info, null_text=null_text)


def _parameters(source: Pretrained) -> tuple[dict[str, Tensor], Tensor | None]:
    """The source's parameters, and its empty caption [L, D] where it has one.

    Latte's files have one that was never used: its pipeline encodes the empty text instead.
    """
    tensors = source.read()
    null_text = tensors.get(NULL_TEXT) if source.kind == "PixArt" else None
    if source.kind == "checkpoint":
        null_text = read_null_text(source.path)
    return {name: tensor for name, tensor in tensors.items() if name not in NOT_PARAMETERS}, null_text


def _own_names(source: Pretrained) -> set[str]:
    """The parameters that the source must hold."""
    with torch.device("meta"):
        names = Transformer(source.config).state_dict()
    return {name for name in names if source.has_temporal_blocks or not name.startswith(TEMPORAL_BLOCKS)}


def _check_same_network(config: TransformerConfig, source: Pretrained) -> None:
    """WeightsError where names and shapes might agree and the results would not."""
    names = ("num_layers", "num_heads", *(["temporal_pos"] if source.has_temporal_blocks else []))
    wrong = [
        f"{name} is {getattr(config, name)}, not {getattr(source.config, name)}"
        for name in names
        if getattr(config, name) != getattr(source.config, name)
    ]
    here, there = position_range(config), position_range(source.config)
    if source.knows_its_positions and not math.isclose(here, there):
        wrong.append(
            f"sample_size {config.sample_size} with position_scale {config.position_scale:g} puts spatial positions "
            f"from 0 to {here:g}, and the weights know 0 to {there:g}: set sample_size={source.config.sample_size} "
            f"with position_scale={source.config.position_scale:g}, or position_scale="
            f"{config.position_scale * here / there:g} with the sample_size as it is"
        )
    if wrong:
        raise WeightsError(f"the model differs from the {source.kind} in {source.path}: {'; '.join(wrong)}")


def _fit_output(tensors: dict[str, Tensor], model: Transformer, source: Pretrained) -> str | None:
    """Gives the final projection the model's channels where a variance is all that one has and the other has not.

    The rows of a patch are [p, p, channels], the variance's last. Returns what was done, None where nothing was.
    """
    there, here = source.config.out_channels, model.config.out_channels
    if there not in (2 * here, here / 2):
        return None
    shared = min(there, here)
    for name, fresh in model.proj_out.state_dict(prefix="proj_out.").items():
        given = tensors.get(name)
        if given is not None and given.numel() * here == fresh.numel() * there:
            rows = fresh.clone().unflatten(0, (-1, here))
            rows[:, :shared] = given.unflatten(0, (-1, there))[:, :shared]
            tensors[name] = rows.flatten(0, 1)
    return "the variance half of its output is left out" if there > here else "the variance half of the output is new"


def _compare(model: Transformer, tensors: Mapping[str, Tensor], source: Pretrained) -> LoadReport:
    """What would be loaded; WeightsError when a name is in both with different shapes."""
    own = model.state_dict()
    matched = [name for name in own if name in tensors]
    wrong = [name for name in matched if own[name].shape != tensors[name].shape]
    if wrong:
        shapes = [f"{n} is {tuple(tensors[n].shape)}, not {tuple(own[n].shape)}" for n in wrong[:4]]
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise WeightsError(f"{source.path} has other shapes than the configured model: {'; '.join(shapes)}{more}")
    unexpected = [name for name in tensors if name not in own]
    return LoadReport(
        matched=tuple(matched),
        missing=tuple(name for name in own if name not in tensors),
        unexpected=tuple(unexpected),
        matched_share=_numbers(own, matched) / _numbers(own, own),
        unexpected_share=_numbers(tensors, unexpected) / max(_numbers(tensors, tensors), 1),
    )


def _numbers(tensors: Mapping[str, Tensor], names: Iterable[str]) -> int:
    return sum(tensors[name].numel() for name in names)
