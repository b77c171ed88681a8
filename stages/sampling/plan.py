"""What a command will make of prompts, checked as a whole before anything is made or written."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.weights import CheckpointInfo, read_info
from shards.schema import Bucket
from stages.sampling.checkpoint import (
    check_models,
    check_ranks,
    check_sampler,
    choose_checkpoint,
    latent_shape,
    video_size,
)
from stages.sampling.config import MOST_TOGETHER, GivenToOne, SampleConfig
from stages.sampling.files import file_stems
from stages.sampling.given import given_frames, hashed
from stages.sampling.prompts import one_each, read_prompts
from stages.sampling.record import check_hash, checkpoint_hash
from stages.sampling.sampled_latents import SampledLatents


@dataclass(frozen=True)
class Asked:
    """One sample."""

    prompt: str
    negative_prompt: str
    given: GivenToOne
    seed: int

    def settings(self, config: SampleConfig) -> dict[str, Any]:
        """Those that make it alone."""
        alone = replace(
            config,
            text_prompt=[self.prompt],
            negative_prompt=self.negative_prompt,
            given=self.given,
            seed=self.seed,
            samples_per_prompt=1,
            names="numbered",
        )
        return {name: value for name, value in asdict(alone).items() if name != "output"}


@dataclass(frozen=True, eq=False)
class Plan:
    """config: with all that was open decided, and local files by their whole paths. shape: [C, T, h, w] of latents."""

    config: SampleConfig
    asked: list[Asked]
    stems: list[str]
    checkpoint: Path
    info: CheckpointInfo
    shape: tuple[int, int, int, int]

    @property
    def size(self) -> Bucket:
        return video_size(self.config, self.info)

    def sampled(self, numbers: Sequence[int], latents: torch.Tensor) -> SampledLatents:
        """Some of the samples, with their latents [N, C, T, h, w] as the VAE decodes them."""
        asked = [self.asked[number] for number in numbers]
        return SampledLatents(
            latents,
            [one.prompt for one in asked],
            [one.seed for one in asked],
            self.info.step,
            self.info.vae,
            1 / self.info.frame_interval_s,
            [one.settings(self.config) for one in asked],
        )


def plan_samples(config: SampleConfig) -> Plan:
    """Raises ConfigError, or WeightsError, for whatever keeps the samples from being made."""
    config = replace(config.located(), given=config.given.located())
    asked = _asked(config)
    stems = file_stems([one.prompt for one in asked], config.names)
    checkpoint = choose_checkpoint(config.ckpt)
    info = read_info(checkpoint)
    shape = latent_shape(config, info)
    check_sampler(config, info)
    check_ranks(config, info)
    for one in asked:
        given_frames(one.given, shape[1], info)
    check_models(config.pretrained_model_path, info)
    found = checkpoint_hash(checkpoint, config.weights)
    check_hash(config, checkpoint, found)
    batch_size = config.batch_size or min(MOST_TOGETHER, len(asked))
    config = replace(config, ckpt=str(checkpoint.absolute()), ckpt_hash=found, batch_size=batch_size)
    return Plan(config, asked, stems, checkpoint, info, shape)


def _asked(config: SampleConfig) -> list[Asked]:
    prompts = read_prompts(config.text_prompt)
    negatives = one_each("negative_prompt", config.negative_prompt, len(prompts))
    given = config.given.of_each(len(prompts))
    with_hash = {one: hashed(one) for one in set(given)}
    repeated = [
        (prompt, negative, with_hash[files])
        for prompt, negative, files in zip(prompts, negatives, given, strict=True)
        for _ in range(config.samples_per_prompt)
    ]
    return [Asked(*each, seed=config.seed + number) for number, each in enumerate(repeated)]
