"""Prompts to videos with trained weights; the text encoder, the transformer and the VAE take turns in memory."""

from pathlib import Path
from typing import Any

import torch

from models.identity import vae_identity
from shards.schema import Bucket
from stages.errors import ConfigError
from stages.launched import tell
from stages.output import output_folder
from stages.sampling.checkpoint import require_same
from stages.sampling.config import DecodeConfig, SampleConfig
from stages.sampling.files import SampleFiles, file_stems
from stages.sampling.generate import generate, portions, requests_of
from stages.sampling.memory import peak_of
from stages.sampling.models import Models
from stages.sampling.plan import plan_samples
from stages.sampling.sampled_latents import SampledLatents


def sample(config: SampleConfig, models: Models | None = None) -> dict[str, Any]:
    """Make the files of each sample, a contact sheet and summary.json; returns the summary.

    Samples of which a command of the same settings has left the files are not made again: see `SampleFiles.missing`.
    """
    models = models or Models.on_this_machine()
    if from_latents(config):
        return _decode(config, models)
    plan = plan_samples(config)
    everything = plan.sampled(range(len(plan.asked)), torch.empty(0))
    files = SampleFiles(output_folder(plan.config.output), plan.stems, plan.size, plan.config)
    missing = files.missing(everything)
    written = len(plan.asked) - len(missing)
    if written:
        tell(f"{written} of {len(plan.asked)} samples are there already")
    requests = requests_of(plan, missing, models) if missing else []
    files.begin()
    for places in portions(requests, plan.config):
        latents = generate(plan, [requests[place] for place in places], models)
        numbers = [missing[place] for place in places]
        files.write(numbers, plan.sampled(numbers, latents), models)
        written += len(numbers)
        if written < len(plan.asked):
            tell(f"{written} of {len(plan.asked)} samples are written")
    return files.finish(everything, {"checkpoint": str(plan.checkpoint)})


def _decode(config: SampleConfig, models: Models) -> dict[str, Any]:
    samples, stems = _stored(config)
    _, _, frames, height, width = samples.latents.shape
    factor = samples.vae["spatial_factor"]
    size = Bucket(height * factor, width * factor, frames)
    files = SampleFiles(output_folder(config.output), stems, size, DecodeConfig.part_of(config).located())
    files.begin()
    files.write(range(len(stems)), samples, models)
    return files.finish(samples, {"latents": config.latents, "step": samples.step})


def from_latents(config: SampleConfig) -> bool:
    """Whether latents are decoded, rather than prompts sampled. Raises ConfigError where both are asked for."""
    if config.latents and config.text_prompt:
        raise ConfigError(f"found text_prompt and latents ({config.latents}), expected one of them: leave one out")
    return bool(config.latents)


def _stored(config: SampleConfig) -> tuple[SampledLatents, list[str]]:
    """The samples in ``latents`` and the names of their files. Raises ConfigError unless the VAE is theirs."""
    samples = SampledLatents.read(Path(config.latents))
    path = config.pretrained_model_path
    require_same("VAE", path, vae_identity(path), samples.vae, config.latents)
    return samples, file_stems(samples.prompts, config.names)


def describe(config: SampleConfig) -> str:
    """What ``sample`` would do, in a line or two."""
    if from_latents(config):
        samples, _ = _stored(config)
        return f"{len(samples.prompts)} videos of latents {list(samples.latents.shape[1:])} from {config.latents}"
    plan = plan_samples(config)
    config, count, together = plan.config, len(plan.asked), plan.config.samples_together
    return (
        f"{count} samples in {-(-count // together)} or more batches of {together}: latents "
        f"{list(plan.shape)} from {plan.checkpoint}, {config.steps} steps each\n"
        f"{peak_of(config, plan.info, plan.shape)}"
    )
