"""Saves and reads checkpoints.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.diffusers_folder import read_json, read_safetensors
from models.diffusion import DiffusionConfig
from models.errors import WeightsError
from models.flow import FlowConfig
from models.objective import ObjectiveConfig
from models.transformer import Prediction, TransformerConfig

FORMAT_VERSION = 1
INFO = "model.json"
NULL_TEXT = "null_text.safetensors"
CHECKPOINTS = "checkpoints"
STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint's weights are and what they were trained on.

    vae and text_encoder are the fingerprints of the models that made the training data; buckets are its
    sizes, HEIGHTxWIDTHxFRAMES in pixels; conditioning names the masks of given frames that it was trained with;
    weights are the names of the files that there are, without ".safetensors".
    """

    step: int
    transformer: TransformerConfig
    objective: ObjectiveConfig
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    frame_interval_s: float
    buckets: tuple[str, ...] = ()
    conditioning: tuple[str, ...] = ()
    weights: tuple[str, ...] = ("model", "ema")

    def __post_init__(self) -> None:
        if self.objective.prediction is None:
            raise ValueError("objective.prediction is not known")

    @property
    def prediction(self) -> Prediction:
        """What the weights predict."""
        assert self.objective.prediction is not None
        return self.objective.prediction


def save_checkpoint(
    folder: Path,
    info: CheckpointInfo,
    weights: Mapping[str, Mapping[str, Tensor]],
    null_text: Tensor,
) -> None:
    """Writes a checkpoint into an existing folder, each file on disk before the next, model.json last.

    weights: state dicts by the name of their file ("model", "ema"). null_text: [L, D], true tokens alone.
    The folder becomes a checkpoint when the caller renames it into place.
    """
    null = {"embedding": null_text, "mask": torch.ones(len(null_text), dtype=torch.bool)}
    files = dict(weights) | {NULL_TEXT.removesuffix(".safetensors"): null}
    for name, tensors in files.items():
        path = folder / f"{name}.safetensors"
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(whole, path, metadata={"format": "pt"})
        _sync(path)
    content = {"format_version": FORMAT_VERSION} | asdict(replace(info, weights=tuple(weights)))
    (folder / INFO).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(folder / INFO)


def checkpoints_of(run: Path) -> list[Path]:
    """The whole checkpoints of a run folder, by ascending step."""
    steps = {
        folder: int(match[1])
        for folder in (run / CHECKPOINTS).glob("step-*")
        if (match := STEP_FOLDER.fullmatch(folder.name)) and _is_whole(folder)
    }
    return sorted(steps, key=lambda folder: steps[folder])


def find_checkpoint(path: str | Path, or_else: str = "") -> Path:
    """The checkpoint folder at `path`: itself, or the newest whole one in a run folder's checkpoints.

    or_else: what the caller would open as well, for the message where there is none.
    """
    path = Path(os.path.expanduser(path))
    if (path / INFO).is_file():
        return path
    whole = checkpoints_of(path)
    if not whole:
        expected = f"a checkpoint folder (with {INFO}) or a run folder (with {CHECKPOINTS}/step-*)"
        raise WeightsError(f"{_found(path)}; expected {expected}{or_else}")
    return whole[-1]


def read_info(path: str | Path) -> CheckpointInfo:
    """What the checkpoint at `path` (a checkpoint or a run folder) is."""
    return _read_info(find_checkpoint(path))


def read_null_text(path: str | Path) -> Tensor:
    """The embedding [L, D] of the empty caption that the checkpoint was trained with: true tokens alone."""
    file = find_checkpoint(path) / NULL_TEXT
    tensors = read_safetensors(file)
    if set(tensors) != {"embedding", "mask"}:
        raise WeightsError(f"{file} holds {sorted(tensors)}; expected embedding and mask")
    return tensors["embedding"][tensors["mask"]]


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def read_weights(path: str | Path, weights: str) -> dict[str, Tensor]:
    """The tensors that the checkpoint at `path` has by the name of `weights`: "ema" or "model"."""
    folder = find_checkpoint(path)
    info = _read_info(folder)
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


def _found(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist"
    if path.is_file():
        return f"{path} is a file"
    names = tuple(sorted(entry.name for entry in path.iterdir()))
    return f"{path} holds {some(names)}"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
