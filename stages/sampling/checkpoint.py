"""The weights that are sampled, and what must go with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.identity import text_encoder_identity, vae_identity
from models.samplers import make_sampler
from models.weights import CHECKPOINTS, CheckpointInfo, find_checkpoint
from shards.schema import Bucket
from stages.errors import ConfigError
from stages.launched import world
from stages.sampling.config import SampleConfig


def choose_checkpoint(path: str) -> Path:
    """The checkpoint at ``path``, a run's newest, or that of the run in ``outputs`` that wrote one last.

    Runs are looked for in outputs/RUN and outputs/NAME/RUN: not deeper, where a comparison has its arms.
    """
    if path:
        return find_checkpoint(path)
    found = [folder for runs in ("*", "*/*") for folder in Path("outputs").glob(f"{runs}/{CHECKPOINTS}")]
    written = [folder for folder in found if any(folder.glob("step-*"))]
    if not written:
        raise ConfigError("no checkpoint in outputs/RUN or outputs/NAME/RUN: train first, or give ckpt= a run")
    return find_checkpoint(max(written, key=lambda folder: folder.stat().st_mtime).parent)


def video_size(config: SampleConfig, info: CheckpointInfo) -> Bucket:
    """In pixels and frames: as asked, or the largest that the checkpoint was trained on."""
    trained = max(map(Bucket.parse, info.buckets), key=lambda bucket: bucket.height * bucket.width * bucket.frames)
    return Bucket(config.height or trained.height, config.width or trained.width, config.frames or trained.frames)


def latent_shape(config: SampleConfig, info: CheckpointInfo) -> tuple[int, int, int, int]:
    """[C, T, h, w] of the latents of the asked or trained size. Raises ConfigError for sizes that cannot be."""
    size = video_size(config, info)
    height, width, frames = size.height, size.width, size.frames
    vae, patch = info.vae, info.transformer.patch_size
    multiple = vae["spatial_factor"] * patch
    if height % multiple or width % multiple:
        raise ConfigError(f"found height x width {height}x{width}, expected multiples of {multiple} (VAE x patch)")
    if (frames - 1) % vae["temporal_factor"]:
        raise ConfigError(f"frames: found {frames}, expected 1 + a multiple of {vae['temporal_factor']} (the VAE's)")
    latent_frames = (frames - 1) // vae["temporal_factor"] + 1
    return (vae["latent_channels"], latent_frames, height // vae["spatial_factor"], width // vae["spatial_factor"])


def check_sampler(config: SampleConfig, info: CheckpointInfo) -> None:
    """Raises ConfigError for weights or a sampler that this checkpoint has not."""
    if config.weights not in info.weights:
        raise ConfigError(
            f"weights: found {config.weights!r}, which the checkpoint has not: give weights={info.weights[0]}"
        )
    try:
        make_sampler(config.sampler, info.objective, config.steps, tokens=1)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.sampler == "iddpm" and info.transformer.out_channels != 2 * info.vae["latent_channels"]:
        raise ConfigError("sampler: found 'iddpm', which needs a model with a learned variance; this one has none")


def check_ranks(config: SampleConfig, info: CheckpointInfo) -> None:
    """Raises ConfigError where the ranks that run cannot share videos so."""
    sharing, ranks = config.sequence_parallel, world()
    if ranks % sharing:
        raise ConfigError(f"sequence_parallel: found {sharing}, expected a divisor of the {ranks} ranks that run")
    if sharing > 1 and info.transformer.temporal_attention == "full":
        raise ConfigError(
            f"sequence_parallel: found {sharing}, expected 1 for a checkpoint with temporal_attention=full: it needs "
            "all places of all frames at once"
        )
    if sharing > 1 and config.step_cache is not None:
        raise ConfigError(
            f"step_cache: found {config.step_cache:g} with sequence_parallel {sharing}, expected one of them: ranks "
            "that share a video would have to agree at every step"
        )


def check_models(path: str, info: CheckpointInfo) -> None:
    """Raises ConfigError unless the VAE and text encoder are those that made the training data."""
    text_encoder = text_encoder_identity(path, info.text_encoder["max_tokens"])
    require_same("VAE", path, vae_identity(path), info.vae, "the checkpoint")
    require_same("text encoder", path, text_encoder, info.text_encoder, "the checkpoint")


def require_same(what: str, path: str, found: Mapping[str, Any], made: Mapping[str, Any], by: str) -> None:
    """Raises ConfigError where the model at ``path`` is not the one that ``by`` was made with."""
    differing = [f"{key} {value!r}, not {made.get(key)!r}" for key, value in found.items() if value != made.get(key)]
    if differing:
        raise ConfigError(f"pretrained_model_path={path} has another {what} than {by}: {'; '.join(differing)}")
