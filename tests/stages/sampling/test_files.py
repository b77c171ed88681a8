"""The files of a sample: names, formats, and what VBench's evaluator finds."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from models.source import TINY_FOLDER
from pipelines.command import run
from pipelines.sample import main
from stages.errors import ConfigError
from stages.sampling.denoise import denoise
from stages.sampling.files import file_stems
from stages.sampling.sampled_latents import SampledLatents
from tests.stages.small_run import small_run

PROMPTS = ["a red ball moves left", "In a still frame, a stop sign.", "The bund Shanghai, by Hokusai (Ukiyo-e)"]


def sample(*settings: str, status: int = 0) -> None:
    assert run(main, ["steps=2", "batch_size=2", "height=32", "width=32", "frames=3", *settings]) == status


def test_vbench_finds_every_video(tmp_path: Path) -> None:
    """As vbench/__init__.py looks for them: the suffix of whatever os.listdir gives first, then PROMPT-INDEX."""
    (tmp_path / "vbench.txt").write_text("\n".join(PROMPTS) + "\n")
    run_folder, output = small_run(tmp_path / "run"), tmp_path / "out"
    sample(f"text_prompt={tmp_path / 'vbench.txt'}", "names=vbench", "samples_per_prompt=5", "seed=100",
           f"ckpt={run_folder}", f"output={output}")  # fmt: skip
    names = {file.name for file in (output / "vbench").iterdir()}
    assert {Path(name).suffix for name in names} == {".mp4"}
    assert names == {f"{prompt}-{index}.mp4" for prompt in PROMPTS for index in range(5)}
    assert {re.sub(r"-\d+$", "", Path(name).stem) for name in names} == set(PROMPTS)  # its get_prompt_from_filename
    rows = json.loads((output / "summary.json").read_text())["samples"]
    assert [row["seed"] for row in rows] == list(range(100, 115))
    assert [row["file"] for row in rows[4:6]] == [f"vbench/{PROMPTS[0]}-4.mp4", f"vbench/{PROMPTS[1]}-0.mp4"]
    pictures = [frames(output / row["file"]) for row in rows[:5]]
    assert all(np.abs(pictures[0] - other).mean() > 1 for other in pictures[1:])  # of five seeds


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def test_a_prompt_that_is_listed_twice_gets_names_of_its_own() -> None:
    assert file_stems(["a", "b", "a"], "vbench") == ["vbench/a-0", "vbench/b-0", "vbench/a-1"]
    assert file_stems(["A b!", "a b"], "numbered") == ["0000-a-b", "0001-a-b"]


@pytest.mark.parametrize("prompt", ["either/or", "x" * 212, "夜" * 71])
def test_a_prompt_that_cannot_name_a_file_is_refused_before_anything_is_made(prompt: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names=vbench: .* cannot name a file.*names=numbered"):
        file_stems([prompt], "vbench")
    sample(f"text_prompt=[{prompt}]", "names=vbench", f"ckpt={small_run(tmp_path / 'run')}",
           f"output={tmp_path / 'out'}", status=2)  # fmt: skip
    assert not (tmp_path / "out").exists()
    sample(f"text_prompt=[{prompt[:70]}]", f"ckpt={tmp_path / 'run'}", f"output={tmp_path / 'out'}")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    sample(f"text_prompt=[{'x' * 211}]", "names=vbench", f"ckpt={small_run(tmp_path / 'run')}",
           f"output={tmp_path / 'out'}", "formats=[mp4, gif]")  # fmt: skip
    assert len(list((tmp_path / "out" / "vbench").iterdir())) == 2


def test_every_format_shows_the_same_sample(tmp_path: Path) -> None:
    output = tmp_path / "out"
    sample("text_prompt=[one, two]", f"ckpt={small_run(tmp_path / 'run')}", f"output={output}", "fps=12",
           "formats=[png, mp4, gif, latents]")  # fmt: skip
    rows = json.loads((output / "summary.json").read_text())["samples"]
    assert [row["file"] for row in rows] == ["0000-one.png", "0001-two.png"]
    kept = SampledLatents.read(output / "latents.safetensors")
    assert (kept.prompts, kept.seeds, list(kept.latents.shape)) == (["one", "two"], [0, 1], [2, 4, 3, 4, 4])
    for stem in ("0000-one", "0001-two"):
        with Image.open(output / f"{stem}.png") as image:
            first = np.asarray(image.convert("RGB")).astype(int)
        with Image.open(output / f"{stem}.gif") as image:
            assert np.abs(np.asarray(image.convert("RGB")) - first).mean() < 8
        with av.open(str(output / f"{stem}.mp4")) as container:
            assert container.streams.video[0].average_rate == 12
        assert np.abs(frames(output / f"{stem}.mp4")[0] - first).mean() < 8
    sample(f"latents={output / 'latents.safetensors'}", f"output={tmp_path / 'again'}", "formats=[png]")
    with Image.open(tmp_path / "again" / "0001-two.png") as again, Image.open(output / "0001-two.png") as image:
        assert np.abs(np.asarray(again).astype(int) - np.asarray(image)).max() <= 1  # of latents in float16


def test_latents_alone_need_no_vae_and_are_decoded_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("models.vae._load_model", None)
        sample("text_prompt=one", f"ckpt={folder}", f"output={tmp_path / 'out'}", "formats=[latents]")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"config.yaml", "summary.json", "latents.safetensors"}
    sample(f"latents={tmp_path / 'out' / 'latents.safetensors'}", f"output={tmp_path / 'out'}")
    assert (tmp_path / "out" / "0000-one.mp4").is_file()


def test_a_folder_that_is_used_again_holds_nothing_that_speaks_for_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt, output = f"ckpt={small_run(tmp_path / 'run')}", tmp_path / "out"
    sample("text_prompt=[one, two]", ckpt, f"output={output}", "formats=[mp4, latents]")
    capsys.readouterr()
    sample("text_prompt=three", ckpt, f"output={output}")
    assert {file.name for file in output.iterdir()} == {
        "0000-one.mp4", "0001-two.mp4", "0000-three.mp4", "contact_sheet.png", "summary.json", "config.yaml"
    }  # fmt: skip
    assert "beside them are 2 files of other commands, such as 0000-one.mp4" in capsys.readouterr().out
    sample("text_prompt=four", ckpt, f"output={output}", "formats=[latents]")
    assert not (output / "contact_sheet.png").exists()


def test_the_same_command_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third of four portions; other settings, or a file that is missing, make a sample anew."""
    output, calls, kill_at = tmp_path / "out", [], [3]

    def killed(*arguments: Any, **named: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == kill_at[0]:
            raise KeyboardInterrupt
        return denoise(*arguments, **named)

    def made(*settings: str, status: int = 0) -> int:
        calls.clear()
        sample("text_prompt=[one, two, three, four]", f"ckpt={tmp_path / 'run'}", f"output={output}", "batch_size=1",
               *settings, status=status)  # fmt: skip
        return len(calls)

    small_run(tmp_path / "run")
    monkeypatch.setattr("stages.sampling.generate.denoise", killed)
    monkeypatch.setattr("stages.sampling.generate.PORTION_BATCHES", 1)
    assert made(status=1) == 3
    assert [file.name for file in sorted(output.glob("*.mp4"))] == ["0000-one.mp4", "0001-two.mp4"]
    assert not (output / "summary.json").exists()
    first = (output / "0000-one.mp4").stat().st_mtime_ns
    kill_at[0] = 0
    assert made() == 2 and (output / "0000-one.mp4").stat().st_mtime_ns == first
    rows = json.loads((output / "summary.json").read_text())["samples"]
    assert [row["file"] for row in rows] == ["0000-one.mp4", "0001-two.mp4", "0002-three.mp4", "0003-four.mp4"]
    assert made() == 0
    with Image.open(output / "contact_sheet.png") as sheet:
        assert np.asarray(sheet)[-34:-6, 6:34].std() > 1  # the last sample, which was there
    (output / "0002-three.mp4").unlink()
    (output / "0003-four.mp4").write_bytes(b"no video")
    assert made() == 2
    assert made("seed=1") == made("seed=1", "vae_batch_frames=2") == made("formats=[mp4, gif]") == 4
    (output / "0001-two.gif").unlink()
    assert made("formats=[mp4, gif]") == 1
    assert made("formats=[mp4, latents]") == made("formats=[mp4, latents]") == 4  # one file of all


@pytest.mark.parametrize(
    ("setting", "seen_by_a_dry_run"),
    [
        ("height=33", True),
        ("sampler=ddim", True),
        ("sequence_parallel=2", True),
        ("weights=model", True),
        ("pretrained_model_path=OTHER", True),
        ("given.last=none.png", True),
        ("given.first=none.png", True),
        ("given.first=NO_PICTURE", False),
    ],
)
def test_a_command_that_is_refused_leaves_what_is_there(setting: str, seen_by_a_dry_run: bool, tmp_path: Path) -> None:
    other, text, output = tmp_path / "other", tmp_path / "text.png", tmp_path / "out"
    shutil.copytree(TINY_FOLDER, other)
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}))
    text.write_text("no picture")
    run_folder = small_run(tmp_path / "run", {"ema": 0}, conditioning=("first",))
    settings = ["text_prompt=one", f"ckpt={run_folder}", f"output={output}"]
    sample(*settings)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    settings.append(setting.replace("OTHER", str(other)).replace("NO_PICTURE", str(text)))
    sample(*settings, status=2)
    assert before == {path.name: path.read_bytes() for path in output.iterdir()}
    sample(*settings, "--dry-run", status=2 if seen_by_a_dry_run else 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("formats=[]", "formats: found none"),
        ("formats=[avi]", "formats: found ['avi'], expected a list of one of 'mp4'"),
        ("fps=0", "fps: found 0, expected more than 0"),
        ("fps=.nan", "fps: found nan"),
        ("samples_per_prompt=0", "samples_per_prompt: found 0"),
        ("names=wan", "names: found 'wan'"),
    ],
)
def test_a_setting_that_cannot_be_is_one_clear_line(
    setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sample("text_prompt=x", setting, status=2)
    (told,) = capsys.readouterr().err.splitlines()
    assert message in told
