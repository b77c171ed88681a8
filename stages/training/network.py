"""The transformer of a run."""

import torch

from models.objective import make_objective
from models.transformer import Transformer
from stages.training.config import TrainConfig, transformer_config
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
