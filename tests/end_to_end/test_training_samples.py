"""Samples during training: the same weights as without them, pictures at once, and videos by the sample command."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.loading import load_transformer
from models.vae import FrozenVAE
from models.weights import read_info, read_null_text
from pipelines.command import run as run_command
from pipelines.sample import main
from shards.dataset import Dataset
from shards.loader import DataConfig
from stages.sampling.sampled_latents import SampledLatents
from stages.training.held_out import ValidationConfig
from stages.training.prompts import Prompts
from tests.end_to_end.conftest import Road, train_settings
from tests.end_to_end.test_sample import frames
from tests.resident import ResidentRanks
from tests.running import TRAIN

PROMPTS, STEPS, GUIDANCE = 3, 2, 3.0
SETTINGS = [
    "validation.sample_every=1", f"validation.sample_prompts={PROMPTS}", f"validation.sample_steps={STEPS}",
    f"validation.sample_guidance_scale={GUIDANCE}",
]  # fmt: skip


def prompts_of(shards: Path, holdout: float = 0.0) -> Prompts:
    config = ValidationConfig(holdout, sample_every=1, sample_prompts=PROMPTS, sample_steps=STEPS,
                              sample_guidance_scale=GUIDANCE)  # fmt: skip
    prompts = Prompts.open(config, DataConfig(str(shards)), ["64x64x8"], 0, 1)
    assert prompts is not None and len(prompts.captions) == PROMPTS
    return prompts


def assert_samples_of(checkpoint: Path, prompts: Prompts, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks have sampled is what one process makes of the checkpoint's weights."""
    monkeypatch.setattr("stages.training.prompts.stacked_on_main", lambda tensor: tensor[None])
    info, model = read_info(checkpoint), load_transformer(checkpoint, "model")
    expected = prompts.sample(model, info, read_null_text(checkpoint), info.step)
    found = SampledLatents.read(file)
    assert expected is not None and expected.latents.std() > 1
    torch.testing.assert_close(found.latents, expected.latents, rtol=2e-3, atol=2e-3)  # it is float16
    assert (found.prompts, found.seeds, found.step) == (prompts.captions, [0, 1, 2], info.step)
    assert (found.vae, found.fps) == (info.vae, 8.0)


@pytest.fixture(scope="module")
def resumed(road: Road, resident_ranks: ResidentRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The road's run, gone on with from step 2 on two ranks and sampled at each step."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    shutil.copytree(road.run, folder)
    shutil.rmtree(folder / "checkpoints" / "step-0000004")
    done = resident_ranks.run(2, TRAIN, *train_settings(road.shards, folder), *SETTINGS)
    assert "samples the captions of 3 training clips of 64x64x8 every 1 steps" in done.stdout
    return folder


def test_sampling_changes_no_bit_of_the_training(road: Road, resumed: Path) -> None:
    for name in ("model", "ema", "exp_avg", "exp_avg_sq"):
        ours, theirs = (folder / "checkpoints/step-0000004" / f"{name}.safetensors" for folder in (resumed, road.run))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_two_ranks_sample_what_one_would(road: Road, resumed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((resumed / "samples").iterdir())
    assert [file.name for file in files] == ["step-0000003.safetensors", "step-0000004.safetensors"]
    assert_samples_of(resumed / "checkpoints/step-0000004", prompts_of(road.shards), files[1], monkeypatch)


def test_tensorboard_shows_the_samples_and_the_clips_that_they_are_captions_of(road: Road, resumed: Path) -> None:
    board = EventAccumulator(str(resumed / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert board.Tags()["images"] == ["sampled_clips", "sampled_clips_video", "samples", "samples_video"]
    assert [picture.step for picture in board.Images("samples")] == [3, 4]
    rgb_map = np.array(Dataset.open(road.shards).manifest.latent_rgb)
    sampled = SampledLatents.read(resumed / "samples/step-0000004.safetensors").latents.transpose(1, 2).numpy()
    for name, latents in (("samples", sampled), ("sampled_clips", prompts_of(road.shards).clips)):
        with Image.open(io.BytesIO(board.Images(name)[-1].encoded_image_string)) as image:
            picture = np.asarray(image).astype(int)
        for row in range(PROMPTS):
            for frame in range(8):
                top, left = 18 + row * 274 + 16, 4 + frame * 260 + 16  # 8 x 8 latents, 32 pixels each
                shown = picture[top : top + 256 : 32, left : left + 256 : 32]
                colours = latents[row, frame].transpose(1, 2, 0).astype(float) @ rgb_map[:-1] + rgb_map[-1]
                assert np.abs(shown - (colours.clip(0, 1) * 255)).max() <= 1, name


def test_the_sample_command_decodes_them(resumed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = resumed / "samples/step-0000004.safetensors"
    given = [f"latents={file}", f"output={tmp_path / 'videos'}"]
    assert run_command(main, [*given, "--dry-run"]) == 0
    assert f"3 videos of latents [4, 8, 8, 8] from {file}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    tmp_path = tmp_path / "videos"
    assert run_command(main, given) == 0
    assert f"3 videos from {file}, in {tmp_path}" in capsys.readouterr().out
    samples, summary = SampledLatents.read(file), json.loads((tmp_path / "summary.json").read_text())
    assert (summary["latents"], summary["step"]) == (str(file), 4)
    assert [row["prompt"] for row in summary["samples"]] == samples.prompts
    assert [row["seed"] for row in summary["samples"]] == [0, 1, 2]
    assert (tmp_path / "contact_sheet.png").is_file() and (tmp_path / "config.yaml").is_file()
    vae = FrozenVAE.load("tiny")
    for row, latents in zip(summary["samples"], samples.latents, strict=True):
        shown = frames(tmp_path / row["file"])
        assert shown.shape == (8, 64, 64, 3)
        assert np.abs(shown - vae.decode(latents.transpose(0, 1)).astype(int)).mean() < 12  # H.264's own loss


def test_the_command_samples_a_caption_of_the_run_alike(resumed: Path, tmp_path: Path) -> None:
    """From the same weights, with the text encoder: the caption's embedding in the shards is no other."""
    samples = SampledLatents.read(resumed / "samples/step-0000004.safetensors")
    given = [f"text_prompt={samples.prompts[:1]}", f"steps={STEPS}", f"guidance_scale={GUIDANCE}", "weights=model"]
    assert run_command(main, [*given, f"ckpt={resumed}", f"output={tmp_path / 'prompt'}"]) == 0
    file = resumed / "samples/step-0000004.safetensors"
    assert run_command(main, [f"latents={file}", f"output={tmp_path / 'latents'}"]) == 0
    ours, theirs = (frames(next((tmp_path / name).glob("0000-*.mp4"))) for name in ("prompt", "latents"))
    assert np.abs(ours - theirs).mean() < 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["latents=FILE", "text_prompt=a ball"], "found text_prompt and latents (FILE), expected one of them"),
        ([], "no prompts: give --prompt"),
        (["latents=no/such/file"], "no file at no/such/file"),
        (["latents=WEIGHTS"], "WEIGHTS holds no samples of a run"),
        (["latents=JUNK"], "JUNK holds no samples of a run"),
        (["latents=FILE", "pretrained_model_path=OTHER"], "has another VAE than FILE: weights_hash "),
    ],
)
def test_bad_input_is_one_clear_line(
    settings: list[str], message: str, resumed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, junk = tmp_path / "other", tmp_path / "junk"
    shutil.copytree(Path("models/tiny"), other)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))
    junk.write_bytes(b"junk")
    places = {
        "FILE": str(resumed / "samples/step-0000004.safetensors"),
        "WEIGHTS": str(resumed / "checkpoints/step-0000004/model.safetensors"),
        "JUNK": str(junk),
        "OTHER": str(other),
    }
    for name, place in places.items():
        settings, message = [text.replace(name, place) for text in settings], message.replace(name, place)
    assert run_command(main, [*settings, f"ckpt={resumed}", f"output={tmp_path / 'out'}"]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ") and message in told
