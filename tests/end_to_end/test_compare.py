"""A comparison by the real train command: runs that are made once, and judged as a plain loop judges them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.loading import load_transformer
from models.weights import find_checkpoint
from shards.dataset import Dataset
from shards.schema import LATENTS, MEAN, TEXT, Bucket, text_column
from stages.training.held_out import draw_clips
from stages.training.loss import held_out_noise
from tests.stages.evaluation.test_compare import told, write
from tests.stages.training.mixed_dataset import VAE, mixed_dataset


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_dataset(tmp_path_factory.mktemp("compare") / "shards")


def test_runs_are_made_once_and_judged_by_a_plain_loop(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first try fails at its second run; the next goes on from there. The arms differ in nothing but words,
    and in the folder that the same clips are in."""
    copy = mixed_dataset(tmp_path / "copy")
    arms = {"all": [], "again": ["data.filter=split >= 0", f"data.shards={copy}"]}
    fails = tmp_path / "launcher"
    fails.write_text(f'#!/bin/sh\ncase $3 in *again*) exit 7;; esac\nexec {sys.executable} "$@"\n')
    fails.chmod(0o755)
    message = told(capsys, write(tmp_path, shards, arms, launcher=str(fails)), status=1)
    assert f"{tmp_path}/out/again/seed-0 ended with exit status 7" in message
    first = tmp_path / "out/all/seed-0/checkpoints/step-0000002/model.safetensors"
    made = first.stat().st_mtime_ns
    file = write(tmp_path, shards, arms)
    lines = told(capsys, file, status=0).splitlines()
    assert first.stat().st_mtime_ns == made
    assert lines[-2].endswith("+0.0000 beside all (95 % interval +0.0000 to +0.0000): not told apart")
    assert lines[-1] == f"report: {tmp_path}/out/report.html"

    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["arms"]["again"]["of_seeds"] == metrics["arms"]["all"]["of_seeds"]
    for seed in (0, 1):
        expected = plain_loss(tmp_path / f"out/again/seed-{seed}", shards)
        assert metrics["arms"]["again"]["of_seeds"][seed] == pytest.approx(expected, rel=1e-5)
    assert len(set(metrics["arms"]["all"]["of_seeds"])) == 2

    (tmp_path / "out/report.html").unlink()
    assert "run " not in told(capsys, file, status=0) and (tmp_path / "out/report.html").is_file()
    changed = write(tmp_path, shards, {**arms, "again": ["optimizer.lr=1e-5"]})
    assert "again/seed-0 was begun with other settings" in told(capsys, changed, status=2)


@torch.no_grad()
def plain_loss(run_folder: Path, shards: Path) -> float:
    """Of the averaged weights on the twelve held-out clips with the smallest hashes: rectified flow, written out."""
    model = load_transformer(find_checkpoint(run_folder), weights="ema").eval()
    dataset = Dataset.open(shards, filter="split < 0.2")
    losses = []
    for bucket, row in draw_clips(dataset, dataset.buckets, 12):
        size, key = Bucket.parse(bucket), dataset.keys(bucket, np.array([row]))[0]
        mean, text = (
            torch.from_numpy(dataset.read(bucket, row, column)[member]).float()
            for column, member in ((LATENTS, MEAN), (text_column("t5"), TEXT))
        )
        data = (mean * VAE["scaling_factor"]).transpose(0, 1)[None]
        for level in (1 / 6, 3 / 6, 5 / 6):
            noise = held_out_noise([key], level, data.shape[1:])
            output = model(
                (1 - level) * data + level * noise, torch.tensor([1000 * level]), text[None],
                torch.ones(1, len(text), dtype=torch.bool), frame_interval_s=1 / 8, size=(size.height, size.width),
            )  # fmt: skip
            losses.append((output - (noise - data)).square().mean().item())
    return float(np.mean(losses))
