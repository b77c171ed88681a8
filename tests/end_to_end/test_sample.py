"""The sample command: files that open anywhere, the same video whatever the batch, and clear refusals."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from models.objective import ObjectiveConfig
from models.presets import preset
from models.transformer import Transformer
from models.weights import CheckpointInfo
from pipelines.command import run as run_command
from pipelines.sample import main
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Request, denoise
from tests.end_to_end.conftest import Road


def test_samples_are_videos_that_browsers_play(road: Road) -> None:
    summary = json.loads((road.samples / "summary.json").read_text())
    assert [row["seed"] for row in summary["samples"]] == [0, 1, 2]
    assert [row["prompt"] for row in summary["samples"]][:2] == ["a red ball moves left", "a blue square moves up"]
    for row in summary["samples"]:
        with av.open(str(road.samples / row["file"])) as container:
            stream = container.streams.video[0]
            assert (stream.codec.name, stream.pix_fmt, stream.width, stream.height) == ("h264", "yuv420p", 64, 64)
            assert (float(stream.average_rate or 0), stream.frames) == (8.0, 8)
    with Image.open(road.samples / "contact_sheet.png") as sheet:
        assert sheet.width > 8 * 64 and sheet.height > 3 * 64


def test_the_same_prompt_and_seed_give_the_same_video(road: Road, tmp_path: Path) -> None:
    given = ["--prompt", "a blue square moves up", "seed=1", f"ckpt={road.run}", f"output={tmp_path}"]
    assert run_command(main, [*given, "steps=2", "batch_size=1"]) == 0
    first, again = road.samples / "0001-a-blue-square-moves-up.mp4", tmp_path / "0000-a-blue-square-moves-up.mp4"
    assert np.abs(frames(first) - frames(again)).mean() < 1  # of 255 levels; latents agree within 1e-3, see below


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_sample_does_not_depend_on_its_batch(guidance_scale: float) -> None:
    torch.manual_seed(0)
    model = Transformer(preset("tiny")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    info = CheckpointInfo(0, model.config, ObjectiveConfig("velocity"), {"spatial_factor": 8}, {}, 1 / 8, ())
    texts, null = [torch.randn(length, 64) for length in (3, 11, 1, 6)], torch.randn(1, 64)

    def latents(chosen: list[int]) -> torch.Tensor:
        requests = [Request(texts[number], null, seed=number) for number in chosen]
        return denoise(model, info, requests, (4, 8, 8, 8), DenoiseConfig(steps=6, guidance_scale=guidance_scale))

    together = latents([0, 1, 2, 3])
    assert together.std() > 0.1 and not torch.allclose(together[0], together[1], atol=0.1)
    for number in range(4):
        torch.testing.assert_close(latents([number])[0], together[number], rtol=0, atol=1e-3)
    torch.testing.assert_close(latents([3, 1])[1], together[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["text_prompt=[]"], "no prompts"),
        (["text_prompt=EMPTY.txt"], "no prompts"),
        (["text_prompt=no/such/file.txt"], "no prompt file at no/such/file.txt"),
        (["ckpt=no/run"], "no/run does not exist"),
        (["pretrained_model_path=no/models/here"], "no/models/here"),
        (["pretrained_model_path=OTHER"], "has another VAE than the checkpoint"),
        (["height=60"], "multiples of 16"),
        (["frames=0"], "frames: found 0, expected at least 1"),
        (["batch_size=0"], "batch_size: found 0"),
        (["sampler=ddim"], "sampler: found 'ddim', expected one of euler, unipc: the model predicts velocity"),
        (["negative_prompt=[blurred, dark]"], "negative_prompt: found 2 for 1 prompts"),
        (["guidance_interval=[0.8, 0.2]"], "guidance_interval: found 0.8 to 0.2"),
        (["guidence_scale=2"], "did you mean 'guidance_scale'"),
    ],
)
def test_bad_input_is_one_clear_line(
    settings: list[str], message: str, road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    other = tmp_path / "other"
    shutil.copytree(Path("models/tiny"), other)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))
    settings = [text.replace("EMPTY", str(tmp_path / "empty")).replace("OTHER", str(other)) for text in settings]
    given = ["text_prompt=a ball", f"ckpt={road.run}", f"output={tmp_path / 'out'}", *settings]
    assert run_command(main, given) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ") and message in told
