"""Prompts to latents: the text encoder and the transformer take turns in memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

from models.latents import LatentStats
from models.loading import load_transformer
from models.text import TextEncoder
from models.weights import CheckpointInfo, read_info, read_null_text
from stages.output import progress_bar
from stages.sampling.checkpoint import check_models, latent_shape
from stages.sampling.config import SampleConfig
from stages.sampling.denoise import denoise
from stages.sampling.sampled_latents import SampledLatents


@dataclass(frozen=True)
class Request:
    """One video to make."""

    prompt: str
    seed: int
    text: torch.Tensor  # [L, D]


def generate(config: SampleConfig, prompts: list[str], checkpoint: Path, device: torch.device) -> SampledLatents:
    """One sample a prompt, as the VAE decodes them."""
    info = read_info(checkpoint)
    shape = latent_shape(config, info)
    check_models(config.pretrained_model_path, info)
    requests = _encode_prompts(config, prompts, info, device)
    latents = LatentStats.of(info.vae).denormalise(_denoise_all(config, requests, checkpoint, info, shape, device))
    seeds = [request.seed for request in requests]
    return SampledLatents(latents, prompts, seeds, info.step, info.vae, 1 / info.frame_interval_s)


def _denoise_all(
    config: SampleConfig,
    requests: list[Request],
    checkpoint: Path,
    info: CheckpointInfo,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> torch.Tensor:
    """Normalised latents, [N, C, T, h, w]."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = load_transformer(checkpoint, weights=config.weights).to(device, dtype)
    null_text, _ = read_null_text(checkpoint)
    batches = [requests[i : i + config.batch_size] for i in range(0, len(requests), config.batch_size)]
    latents: list[torch.Tensor] = []
    with progress_bar(len(requests), "denoise", "video") as bar:
        for batch in batches:
            latents += denoise(
                model,
                info,
                [request.text for request in batch],
                null_text,
                [request.seed for request in batch],
                shape,
                steps=config.steps,
                guidance_scale=config.guidance_scale,
            ).cpu()
            bar.update(len(batch))
    return torch.stack(latents)


def _encode_prompts(
    config: SampleConfig, prompts: list[str], info: CheckpointInfo, device: torch.device
) -> list[Request]:
    max_tokens = info.text_encoder["max_tokens"]
    encoder = TextEncoder.load(config.pretrained_model_path, device, max_tokens=max_tokens)
    texts = encoder.encode(prompts)
    return [
        Request(prompt, config.seed + number, torch.from_numpy(text))
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
