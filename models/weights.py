"""Saves and opens the transformer's weights.

A checkpoint is a folder that is enough to sample from, together with the VAE and text encoder it names:

  model.json               what the weights are (`CheckpointInfo`); written last
  model.safetensors        the weights being trained
  ema.safetensors          their moving average
  null_text.safetensors    the empty caption used in training: embedding [L, D], mask [L] bool

Nothing here unpickles. Errors are `WeightsError`, and say what was found and what was expected.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models import diffusers_folder
from models.diffusers_folder import LATTE, PIXART, read_json, read_safetensors
from models.diffusion import DiffusionConfig
from models.errors import WeightsError
from models.flow import FlowConfig
from models.objective import ObjectiveConfig
from models.transformer import Prediction, Transformer, TransformerConfig

FORMAT_VERSION = 1
INFO = "model.json"
NULL_TEXT = "null_text.safetensors"
CHECKPOINTS = "checkpoints"
STEP_FOLDER = re.compile(r"step-(\d+)")
MIN_MATCHED_SHARE = 0.5


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint's weights are and what they were trained on.

    vae and text_encoder are the fingerprints of the models that made the training data; buckets are its
    sizes, HEIGHTxWIDTHxFRAMES in pixels; weights are the names of the files that there are, without
    ".safetensors".
    """

    step: int
    transformer: TransformerConfig
    objective: ObjectiveConfig
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    frame_interval_s: float
    buckets: tuple[str, ...] = ()
    weights: tuple[str, ...] = ("model", "ema")

    def __post_init__(self) -> None:
        if self.objective.prediction is None:
            raise ValueError("objective.prediction is not known")

    @property
    def prediction(self) -> Prediction:
        """What the weights predict."""
        assert self.objective.prediction is not None
        return self.objective.prediction


@dataclass(frozen=True)
class LoadReport:
    """Which parameters a model took from a file, by name.

    matched_share is the share of the model's numbers that were loaded, unexpected_share that of the file's
    numbers that the model has no place for. info is the checkpoint's, where the file is one of ours.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    matched_share: float
    unexpected_share: float
    info: CheckpointInfo | None = None

    def __str__(self) -> str:
        return (
            f"{len(self.matched)} parameters loaded ({self.matched_share:.1%} of the model), "
            f"{len(self.missing)} not in the file ({_some(self.missing)}), "
            f"{len(self.unexpected)} without a place ({self.unexpected_share:.1%} of the file: "
            f"{_some(self.unexpected)})"
        )


def save_checkpoint(
    folder: Path,
    info: CheckpointInfo,
    weights: Mapping[str, Mapping[str, Tensor]],
    null_text: tuple[Tensor, Tensor],
) -> None:
    """Writes a checkpoint into an existing folder, each file on disk before the next, model.json last.

    weights: state dicts by the name of their file ("model", "ema"). null_text: embedding [L, D], mask [L].
    The folder becomes a checkpoint when the caller renames it into place.
    """
    embedding, mask = null_text
    files = dict(weights) | {NULL_TEXT.removesuffix(".safetensors"): {"embedding": embedding, "mask": mask}}
    for name, tensors in files.items():
        path = folder / f"{name}.safetensors"
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(whole, path, metadata={"format": "pt"})
        _sync(path)
    content = {"format_version": FORMAT_VERSION} | asdict(replace(info, weights=tuple(weights)))
    (folder / INFO).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(folder / INFO)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder at `path`: itself, or the newest whole one in a run folder's checkpoints."""
    path = Path(path)
    if (path / INFO).is_file():
        return path
    steps = {
        int(match[1]): folder
        for folder in (path / CHECKPOINTS).glob("step-*")
        if (match := STEP_FOLDER.fullmatch(folder.name)) and _is_whole(folder)
    }
    if not steps:
        raise WeightsError(f"{_found(path)}; expected {_EXPECTED}")
    return steps[max(steps)]


def read_info(path: str | Path) -> CheckpointInfo:
    """What the checkpoint at `path` (a checkpoint or a run folder) is."""
    return _read_info(find_checkpoint(path))


def read_null_text(path: str | Path) -> tuple[Tensor, Tensor]:
    """The empty caption that the checkpoint was trained with: embedding [L, D] and mask [L] bool."""
    file = find_checkpoint(path) / NULL_TEXT
    tensors = read_safetensors(file)
    if set(tensors) != {"embedding", "mask"}:
        raise WeightsError(f"{file} holds {sorted(tensors)}; expected embedding and mask")
    return tensors["embedding"], tensors["mask"]


def read_prediction(path: str | Path) -> Prediction:
    """What the weights at `path` (a checkpoint, a run, or diffusers' Latte or PixArt-alpha) predict."""
    return "epsilon" if diffusers_folder.find(Path(path)) is not None else read_info(path).prediction


def load_transformer(path: str | Path, weights: str = "ema") -> Transformer:
    """Opens a checkpoint, a run's newest checkpoint, or diffusers' Latte, on the CPU and in eval mode.

    weights: "ema" or "model"; diffusers folders have but one. The result's `prediction` says what it
    predicts, its `config` what it is made of.
    """
    folder = diffusers_folder.find(Path(path))
    if folder is not None:
        config = diffusers_folder.latte_config(folder)
        prediction: Prediction = "epsilon"
        tensors = diffusers_folder.read_tensors(folder)
    else:
        folder = find_checkpoint(path)
        info = _read_info(folder)
        config, prediction = info.transformer, info.prediction
        tensors = _read_weights(folder, info, weights)
    # Made without memory of its own, the model takes over the tensors that were read.
    with torch.device("meta"):
        model = Transformer(config, prediction)
    report = _compare(model, tensors, folder)
    if report.missing or report.unexpected:
        raise WeightsError(f"{folder} does not hold the whole transformer and nothing else: {report}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_into(model: Transformer, path: str | Path, weights: str = "ema") -> LoadReport:
    """Starts `model` from other weights, by name: a checkpoint, a run, or diffusers' Latte or PixArt-alpha.

    Parameters that the file lacks keep their values. Raises WeightsError, leaving the model as it was, when
    a shape differs or when less than half of the model's parameters have a match. A learned range that only one
    of the two has is left out, or starts anew.
    """
    folder, info = diffusers_folder.find(Path(path)), None
    if folder is None:
        folder = find_checkpoint(path)
        info = _read_info(folder)
        tensors = _read_weights(folder, info, weights)
    elif diffusers_folder.class_name(folder) in (LATTE, PIXART):
        tensors = diffusers_folder.read_tensors(folder)
    else:
        found = diffusers_folder.class_name(folder)
        raise WeightsError(f"{folder} holds a {found}; expected a {LATTE} or {PIXART}")
    tensors = _fit_output(tensors, model)
    report = _compare(model, tensors, folder)
    if report.matched_share < MIN_MATCHED_SHARE:
        raise WeightsError(f"{folder} is of another model; expected at least half of it to match: {report}")
    model.load_state_dict({name: tensors[name] for name in report.matched}, strict=False)
    return replace(report, info=info)


def _fit_output(tensors: dict[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """The tensors with the model's number of outputs, where a learned range is all that one has and the other not."""
    fitted, state = dict(tensors), model.state_dict()
    for name in ("proj_out.weight", "proj_out.bias"):
        given, own = tensors.get(name), state[name]
        if given is None or given.shape[1:] != own.shape[1:] or len(given) not in (2 * len(own), len(own) / 2):
            continue
        # The outputs of each pixel of a patch are its channels, those of the range last.
        source, whole = (tensor.unflatten(0, (model.config.patch_size**2, -1)) for tensor in (given, own.clone()))
        shared = min(source.shape[1], whole.shape[1])
        whole[:, :shared] = source[:, :shared]
        fitted[name] = whole.flatten(0, 1)
    return fitted


def _compare(model: Transformer, tensors: Mapping[str, Tensor], source: Path) -> LoadReport:
    """What would be loaded; WeightsError when a name is in both with different shapes."""
    own = model.state_dict()
    matched = [name for name in own if name in tensors]
    wrong = [name for name in matched if own[name].shape != tensors[name].shape]
    if wrong:
        shapes = [f"{n} is {tuple(tensors[n].shape)}, not {tuple(own[n].shape)}" for n in wrong[:4]]
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise WeightsError(f"{source} has other shapes than the configured model: {'; '.join(shapes)}{more}")
    unexpected = [name for name in tensors if name not in own]
    return LoadReport(
        matched=tuple(matched),
        missing=tuple(name for name in own if name not in tensors),
        unexpected=tuple(unexpected),
        matched_share=_numbers(own, matched) / _numbers(own, own),
        unexpected_share=_numbers(tensors, unexpected) / max(_numbers(tensors, tensors), 1),
    )


def _numbers(tensors: Mapping[str, Tensor], names: Any) -> int:
    return sum(tensors[name].numel() for name in names)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def _read_weights(folder: Path, info: CheckpointInfo, weights: str) -> dict[str, Tensor]:
    if weights not in info.weights:
        raise WeightsError(f"{folder} has the weights {', '.join(info.weights)}; there are no {weights!r}")
    return read_safetensors(folder / f"{weights}.safetensors")


def _read_info(folder: Path) -> CheckpointInfo:
    content = dict(read_json(folder / INFO))
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise WeightsError(f"{folder / INFO} has format_version {version}; expected {FORMAT_VERSION}")
    try:
        content["transformer"] = TransformerConfig(**content["transformer"])
        content["objective"] = _read_objective(content["objective"])
        return CheckpointInfo(**_tuples(content))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / INFO} does not describe a checkpoint: {error!r}") from error


def _read_objective(content: Mapping[str, Any]) -> ObjectiveConfig:
    flow, diffusion = FlowConfig(**_tuples(content["flow"])), DiffusionConfig(**content["diffusion"])
    return ObjectiveConfig(content["prediction"], flow, diffusion)


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists alone; our dataclasses hold tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _is_whole(folder: Path) -> bool:
    """Whether every file that model.json names is there."""
    if not (folder / INFO).is_file():
        return False
    files = [NULL_TEXT, *(f"{name}.safetensors" for name in _read_info(folder).weights)]
    return all((folder / file).is_file() for file in files)


_EXPECTED = (
    f"a checkpoint folder (with {INFO}), a run folder (with {CHECKPOINTS}/step-*), "
    f"or a diffusers folder (with the config.json of a {LATTE}, itself or in transformer/)"
)


def _found(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist"
    if path.is_file():
        return f"{path} is a file"
    names = tuple(sorted(entry.name for entry in path.iterdir()))
    return f"{path} holds {_some(names)}"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
