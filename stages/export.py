"""Trained weights in a layout that others open: diffusers' Latte, alone or with VAE and T5 as a LattePipeline."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.diffusers_folder import DIFFUSERS_VERSION, LATTE, latte_settings, write_latte
from models.flow import RectifiedFlow
from models.loading import load_transformer
from models.samplers import TRAINED_BETAS
from models.source import CONFIG_NAME, TOKENIZER_FILES, Part, resolve_model, weight_files
from models.weights import CheckpointInfo, find_checkpoint, read_info
from shards import storage
from stages.errors import ConfigError
from stages.output import SUMMARY, save_settings, save_summary
from stages.sampling.checkpoint import check_models, latent_shape
from stages.sampling.config import SampleConfig

PIPELINE = "LattePipeline"
FROZEN_PARTS: tuple[Part, ...] = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class ExportConfig:
    """What is exported, and where to.

    checkpoint: a run or checkpoint folder. output: a folder that is absent, empty or a former export.
    pretrained_model_path: the VAE and T5 that the shards were made with; with them the folder is a LattePipeline.
    """

    checkpoint: str = ""
    output: str = ""
    format: Literal["diffusers"] = "diffusers"
    weights: Literal["ema", "model"] = "ema"
    pretrained_model_path: str | None = None


@dataclass(frozen=True)
class Export:
    """What will be written."""

    checkpoint: Path
    info: CheckpointInfo
    latte: dict[str, Any]
    scheduler: dict[str, Any] | None  # of a pipeline


def plan(config: ExportConfig) -> Export:
    """Find the checkpoint and what it is in diffusers' words. Raises where diffusers cannot express it."""
    if not config.checkpoint:
        raise ConfigError("checkpoint is not set: give --checkpoint a run or checkpoint folder")
    checkpoint = find_checkpoint(config.checkpoint)
    info = read_info(checkpoint)
    shape = latent_shape(SampleConfig(), info)
    latte = latte_settings(info.transformer, shape[1], info.frame_interval_s)
    if config.pretrained_model_path is None:
        return Export(checkpoint, info, latte, None)
    check_models(config.pretrained_model_path, info)
    return Export(checkpoint, info, latte, scheduler_settings(info, shape))


def scheduler_settings(info: CheckpointInfo, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """The scheduler with which a LattePipeline samples this model, at the shift for latents of this shape.

    Its steps are those of our default samplers, as DPMSolverMultistepScheduler of order 1 takes DDIM's for epsilon and
    Euler's for a flow. LattePipeline, which was written for Latte, takes the first half of the channels that the model
    gives, unless the scheduler has a variance_type of learned_range, which does nothing else for a flow; and it asks
    for scale_model_input, which diffusers' FlowMatchEulerDiscreteScheduler has not.
    """
    reasons = []
    vae, transformer = info.vae, info.transformer
    if vae["shift_factor"]:
        reasons.append(f"the VAE's shift_factor is {vae['shift_factor']}, and the pipeline subtracts none")
    if vae["temporal_factor"] != 1:
        reasons.append(f"the VAE's temporal_factor is {vae['temporal_factor']}, and the pipeline knows 1 alone")
    if info.prediction == "epsilon" and transformer.out_channels != 2 * transformer.in_channels:
        reasons.append("the model predicts epsilon without a variance, and the pipeline leaves out half the channels")
    if info.prediction not in ("velocity", "epsilon"):
        reasons.append(f"the model predicts {info.prediction}, and no scheduler is chosen for that")
    if reasons:
        raise ConfigError(f"{PIPELINE} cannot sample this model: {'; '.join(reasons)}; export without the VAE and T5")
    settings = {
        "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": DIFFUSERS_VERSION, "solver_order": 1,
    }  # fmt: skip
    if info.prediction == "epsilon":
        return settings | TRAINED_BETAS | {"timestep_spacing": "trailing"}
    return settings | {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": RectifiedFlow(info.objective.flow).shift(transformer.tokens(*shape[1:])),
        "variance_type": "learned_range",
    }


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the folder whole or not at all; returns the summary."""
    planned = plan(config)
    output = _free_folder(config.output)
    hidden = output.with_name(f".{output.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        _write(config, planned, hidden)
        summary = {
            "exported": PIPELINE if planned.scheduler else LATTE,
            "checkpoint": str(planned.checkpoint),
            "weights": config.weights,
            "step": planned.info.step,
            "video_length": planned.latte["video_length"],
            "bytes": sum(path.stat().st_size for path in hidden.rglob("*") if path.is_file()),
        }
        save_settings(hidden, config)
        save_summary(hidden, summary)
        _put(hidden, output)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return summary


def _write(config: ExportConfig, planned: Export, folder: Path) -> None:
    tensors = load_transformer(planned.checkpoint, config.weights).state_dict()
    if not config.pretrained_model_path:
        write_latte(folder, planned.latte, tensors)
        return
    classes = {
        "scheduler": ["diffusers", (planned.scheduler or {})["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", LATTE],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for part in classes:
        (folder / part).mkdir()
    write_latte(folder / "transformer", planned.latte, tensors)
    _write_json(folder / "scheduler" / "scheduler_config.json", planned.scheduler)
    for part in FROZEN_PARTS:
        _copy(config.pretrained_model_path, part, folder / part)
    _write_json(
        folder / "model_index.json", {"_class_name": PIPELINE, "_diffusers_version": DIFFUSERS_VERSION, **classes}
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy(name: str, part: Part, target: Path) -> None:
    """The files of one part of a pretrained model that its class reads."""
    source = resolve_model(name, part)
    if part == "tokenizer":
        files = [source / file for file in TOKENIZER_FILES if (source / file).is_file()]
    else:
        files = [source / CONFIG_NAME, *weight_files(source), *source.glob("*.index.json")]
    for file in files:
        shutil.copyfile(file, target / file.name)


def _free_folder(path: str) -> Path:
    """The output folder, if it may be written. Raises ConfigError where it holds something else."""
    if not path:
        raise ConfigError("output is not set: give --output FOLDER")
    folder = storage.local_path(path).absolute()
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_export(folder))):
        raise ConfigError(f"{folder} exists and is no former export: give another --output, or remove it")
    return folder


def _is_export(folder: Path) -> bool:
    try:
        return "exported" in json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _put(hidden: Path, output: Path) -> None:
    """Rename the finished folder into place; a former export makes room whole."""
    for path in hidden.rglob("*"):
        storage.flush(path)
    if output.exists():
        former = output.with_name(f".{output.name}.former")
        shutil.rmtree(former, ignore_errors=True)
        output.rename(former)
        hidden.rename(output)
        shutil.rmtree(former)
    else:
        hidden.rename(output)
    storage.flush(output.parent)


def describe(config: ExportConfig) -> str:
    """What ``export`` would do, in a line."""
    planned = plan(config)
    what = PIPELINE if planned.scheduler else LATTE
    output = _free_folder(config.output)
    frames = planned.latte["video_length"]
    return f"{planned.checkpoint} ({config.weights}) as a {what} of {frames} latent frames, into {output}"
