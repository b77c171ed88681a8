"""What a video says of how it was made, and making it again from that."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipelines.command import run
from pipelines.sample import main
from stages.sampling.record import read_record
from stages.sampling.sampled_latents import SampledLatents
from stages.video import write_mp4
from tests.stages.sampling.test_files import frames
from tests.stages.small_run import small_run

PROMPTS = ["a red ball moves left", "a rather long prompt of a blue square that moves up and up", "ein Würfel, 100 %",
           "a cube"]  # fmt: skip
SIZES = ["height=32", "width=48", "frames=3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples of two batches, in every format, beside the run that they are from."""
    folder = tmp_path_factory.mktemp("made")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    arguments = [f"text_prompt={prompts}", f"ckpt={small_run(folder / 'run')}", f"output={folder / 'out'}", *SIZES,
                 "seed=40", "steps=3", "guidance_scale=3.5", "negative_prompt=[blue, '', a green ball, '']", "fps=6",
                 "batch_size=3", "guidance_interval=[0.3, 0.9]", "formats=[mp4, png, latents]"]  # fmt: skip
    assert run(main, arguments) == 0
    return folder


def video(made: Path, number: int) -> Path:
    (path,) = (made / "out").glob(f"{number:04d}-*.mp4")
    return path


def test_a_video_carries_prompt_seed_checkpoint_and_settings(made: Path) -> None:
    record = read_record(video(made, 2))
    assert (record["prompt"], record["seed"], record["step"]) == (PROMPTS[2], 42, 7)
    settings = record["settings"]
    assert (settings["text_prompt"], settings["seed"], settings["fps"]) == ([PROMPTS[2]], 42, 6)
    assert (settings["steps"], settings["guidance_scale"], settings["batch_size"]) == (3, 3.5, 3)
    assert Path(settings["ckpt"]) == made / "run" / "checkpoints" / "step-0000007"
    assert len(settings["ckpt_hash"]) == 32


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_video_is_made_again_to_the_last_bit(number: int, made: Path, tmp_path: Path) -> None:
    """Alone, though it was one of several. x264 may round otherwise from run to run: its pixels within a level."""
    assert run(main, ["--from-file", str(video(made, number)), f"output={tmp_path}"]) == 0
    (row,) = json.loads((tmp_path / "summary.json").read_text())["samples"]
    assert (row["prompt"], row["seed"]) == (PROMPTS[number], 40 + number)
    first, again = (
        SampledLatents.read(made / "out/latents.safetensors"),
        SampledLatents.read(tmp_path / "latents.safetensors"),
    )
    assert torch.equal(first.latents[number], again.latents[0])
    again_mp4 = tmp_path / row["file"]
    with Image.open(video(made, number).with_suffix(".png")) as one, Image.open(again_mp4.with_suffix(".png")) as two:
        for place in range(3):
            one.seek(place)
            two.seek(place)
            assert np.array_equal(np.asarray(one), np.asarray(two))
    assert np.abs(frames(video(made, number)) - frames(again_mp4)).max() <= 1
    assert read_record(again_mp4) == read_record(video(made, number))


def test_the_command_line_overrides_what_a_video_says(made: Path, tmp_path: Path) -> None:
    arguments = ["--from-file", str(video(made, 0)), "--prompt", "another", "seed=3", "frames=2", f"output={tmp_path}"]
    assert run(main, arguments) == 0
    record = read_record(tmp_path / "0000-another.mp4")
    assert (record["prompt"], record["seed"], len(frames(tmp_path / "0000-another.mp4"))) == ("another", 3, 2)


def test_other_weights_at_the_same_place_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(made / "run", changed)
    shutil.copy(changed / "checkpoints/step-0000007/model.safetensors",
                changed / "checkpoints/step-0000007/ema.safetensors")  # fmt: skip
    arguments = ["--from-file", str(video(made, 0)), f"output={tmp_path / 'out'}", f"ckpt={changed}"]
    assert run(main, arguments) == 2
    (told,) = capsys.readouterr().err.splitlines()
    expected = read_record(video(made, 0))["settings"]["ckpt_hash"]
    assert f"expected {expected}" in told and "ckpt_hash= (empty)" in told
    assert not (tmp_path / "out").exists()
    assert run(main, [*arguments, "ckpt_hash="]) == 0
    assert read_record(next((tmp_path / "out").glob("*.mp4")))["settings"]["ckpt_hash"] != expected
    moved = tmp_path / "moved"
    shutil.copytree(made / "run", moved)
    assert run(main, [*arguments[:-1], f"ckpt={moved}"]) == 0


def test_a_decoded_video_says_how_its_latents_were_made(made: Path, tmp_path: Path) -> None:
    latents = made / "out/latents.safetensors"
    assert run(main, [f"latents={latents}", f"output={tmp_path / 'own'}", "vae_batch_frames=2"]) == 0
    theirs = read_record(video(made, 2))["settings"]
    found = read_record(next((tmp_path / "own").glob("0002-*.mp4")))["settings"]
    changed = {"latents": str(latents), "vae_batch_frames": 2, "formats": ["mp4"], "fps": None}
    assert found == theirs | changed and found["steps"] == 3
    saved = yaml.safe_load((tmp_path / "own/config.yaml").read_text())
    assert saved["latents"] == str(latents) and not {"steps", "ckpt", "text_prompt"} & set(saved)

    trained = replace(SampledLatents.read(latents), settings=())  # as a training leaves them
    trained.save(tmp_path / "step.safetensors")
    assert run(main, [f"latents={tmp_path / 'step.safetensors'}", f"output={tmp_path / 'trained'}"]) == 0
    record = read_record(next((tmp_path / "trained").glob("0002-*.mp4")))
    assert (record["prompt"], record["seed"], record["step"]) == (PROMPTS[2], 42, 7)
    assert not {"steps", "guidance_scale", "ckpt", "sampler"} & set(record["settings"])


def test_files_that_cannot_be_made_again_are_one_clear_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, latents, text = tmp_path / "foreign.mp4", made / "out" / "latents.safetensors", tmp_path / "text.mp4"
    write_mp4(foreign, np.zeros((2, 32, 32, 3), np.uint8), 8, tags={"comment": "[1]"})
    text.write_text("no video")
    assert run(main, [f"latents={latents}", f"output={tmp_path / 'decoded'}"]) == 0
    decoded = next((tmp_path / "decoded").glob("0001-*.mp4"))
    assert read_record(decoded)["prompt"] == PROMPTS[1]
    capsys.readouterr()
    cases = {
        foreign: "does not say how it was made",
        text: "does not say how it was made",
        video(made, 0).with_suffix(".png"): "does not say how it was made",
        tmp_path / "absent.mp4": "no file at",
        decoded: f"with latents={latents}",
    }
    for path, message in cases.items():
        assert run(main, ["--from-file", str(path)]) == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert message in told
    assert run(main, ["--from-file", str(decoded), "--config", "configs/sample/shapes.yaml"]) == 2
    assert "expected one of them" in capsys.readouterr().err
