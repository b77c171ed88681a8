"""A folder of samples: its latents where they are those of its videos, and not what an earlier sampling left there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models.vae import FrozenVAE
from stages.evaluation.clip_sets import sampled
from stages.evaluation.inputs import read_samples
from stages.sampling.sampled_latents import SampledLatents
from stages.video import write_mp4

WHITE = np.full((8, 64, 64, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def vae() -> FrozenVAE:
    return FrozenVAE.load("tiny")


@pytest.mark.parametrize(
    ("prompt", "seed", "weights_hash", "settings", "used"),
    [
        ("a", 3, None, {"formats": ["mp4", "latents"]}, True),
        ("a", 3, None, {"formats": ["mp4"], "latents": "then/latents.safetensors"}, True),
        ("a", 3, None, {"formats": ["mp4"], "latents": ""}, False),
        ("a", 3, None, {"formats": ["mp4"], "latents": "run/samples/step-000100.safetensors"}, False),
        ("b", 3, None, {"formats": ["mp4", "latents"]}, False),
        ("a", 4, None, {"formats": ["mp4", "latents"]}, False),
        ("a", 3, "other", {"formats": ["mp4", "latents"]}, False),
    ],
)
def test_latents_are_those_of_the_videos_or_are_left(
    prompt: str, seed: int, weights_hash: str | None, settings: dict, used: bool, vae: FrozenVAE, tmp_path: Path
) -> None:
    """The latents are of black clips, the video is white."""
    black = torch.from_numpy(vae.encode(np.zeros_like(WHITE))).transpose(0, 1)[None]
    identity = vae.identity | ({"weights_hash": weights_hash} if weights_hash else {})
    SampledLatents(black, [prompt], [seed], 7, identity, 8).save(tmp_path / "latents.safetensors")
    write_mp4(tmp_path / "0000-a.mp4", WHITE, 8)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "summary.json").write_text(json.dumps({"samples": [{"file": "0000-a.mp4", "prompt": "a", "seed": 3}]}))
    frames, latents = sampled(tmp_path, read_samples(str(tmp_path)), vae).read(0)
    assert (frames.mean() < 64) == used == np.allclose(latents, black[0].transpose(0, 1), atol=0.01)
