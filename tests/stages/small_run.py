"""A run that nobody trained: a checkpoint of random weights for the embedded VAE and text encoder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.flow import FlowConfig
from models.identity import text_encoder_identity, vae_identity
from models.objective import ObjectiveConfig
from models.transformer import TransformerConfig
from models.weights import CheckpointInfo, save_checkpoint
from tests.models.networks import random_transformer

CONFIG = TransformerConfig(num_layers=2, num_heads=2, head_dim=12, text_dim=64, sample_size=8)


def small_run(folder: Path, seeds: dict[str, int] | None = None, **changes: Any) -> Path:
    """A run with one checkpoint, whose weights of each name are drawn from a seed."""
    info = CheckpointInfo(
        step=7,
        transformer=CONFIG,
        objective=ObjectiveConfig("velocity", FlowConfig(shift_tokens=(64,), shift_values=(3.0,))),
        vae=vae_identity("tiny"),
        text_encoder=text_encoder_identity("tiny"),
        frame_interval_s=1 / 8,
        buckets=("64x64x4", "64x64x2", "32x32x4"),
    )
    info = replace(info, **changes)
    checkpoint = folder / "checkpoints" / "step-0000007"
    checkpoint.mkdir(parents=True)
    seeds = seeds or {"model": 0, "ema": 1}
    weights = {name: random_transformer(info.transformer, seed).state_dict() for name, seed in seeds.items()}
    save_checkpoint(checkpoint, info, weights, torch.zeros(1, 64))
    return folder
