"""Prompts as they are given, and as names of files."""

import json
from pathlib import Path

import pytest

from pipelines.command import run
from pipelines.sample import main
from stages.sampling.prompts import read_prompts, slug
from tests.stages.small_run import small_run


@pytest.mark.parametrize("prompt", ["猫" * 100, "notes.txt", "cat", "[a, b]", "2001"])
def test_a_prompt_of_its_own_option_is_taken_as_it_is(
    prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_run(tmp_path / "run")
    (tmp_path / "cat").write_text("a line of a file\n")
    monkeypatch.chdir(tmp_path)
    settings = [f"ckpt={source}", "output=out", "height=32", "width=32", "frames=1", "steps=1", "formats=[latents]"]
    assert run(main, ["--prompt", prompt, *settings]) == 0
    assert [row["prompt"] for row in json.loads(Path("out/summary.json").read_text())["samples"]] == [prompt]


@pytest.mark.parametrize("prompt", ["猫" * 100, "x" * 5000, "a\0b"])
def test_a_prompt_that_could_name_no_file_is_a_prompt(prompt: str) -> None:
    assert read_prompts(prompt) == [prompt]


def test_a_prompt_names_its_file_in_its_own_script() -> None:
    assert slug("A red ball, moving_left!") == "a-red-ball-moving-left"
    assert slug("一只猫 在跑") == "一只猫-在跑" and slug("Ein Würfel: 100 %") == "ein-würfel-100"
    assert slug("猫" * 100) == "猫" * 20  # 60 bytes
    assert slug("a" + "猫" * 100) == "a" + "猫" * 19
    assert slug("?!") == "empty"
