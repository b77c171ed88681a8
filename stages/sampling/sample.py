"""Prompts to videos with trained weights; the text encoder, the transformer and the VAE take turns in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.vae import FrozenVAE, vae_identity
from models.weights import read_info
from stages.contact_sheet import contact_sheet
from stages.errors import ConfigError
from stages.output import output_folder, progress_bar, save_settings, save_summary
from stages.sampling.checkpoint import choose_checkpoint, latent_shape, require_same
from stages.sampling.config import SampleConfig
from stages.sampling.generate import generate
from stages.sampling.prompts import read_prompts, slug
from stages.sampling.sampled_latents import SampledLatents
from stages.video import write_mp4

SHEET_ROWS = 24


def sample(config: SampleConfig) -> dict[str, Any]:
    """Make one .mp4 a sample, a contact sheet and summary.json; returns the summary."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source: dict[str, Any]
    if from_latents(config):
        samples = read_latents(config)
        source = {"latents": config.latents, "step": samples.step}
        output = output_folder(config.output)
    else:
        prompts, checkpoint = read_prompts(config.text_prompt), choose_checkpoint(config.ckpt)
        output = output_folder(config.output)
        samples = generate(config, prompts, checkpoint, device)
        source = {"checkpoint": str(checkpoint)}
    save_settings(output, config)

    videos = _decode(config.pretrained_model_path, samples, device)
    rows: list[dict[str, Any]] = []
    for number, (prompt, seed, frames) in enumerate(zip(samples.prompts, samples.seeds, videos, strict=True)):
        file = f"{number:04d}-{slug(prompt)}.mp4"
        write_mp4(output / file, frames, samples.fps)
        rows.append({"file": file, "prompt": prompt, "seed": seed})
    contact_sheet(videos[:SHEET_ROWS], samples.prompts[:SHEET_ROWS]).save(output / "contact_sheet.png")
    summary = {"samples": rows, **source}
    save_summary(output, summary)
    return summary


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


def _decode(pretrained_model_path: str, samples: SampledLatents, device: torch.device) -> list[np.ndarray]:
    """Of each sample its frames, uint8 [T, H, W, 3]."""
    vae = FrozenVAE.load(pretrained_model_path, device)
    videos = []
    with progress_bar(len(samples.latents), "decode", "video") as bar:
        for latents in samples.latents:
            videos.append(vae.decode(latents.transpose(0, 1)))  # [T, C, h, w]
            bar.update()
    return videos


def describe(config: SampleConfig) -> str:
    """What ``sample`` would do, in a line."""
    if from_latents(config):
        samples = read_latents(config)
        return f"{len(samples.prompts)} videos of latents {list(samples.latents.shape[1:])} from {config.latents}"
    prompts = read_prompts(config.text_prompt)
    checkpoint = choose_checkpoint(config.ckpt)
    shape = latent_shape(config, read_info(checkpoint))
    return f"{len(prompts)} videos of latents {list(shape)} from {checkpoint}, {config.steps} steps each"
