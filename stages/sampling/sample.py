"""Prompts to videos with trained weights; the text encoder, the transformer and the VAE take turns in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from models.vae import vae_identity
from models.weights import read_info
from stages.errors import ConfigError
from stages.output import output_folder, save_settings, save_summary
from stages.sampling import ranks
from stages.sampling.checkpoint import check_ranks, check_sampler, choose_checkpoint, latent_shape, require_same
from stages.sampling.config import GivenConfig, SampleConfig
from stages.sampling.files import file_stems, write_samples
from stages.sampling.generate import generate
from stages.sampling.given import given_frames
from stages.sampling.memory import peak_of
from stages.sampling.models import Models
from stages.sampling.prompts import one_each, read_prompts
from stages.sampling.record import check_hash, checkpoint_hash
from stages.sampling.sampled_latents import SampledLatents


def sample(config: SampleConfig, models: Models | None = None) -> dict[str, Any]:
    """Make the files of each sample, a contact sheet and summary.json; returns the summary."""
    models = models or Models.on_this_machine()
    if from_latents(config):
        samples = read_latents(config)
        stems = file_stems(samples.prompts, config.names)
        output = output_folder(config.output)
        _save_settings(output, config)
        source: dict[str, Any] = {"latents": config.latents, "step": samples.step}
    else:
        prompts, of_each = _repeated(config)
        stems, checkpoint = file_stems(prompts, config.names), choose_checkpoint(config.ckpt)
        found = checkpoint_hash(checkpoint, config.weights)
        check_hash(config, checkpoint, found)
        output = output_folder(config.output)
        config = replace(config, ckpt=str(checkpoint.absolute()), ckpt_hash=found)
        _save_settings(output, config)
        config = replace(config, **of_each)
        samples = generate(config, prompts, checkpoint, models)
        source = {"checkpoint": str(checkpoint)}
    files = write_samples(output, stems, samples, config, models)
    rows = zip(files, samples.prompts, samples.seeds, strict=True)
    summary = {"samples": [{"file": file, "prompt": prompt, "seed": seed} for file, prompt, seed in rows], **source}
    ranks.wait_for_all()
    if ranks.rank() == 0:
        save_summary(output, summary)
    return summary


def _save_settings(output: Path, config: SampleConfig) -> None:
    if ranks.rank() == 0:
        save_settings(output, config)


def from_latents(config: SampleConfig) -> bool:
    """Whether latents are decoded, rather than prompts sampled. Raises ConfigError where both are asked for."""
    if config.latents and config.text_prompt:
        raise ConfigError(f"found text_prompt and latents ({config.latents}), expected one of them: leave one out")
    return bool(config.latents)


def read_latents(config: SampleConfig) -> SampledLatents:
    """The samples in ``latents``. Raises ConfigError unless the VAE is theirs."""
    samples = SampledLatents.read(Path(config.latents))
    path = config.pretrained_model_path
    require_same("VAE", path, vae_identity(path), samples.vae, config.latents)
    return samples


def describe(config: SampleConfig) -> str:
    """What ``sample`` would do, in a line or two."""
    if from_latents(config):
        samples = read_latents(config)
        return f"{len(samples.prompts)} videos of latents {list(samples.latents.shape[1:])} from {config.latents}"
    prompts, of_each = _repeated(config)
    file_stems(prompts, config.names)
    checkpoint = choose_checkpoint(config.ckpt)
    info = read_info(checkpoint)
    shape = latent_shape(config, info)
    check_sampler(config, info)
    check_ranks(config, info)
    for given in of_each["given"].of_each(len(prompts)):
        given_frames(given, shape[1], info)
    return (
        f"{len(prompts)} videos of latents {list(shape)} from {checkpoint}, {config.steps} steps each\n"
        f"{peak_of(config, info, shape)}"
    )


def _repeated(config: SampleConfig) -> tuple[list[str], dict[str, Any]]:
    """The prompt of each sample, and the settings that have a value for each sample as well."""
    prompts = read_prompts(config.text_prompt)
    negatives = one_each("negative_prompt", config.negative_prompt, len(prompts))
    given = config.given.of_each(len(prompts))
    repeats = range(config.samples_per_prompt)
    settings = {
        "negative_prompt": [text for text in negatives for _ in repeats],
        "given": GivenConfig.of_all([one for one in given for _ in repeats]),
    }
    return [text for text in prompts for _ in repeats], settings
