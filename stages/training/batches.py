"""How many clips a step takes of each bucket, where that follows from the memory: ``train.batch_size=auto``."""

from bisect import bisect_right
from dataclasses import replace
from typing import Any

import torch

from models.sequence_parallel import largest_share
from models.transformer import Transformer
from shards.node_tables import Share, own_table
from shards.schema import LATENTS
from stages.errors import ConfigError
from stages.training.config import TrainConfig, check
from stages.training.memory import StepMemory, peak_of, state_bytes
from stages.training.network import build_model
from stages.training.source import Source, open_source

# Of the memory that there is: the arithmetic is within 6 % of PyTorch's account, which leaves out what fragments.
USED_SHARE = 0.9


def settle_batches(config: TrainConfig, world: int, room: float, share: Share = own_table) -> TrainConfig:
    """The config with the batches that ``auto`` stands for; room: the bytes that each of ``world`` ranks can use.

    All buckets get the largest ``batch_tokens`` that fit with each of them, so that their steps cost alike; but not
    more than the largest bucket has. Raises ConfigError where not even one clip a rank fits.
    """
    if config.train.batch_size == "auto":
        multiple = world // config.train.sequence_parallel * config.train.gradient_accumulation
        config = _with(config, batch_size=multiple)  # one clip a rank
        source = open_source(config, share=share)
        with torch.device("meta"):
            model = build_model(config, source)
        steps, states = micro_batches(config, source, model, world), states_of(config, model, world)
        clips = {name: len(source.dataset.shapes(name, LATENTS)) for name in steps}
        room, most = USED_SHARE * room, max(clips[name] * source.sample_tokens[name] for name in steps) // multiple
        fitting = min(
            _most_samples(steps[name], room - states, most // tokens) * tokens
            for name, tokens in source.sample_tokens.items()
        )
        if not fitting:
            raise ConfigError(f"train.batch_size: found auto, and not one clip fits: {peak_of(steps, states, room)}")
        config = _with(config, batch_size=None, batch_tokens=fitting * multiple, batch_multiple=multiple)
    check(config, world)
    return config


def micro_batches(config: TrainConfig, source: Source, model: Transformer, world: int) -> dict[str, StepMemory]:
    """By bucket, what a rank has in memory at once."""
    settings, columns = config.train, config.data.text_columns()
    parts = world // settings.sequence_parallel * settings.gradient_accumulation
    return {
        bucket: StepMemory(
            model.config,
            size // parts,
            _share_tokens(source, model, bucket, settings.sequence_parallel),
            max(int(source.dataset.shapes(bucket, column)[:, 0].max()) for column in columns),
            settings.activation_memory,
            settings.mlp_chunk_tokens,
            settings.precision,
        )
        for bucket, size in source.order.batch_size.items()
    }


def _share_tokens(source: Source, model: Transformer, bucket: str, ranks: int) -> int:
    """Of one clip, on one of the ranks that share it."""
    frames, _, height, width = source.dataset.shapes(bucket, LATENTS)[0].tolist()
    return largest_share(ranks, frames, model.config.tokens(1, height, width))


def states_of(config: TrainConfig, model: Transformer, world: int) -> float:
    """The bytes of weights, gradients, moments and average on a rank."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters * state_bytes(config.deepspeed, config.train.precision, world)


def _with(config: TrainConfig, **settings: Any) -> TrainConfig:
    return replace(config, train=replace(config.train, **settings))


def _most_samples(step: StepMemory, room: float, most: int) -> int:
    """How many samples fit, at least one tried, at most ``most``."""
    counts = range(1, max(most, 1) + 1)
    return bisect_right(counts, room, key=lambda count: replace(step, samples=count).activation_bytes)
