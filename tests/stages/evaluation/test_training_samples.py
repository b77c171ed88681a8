"""Samples that a run left, beside each other on its page: decoded, or as the linear map shows them."""

import base64
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from models.identity import vae_identity
from models.vae import FrozenVAE
from stages.errors import ConfigError
from stages.evaluation.evaluate import evaluate
from stages.evaluation.training_samples import TrainingSamples, evenly, read_training_samples
from stages.sampling.sampled_latents import SampledLatents
from stages.shapes.render import seen
from tests.stages.evaluation.finished_run import finished_run
from tests.stages.evaluation.test_evaluate import Reader

RGB_MAP = [[0.1, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.1], [0.0, 0.0, 0.0], [0.5, 0.4, 0.3]]


def leave(run: Path, step: int, prompts: list[str], vae: dict | None = None) -> torch.Tensor:
    """A file of samples, as a run leaves it; returns their latents [N, C, T, h, w]."""
    latents = torch.randn((len(prompts), 4, 3, 8, 8), generator=torch.Generator().manual_seed(step)).half().float()
    (run / "samples").mkdir(parents=True, exist_ok=True)
    seeds = list(range(len(prompts)))
    samples = SampledLatents(latents, prompts, seeds, step, vae or vae_identity("tiny"), 8.0)
    samples.save(run / f"samples/step-{step:07d}.safetensors")
    return latents


def shown(uri: str, file: Path) -> np.ndarray:
    file.write_bytes(base64.b64decode(uri.removeprefix("data:video/mp4;base64,")))
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def read(run: Path, rgb_map: list[list[float]] = RGB_MAP) -> TrainingSamples:
    found = read_training_samples(str(run), "tiny", rgb_map)
    assert found
    return found


def test_they_are_decoded_by_the_vae_that_is_theirs(tmp_path: Path):
    latents = leave(tmp_path, 100, ["a", "b"])
    found = read(tmp_path)
    assert found.decoded and (found.width, found.height) == (160, 160)
    decoded = FrozenVAE.load("tiny").decode(latents[1].transpose(0, 1)).astype(int)
    video = shown(found.rows[1].videos[100], tmp_path / "clip.mp4")
    assert video.shape == (3, 160, 160, 3)
    centres = ((np.arange(64) + 0.5) * 2.5).astype(int)  # of each pixel of the sample, enlarged
    assert np.abs(video[:, centres][:, :, centres] - decoded).mean() < 8  # H.264 halves the colours' resolution


def test_with_another_vae_the_linear_map_shows_them(tmp_path: Path):
    latents = leave(tmp_path, 100, ["a"], {**vae_identity("tiny"), "weights_hash": "other"})
    found = read(tmp_path)
    assert not found.decoded
    video = shown(found.rows[0].videos[100], tmp_path / "clip.mp4")[:, 10::20, 10::20]  # 8 x 8 latents, 20 pixels each
    colours = np.einsum("cthw,cr->thwr", latents[0].numpy(), RGB_MAP[:-1]) + RGB_MAP[-1]
    assert np.abs(video - 255 * colours.clip(0, 1)).mean() < 8
    assert read_training_samples(str(tmp_path), "tiny", []) is None  # a dataset without a map


def test_the_first_the_last_and_some_between_are_shown(tmp_path: Path):
    for step in range(100, 2100, 100):
        leave(tmp_path, step, ["a"])
    found = read(tmp_path)
    assert len(found.steps) == 6 and found.steps == sorted(found.rows[0].videos)
    assert (found.steps[0], found.steps[-1], found.left_out) == (100, 2000, 14)
    gaps = np.diff(found.steps)
    assert gaps.min() >= 300 and gaps.max() <= 400
    assert [evenly(count, 6) for count in (1, 2, 6)] == [[0], [0, 1], list(range(6))]


def test_prompts_that_change_get_rows_of_their_own(tmp_path: Path):
    leave(tmp_path / "run", 100, ["a", "b", "c", "d", "e"])
    leave(tmp_path / "run", 200, ["a", "x"])
    rows = {(row.prompt, row.seed): sorted(row.videos) for row in read(tmp_path / "run").rows}
    assert rows == {("a", 0): [100, 200], ("b", 1): [100], ("c", 2): [100], ("d", 3): [100], ("x", 1): [200]}


def test_the_page_of_a_run_shows_them_by_step(tmp_path: Path):
    config = finished_run(tmp_path, seen()[:1])
    without = Reader(Path(evaluate(config)["report"]))
    assert "Samples while training" not in without.text and len(without.all("video")) == 1
    leave(tmp_path / "run", 1200, ["a dog <b>", "a cat"])
    leave(tmp_path / "run", 2400, ["a dog <b>"])
    page = Reader(Path(evaluate(config)["report"]))
    labels = [video["aria-label"] for video in page.all("video")]
    assert labels[1:] == [
        "a dog <b>, seed 0, step 1200", "a dog <b>, seed 0, step 2400", "a cat, seed 1, step 1200",
    ]  # fmt: skip
    assert "step 1,200" in page.text and "not sampled" in page.text and "decoded by the VAE" in page.text


def test_the_held_out_loss_has_a_chart_where_it_was_logged(tmp_path: Path):
    config = finished_run(tmp_path, seen()[:1])
    assert "Held-out loss" not in Reader(Path(evaluate(config)["report"])).text
    log = tmp_path / "run/metrics.jsonl"
    lines = log.read_text().splitlines()
    for place in (59, 119):
        lines[place] = lines[place].replace('"mfu": null', '"mfu": null, "validation_loss": 0.25')
    log.write_text("\n".join(lines) + "\n")
    page = Reader(Path(evaluate(config)["report"]))
    assert "Held-out loss" in page.text and "0.25 at step 2,400" in page.text


def test_a_file_that_holds_no_samples_is_named(tmp_path: Path):
    leave(tmp_path, 100, ["a"])
    (tmp_path / "samples/step-0000200.safetensors").write_bytes(b"junk")
    with pytest.raises(ConfigError, match=r"step-0000200\.safetensors holds no samples of a run"):
        read(tmp_path)
