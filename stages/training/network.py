"""The transformer of a run, and its loss."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from models.attention_kernels import kernel_seconds, preferring
from models.compute import PRECISIONS
from models.latents import LatentStats
from models.objective import make_objective
from models.transformer import Transformer, TransformerConfig
from shards.schema import LATENTS
from stages.engine import Ranks, from_main
from stages.training.config import TrainConfig, transformer_config
from stages.training.loss import LatentLoss
from stages.training.source import Source


def build_model(config: TrainConfig, source: Source) -> Transformer:
    """The transformer for this data, with fresh weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    channels = source.vae["latent_channels"]
    objective = make_objective(config.objective)
    outputs = objective.out_channels(channels)
    sizes = {"in_channels": channels, "out_channels": outputs, "text_dim": source.text_encoder["dim"]}
    model = Transformer(transformer_config(config, **sizes), objective.prediction)
    model.activation_memory = config.train.activation_memory
    model.chunk_mlp(config.train.mlp_chunk_tokens)
    return model


def build_loss(config: TrainConfig, source: Source, device: torch.device) -> LatentLoss:
    """The training loss on this data."""
    return LatentLoss(
        make_objective(config.objective),
        LatentStats.of(source.vae),
        source.null_text,
        frame_interval_s=1 / source.fps,
        caption_dropout=config.train.caption_dropout,
        seed=config.seed,
        device=device,
        conditioning=config.conditioning,
    )


def settle_attention(config: TrainConfig, network: TransformerConfig, source: Source, ranks: Ranks) -> TrainConfig:
    """The config with the attention kernel that ``auto`` stands for on this GPU: the fastest for the largest bucket."""
    if config.train.attention != "auto" or ranks.device.type != "cuda":
        return config
    bucket = max(source.sample_tokens, key=lambda name: source.sample_tokens[name])
    frames = int(source.dataset.shapes(bucket, LATENTS)[0][0])
    dtype = PRECISIONS[config.train.precision]
    seconds = kernel_seconds(network, (1, frames, source.sample_tokens[bucket] // frames), ranks.device, dtype)
    fastest = from_main(min(seconds, key=lambda kernel: seconds[kernel], default=None))
    if fastest is None:
        return config
    told = ", ".join(f"{kernel} {1e3 * taken:.2f} ms" for kernel, taken in seconds.items())
    ranks.print(f"attention by {fastest}, the fastest for {bucket}: {told} a pair of blocks")
    return replace(config, train=replace(config.train, attention=fastest))


def attention_of(config: TrainConfig) -> AbstractContextManager[None]:
    """Within it the run's attention kernel is used."""
    return nullcontext() if config.train.attention == "auto" else preferring(config.train.attention)
