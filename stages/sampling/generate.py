"""Prompts to latents: the text encoder and the transformer take turns in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.latents import LatentStats
from models.weights import CheckpointInfo, read_info, read_null_text, some
from stages.errors import WorkError
from stages.output import progress_bar
from stages.sampling import ranks
from stages.sampling.checkpoint import check_models, check_ranks, check_sampler, latent_shape
from stages.sampling.config import SampleConfig
from stages.sampling.denoise import Given, Request, denoise
from stages.sampling.given import encode_given, given_frames
from stages.sampling.models import DTYPES, Models
from stages.sampling.prompts import one_each
from stages.sampling.sampled_latents import SampledLatents


def generate(config: SampleConfig, prompts: list[str], checkpoint: Path, models: Models) -> SampledLatents:
    """One sample a prompt, as the VAE decodes them."""
    info = read_info(checkpoint)
    shape = latent_shape(config, info)
    check_sampler(config, info)
    check_ranks(config, info)
    check_models(config.pretrained_model_path, info)
    given = _encode_given(config, len(prompts), info, shape, models)
    requests = _encode_prompts(config, prompts, checkpoint, info, models)
    requests = [replace(request, given=frames) for request, frames in zip(requests, given, strict=True)]
    latents = LatentStats.of(info.vae).denormalise(denoise_all(config, requests, checkpoint, info, shape, models))
    seeds = [request.seed for request in requests]
    return SampledLatents(latents, prompts, seeds, info.step, info.vae, 1 / info.frame_interval_s)


def denoise_all(
    config: SampleConfig,
    requests: list[Request],
    checkpoint: Path,
    info: CheckpointInfo,
    shape: tuple[int, int, int, int],
    models: Models,
) -> torch.Tensor:
    """Normalised latents, [N, C, T, h, w], of which each rank, or group of ranks, makes a share.

    Raises WorkError where they are not finite.
    """
    model = models.transformer(checkpoint, weights=config.weights).to(models.device, DTYPES[config.precision])
    if config.compile:
        model.compile_blocks(any_size=False)
    sharing = config.sequence_parallel
    model.shard_sequence(ranks.sequence_group(sharing))
    latents = torch.zeros(len(requests), *shape)
    batches = list(fixed_batches(requests, config.batch_size))[ranks.rank() // sharing :: ranks.world() // sharing]
    with progress_bar(len(batches) * config.steps, "denoise", "step") as bar:
        for batch in batches:
            filled = [requests[number] for number in batch]
            filled += filled[-1:] * (config.batch_size - len(batch))
            made = denoise(model, info, filled, shape, config, on_step=bar.update)
            if ranks.rank() % sharing == 0:  # the others of a group have made the same
                latents[list(batch)] = made[: len(batch)].cpu()
    ranks.summed(latents)
    check_finite(latents, requests)
    return latents


def check_finite(latents: torch.Tensor, requests: Sequence[Request]) -> None:
    """Raises WorkError where a sample is no picture."""
    seeds = [str(request.seed) for request, made in zip(requests, latents, strict=True) if not made.isfinite().all()]
    if seeds:
        raise WorkError(
            f"{len(seeds)} of {len(requests)} samples are not finite (seeds {some(seeds)}): guidance_scale may be too "
            "high, or T5's embedding of a prompt beyond float16, or the weights not finite themselves"
        )


def fixed_batches(requests: Sequence[Request], size: int) -> Iterator[tuple[int, ...]]:
    """The numbers of the requests that run together, at most ``size`` of one kind: one length of text, and frames
    given to all or none. So a sample always runs in the same shapes, and only those decide its last bits."""
    kinds: dict[tuple[int, bool], list[int]] = {}
    for number, request in enumerate(requests):
        kinds.setdefault((request.padded_tokens, request.given is None), []).append(number)
    for members in kinds.values():
        yield from (tuple(members[i : i + size]) for i in range(0, len(members), size))


def _encode_given(
    config: SampleConfig, count: int, info: CheckpointInfo, shape: tuple[int, int, int, int], models: Models
) -> Sequence[Given | None]:
    wanted = [given_frames(given, shape[1], info) for given in config.given.of_each(count)]
    if not any(wanted):
        return [None] * count
    return encode_given(wanted, models.vae(config.pretrained_model_path, models.device), info, shape)


def _encode_prompts(
    config: SampleConfig, prompts: list[str], checkpoint: Path, info: CheckpointInfo, models: Models
) -> list[Request]:
    negatives = one_each("negative_prompt", config.negative_prompt, len(prompts))
    max_tokens = info.text_encoder["max_tokens"]
    device, dtype = config.text_encoder.device or models.device, DTYPES[config.text_encoder.precision]
    encoder = models.text_encoder(config.pretrained_model_path, device, dtype, max_tokens=max_tokens)
    texts = [torch.from_numpy(text) for text in encoder.encode([*prompts, *negatives])]
    null_text, mask = read_null_text(checkpoint)
    return [
        Request(text, against if negative else null_text[mask], config.seed + number)
        for number, (text, negative, against) in enumerate(
            zip(texts[: len(prompts)], negatives, texts[len(prompts) :], strict=True)
        )
    ]
