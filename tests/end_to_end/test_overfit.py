"""The tiny preset learns one clip by heart: what it samples from the caption is that clip."""

import sys
from pathlib import Path

import torch

from models import load_transformer
from models.latents import LatentStats
from models.weights import read_info, read_null_text
from shards.dataset import Dataset
from shards.schema import LATENTS, MEAN, TEXT, text_column
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Request, denoise
from tests.running import free_port, run

BUCKET, COLUMN = "64x64x8", text_column("t5")
SEEDS = [0, 1, 2]


def test_a_clip_that_was_learnt_by_heart_comes_back(shards: Path, tmp_path: Path) -> None:
    """Some 31 dB after 240 steps, whatever the seeds."""
    assert psnr_of_a_clip_learnt_by_heart(shards, tmp_path) >= 25


def psnr_of_a_clip_learnt_by_heart(shards: Path, folder: Path) -> float:
    """The lowest of a few samples against the clip, dB; trains in ``folder``."""
    one = "caption == 'a red ball moves right'"
    run("env", f"MASTER_PORT={free_port()}", sys.executable, "pipelines/train.py",
        "--config", "configs/train/shapes.yaml", f"data.shards={shards}", f"data.filter={one}", f"output={folder}",
        "train.steps=240", "train.batch_size=4", "optimizer.warmup_steps=20")  # fmt: skip

    info, model = read_info(folder), load_transformer(folder)
    null_text = read_null_text(folder)
    clip, text = read_clip(shards, one)
    clip = LatentStats.of(info.vae).normalise(clip).transpose(0, 1)  # [C, T, h, w]
    shape = (clip.shape[0], clip.shape[1], clip.shape[2], clip.shape[3])
    requests = [Request(text, null_text, seed) for seed in SEEDS]
    sampled = denoise(model, info, requests, shape, DenoiseConfig(steps=20, guidance_scale=1.0))
    return min(psnr_db(one_sample, clip) for one_sample in sampled)


def read_clip(shards: Path, condition: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The only clip of which the condition is true: latents [T, C, h, w], text [L, D]."""
    dataset = Dataset.open(str(shards), text=[COLUMN], filter=condition)
    assert dataset.index(BUCKET).num_rows == 1
    latents, text = dataset.read(BUCKET, 0, LATENTS)[MEAN], dataset.read(BUCKET, 0, COLUMN)[TEXT]
    return torch.from_numpy(latents).float(), torch.from_numpy(text).float()


def psnr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Peak signal-to-noise ratio; the peak is the range of the expected values."""
    peak = expected.max() - expected.min()
    return float(10 * torch.log10(peak**2 / (found - expected).square().mean()))
