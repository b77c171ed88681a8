"""Samples of stored captions against the sampler's own loop, one at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.latents import LatentStats
from models.loading import load_transformer
from models.weights import read_info
from shards.dataset import Dataset
from shards.schema import TEXT
from stages.evaluation.config import ClipsConfig
from stages.evaluation.own_samples import sample_captions
from stages.evaluation.trained import Execution, Trained
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Request, denoise
from tests.stages.evaluation.tiny_run import SIZE, T5, vae, write_dataset, write_run


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_sample_is_of_its_own_caption_and_seed(batch_size: int, tmp_path: Path) -> None:
    """Also where captions are fewer than samples: they come again with other seeds."""
    shards = write_dataset(tmp_path / "shards", 20)
    run = write_run(tmp_path / "run", shards)
    execution = Execution(torch.device("cpu"), "fp32", batch_size, "ema")
    held_out = Dataset.open(shards, text=T5, filter="split < 0.3")
    count = held_out.index(SIZE).num_rows
    config = ClipsConfig(samples=count + 2, steps=2, guidance_scale=3.0)
    found = sample_captions(config, Trained.open(str(run)), execution)

    captions = held_out.index(SIZE)["caption"].to_pylist()
    assert 2 < count == len(set(captions)) and sorted(found.prompts[:count]) == sorted(captions)
    assert found.prompts[count:] == found.prompts[:2] and found.seeds == list(range(count + 2))
    model, info = load_transformer(run), read_info(run)
    for seed in (0, 1, count):
        row = captions.index(found.prompts[seed])
        text = torch.from_numpy(held_out.read(SIZE, row, T5)[TEXT].astype(np.float32))
        request = Request(text, torch.zeros(1, 6), seed)
        alone = denoise(model, info, [request], (4, 8, 8, 8), DenoiseConfig(steps=2, guidance_scale=3.0))
        expected = LatentStats.of(vae()).denormalise(alone[0])
        assert torch.allclose(found.latents[seed], expected, atol=1e-3 * float(expected.std()))
    assert (found.step, found.fps) == (7, 8)
