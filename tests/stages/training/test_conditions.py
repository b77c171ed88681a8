"""What training and sampling tell the network of a clip besides its text: the same, in pixels and seconds."""

from typing import Any

import numpy as np
import pytest
import torch

from models.flow import FlowConfig, RectifiedFlow
from models.latents import LatentStats
from models.objective import ObjectiveConfig
from models.presets import preset
from models.transformer import Transformer
from models.weights import CheckpointInfo
from shards.loader import Batch
from shards.schema import Bucket
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Request, denoise
from stages.training.loss import LatentLoss

BUCKET, SHAPE = Bucket(48, 80, 3), (4, 3, 6, 10)  # and its latents, of a VAE that makes 8 x 8 pixels one
NULL_TEXT = torch.zeros(1, 64)


@pytest.mark.parametrize("told", ["train", "sample"])
def test_a_network_is_told_the_size_in_pixels_and_the_time_between_frames(told: str) -> None:
    model = Transformer(preset("tiny", {"size_conditioning": True, "fps_conditioning": True})).eval()
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, arguments, named: calls.append(named), with_kwargs=True)
    if told == "train":
        _loss(model)
    else:
        info = CheckpointInfo(0, model.config, ObjectiveConfig("velocity"), {"spatial_factor": 8}, {}, 1 / 24, ())
        denoise(model, info, [Request(torch.zeros(2, 64), NULL_TEXT, 0)], SHAPE, DenoiseConfig(steps=1))
    assert [(named["size"], named["frame_interval_s"]) for named in calls] == [((48, 80), 1 / 24)]


def _loss(model: Transformer) -> None:
    loss = LatentLoss(
        RectifiedFlow(FlowConfig()), LatentStats(1.0, 0.0), NULL_TEXT,
        frame_interval_s=1 / 24, caption_dropout=0.0, seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    channels, frames, height, width = SHAPE
    mean = np.zeros((1, frames, channels, height, width), np.float16)
    text, mask = np.zeros((1, 2, 64), np.float16), np.ones((1, 2), bool)
    batch = Batch(0, BUCKET, 1, ["a"], np.arange(1), mean, None, text, mask)
    loss.training(model, batch, model.config.tokens(*SHAPE[1:]))
