"""Prompts to latents: the text encoder and the transformer take turns in memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from models.compute import PRECISIONS
from models.latents import LatentStats
from models.weights import CheckpointInfo, read_null_text, some
from stages.errors import WorkError
from stages.launched import rank, tell, world
from stages.output import progress_bar
from stages.sampling import ranks
from stages.sampling.config import SampleConfig
from stages.sampling.denoise import Given, Request, denoise
from stages.sampling.files import resumes
from stages.sampling.given import encode_given, given_frames
from stages.sampling.models import Models
from stages.sampling.plan import Asked, Plan

PORTION_BATCHES = 8
"""Of each rank, or group of ranks, between two times that files are written: a kill costs less, and loading the
transformer and the VAE again does not count."""


def requests_of(plan: Plan, numbers: Sequence[int], models: Models) -> list[Request]:
    """Of some samples what the transformer is told; text and given frames are encoded for all of them."""
    asked = [plan.asked[number] for number in numbers]
    given = _encode_given(plan, asked, models)
    texts = _encode_prompts(plan, asked, models)
    null_text = read_null_text(plan.checkpoint)
    return [
        Request(text, against if one.negative_prompt else null_text, one.seed, frames)
        for one, text, against, frames in zip(asked, texts[: len(asked)], texts[len(asked) :], given, strict=True)
    ]


def generate(plan: Plan, requests: list[Request], models: Models) -> torch.Tensor:
    """[N, C, T, h, w], as the VAE decodes them."""
    latents = denoise_all(plan.config, requests, plan.checkpoint, plan.info, plan.shape, models)
    return LatentStats.of(plan.info.vae).denormalise(latents)


def portions(requests: Sequence[Request], config: SampleConfig) -> Iterator[list[int]]:
    """The numbers of requests that are made and written before the next: of whole batches, or all where their files
    do not tell a later command that they are there."""
    batches = list(fixed_batches(requests, config.samples_together))
    groups = world() // config.sequence_parallel
    together = PORTION_BATCHES * groups if resumes(config.formats) else len(batches)
    for start in range(0, len(batches), together or 1):
        yield sorted(number for batch in batches[start : start + together] for number in batch)


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
    model = models.transformer(checkpoint, weights=config.weights).to(models.device, PRECISIONS[config.precision])
    if config.compile:
        model.compile_blocks(any_size=False)
    sharing = config.sequence_parallel
    model.shard_sequence(ranks.sequence_group(sharing))
    latents = torch.zeros(len(requests), *shape)
    batches = list(fixed_batches(requests, config.samples_together))
    batches = batches[rank() // sharing :: world() // sharing]
    with progress_bar(len(batches) * config.steps, "denoise", "step") as bar:
        for batch in batches:
            filled = [requests[number] for number in batch]
            filled += filled[-1:] * (config.samples_together - len(batch))
            made = denoise(model, info, filled, shape, config, on_step=bar.update)
            if rank() % sharing == 0:  # the others of a group have made the same
                latents[list(batch)] = made[: len(batch)].cpu()
    ranks.summed(latents)
    _check_finite(latents, requests)
    return latents


def _check_finite(latents: torch.Tensor, requests: Sequence[Request]) -> None:
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


def _encode_given(plan: Plan, asked: Sequence[Asked], models: Models) -> Sequence[Given | None]:
    wanted = [given_frames(one.given, plan.shape[1], plan.info) for one in asked]
    if not any(wanted):
        return [None] * len(asked)
    return encode_given(wanted, models.vae_for(plan.config), plan.info, plan.shape)


def _encode_prompts(plan: Plan, asked: Sequence[Asked], models: Models) -> list[torch.Tensor]:
    """[L, D] of each prompt, then of each negative prompt."""
    config, max_tokens = plan.config, plan.info.text_encoder["max_tokens"]
    device, dtype = config.text_encoder.device or models.device, PRECISIONS[config.text_encoder.precision]
    encoder = models.text_encoder(config.pretrained_model_path, device, dtype, max_tokens=max_tokens)
    prompts = [*(one.prompt for one in asked), *(one.negative_prompt for one in asked)]
    cut = encoder.too_long(prompts)
    if cut:
        tell(f"{len(cut)} prompts are cut after {max_tokens} tokens, such as {cut[0][:60]!r}...")
    if config.guidance_scale == 1 and any(one.negative_prompt for one in asked):
        tell("negative_prompt changes nothing: there is no guidance with guidance_scale 1")
    return [torch.from_numpy(text) for text in encoder.encode(prompts)]
