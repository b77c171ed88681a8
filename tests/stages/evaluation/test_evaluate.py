"""Evaluation: right on ground truth, at chance on shuffled prompts, one page that asks for nothing, clear errors."""

import base64
import json
import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluate import main
from shards.errors import DatasetError
from stages.errors import ConfigError
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.evaluate import evaluate, result_lines
from stages.evaluation.intervals import Proportion
from stages.evaluation.report import Clip
from stages.shapes.check import Observed
from stages.shapes.render import Combination, caption, combinations, held_out, seen
from stages.video import write_mp4
from tests.stages.evaluation.finished_run import finished_run, metrics_line, write_samples

SOME = [*held_out()[:2], *seen()[:2]]


class Reader(HTMLParser):
    """Every element of a page, and the text a reader sees."""

    def __init__(self, file: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text += f" {data}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """A run whose samples show all combinations, as their prompts say."""
    return finished_run(tmp_path_factory.mktemp("truth"), combinations())


@pytest.fixture(scope="module")
def summary(truth: EvaluateConfig) -> dict:
    return evaluate(truth)


@pytest.fixture
def some(tmp_path: Path) -> EvaluateConfig:
    """A small run that a test may spoil."""
    return finished_run(tmp_path, SOME)


def test_ground_truth_is_all_right(summary: dict, truth: EvaluateConfig):
    for kind, count in (("seen", len(seen())), ("held_out", len(held_out()))):
        for numbers in summary["adherence"][kind].values():
            assert (numbers["right"], numbers["samples"], numbers["share"]) == (count, count, 1.0)
            assert numbers["interval"] == pytest.approx(Proportion(count, count).interval)
    assert summary["samples"] == summary["scored"] == 72
    assert json.loads((Path(truth.output) / "summary.json").read_text()) == summary
    metrics = json.loads((Path(truth.output) / "metrics.json").read_text())
    assert metrics["adherence"] == summary["adherence"]
    assert [row["right"] for row in metrics["samples"]] == [True] * 72
    assert sum(row["held_out"] for row in metrics["samples"]) == len(held_out())


def test_shuffled_prompts_are_right_by_chance_only(truth: EvaluateConfig, summary: dict, tmp_path: Path):
    listed = json.loads((Path(truth.samples) / "summary.json").read_text())
    prompts = [row["prompt"] for row in listed["samples"]]
    random.Random(0).shuffle(prompts)
    for row, prompt in zip(listed["samples"], prompts, strict=True):
        row["prompt"] = prompt
        (tmp_path / row["file"]).symlink_to(Path(truth.samples) / row["file"])
    (tmp_path / "summary.json").write_text(json.dumps(listed))
    shuffled = evaluate(replace(truth, samples=str(tmp_path), output=str(tmp_path / "report")))
    parts = [shuffled["adherence"][kind]["colour_and_direction"] for kind in ("seen", "held_out")]
    assert sum(part["samples"] for part in parts) == 72
    assert sum(part["right"] for part in parts) <= 9  # 3 expected, more than 9 by chance once in 1,500
    assert "✗ wrong" in Reader(tmp_path / "report" / "report.html").text


def test_the_page_shows_every_sample_and_asks_for_nothing(summary: dict, truth: EvaluateConfig):
    page = Reader(Path(summary["report"]))
    videos = page.all("video")
    assert len(videos) == 72
    embedded = {base64.b64decode(str(video["data-src"]).removeprefix("data:video/mp4;base64,")) for video in videos}
    assert embedded == {file.read_bytes() for file in Path(truth.samples).glob("*.mp4")}
    for video in videos:
        assert {"autoplay", "muted", "loop", "playsinline"} <= video.keys()
    assert not {"link", "img", "iframe", "source"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "poster"} & attributes.keys(), tag
    assert "default-src 'none'" in str([meta.get("content") for meta in page.all("meta")])
    assert page.text.count("✓ right") == 72 + 1  # and once where it is explained
    assert page.text.index("Held-out combinations") < page.text.index("Combinations seen in training")
    assert page.text.count("held out") == len(held_out())


def test_the_page_tells_result_curve_dataset_and_settings(summary: dict):
    page = Reader(Path(summary["report"]))
    assert "100.0 % of the samples of held-out combinations (95 % interval 79.6 to 100.0)" in page.text
    assert "100.0 % of the samples of seen combinations (95 % interval 93.7 to 100.0)" in page.text
    assert sum(attributes.get("class") == "smooth" for attributes in page.all("path")) == 2
    for fact in ("rows of metadata 9", "duplicates 1", "rejected: too short 1", "bucket 64 × 64 × 16 2 samples"):
        assert fact in page.text
    for setting in ("input: shapes", "steps: 2400", "guidance_scale: 2.0", f"output: {Path(summary['report']).parent}"):
        assert setting in page.text


def test_prompts_of_another_dataset_are_shown_not_scored(tmp_path: Path):
    prompts = ["a dog runs <script>alert(1)</script>", "a dog runs", "a dog runs", "rain & 'snow'"]
    config = finished_run(tmp_path, SOME, prompts)
    summary = evaluate(config)
    assert summary["adherence"] is None and summary["scored"] == 0
    assert result_lines(summary)[0] == "4 samples, none with a prompt of the shapes dataset: shown, not scored"
    page = Reader(Path(summary["report"]))
    assert len(page.all("video")) == 4 and len(page.all("script")) == 1 and len(page.all("article")) == 3
    assert "right" not in page.text
    assert "a dog runs <script>alert(1)</script>" in page.text


def test_a_prompt_of_another_dataset_among_captions_is_left_unscored(tmp_path: Path):
    config = finished_run(tmp_path, SOME, [*(caption(one) for one in SOME[:3]), "a dog runs"])
    summary = evaluate(config)
    assert (summary["samples"], summary["scored"]) == (4, 3)
    assert summary["adherence"]["held_out"]["colour"]["samples"] == 2
    assert "Other prompts" in Reader(Path(summary["report"])).text


def test_a_page_stays_small_and_shows_each_prompt_first(some: EvaluateConfig):
    """Of eight videos of a megabyte the page holds one of each prompt, and says what it leaves out."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 256, 256, 3), np.uint8)
    write_mp4(Path(some.samples) / "0000.mp4", noise, 8, crf=8)
    size = (Path(some.samples) / "0000.mp4").stat().st_size
    assert 600_000 < size < 1_400_000
    rows = [{"file": "0000.mp4", "prompt": prompt, "seed": seed} for prompt in ("one", "two") for seed in range(4)]
    (Path(some.samples) / "summary.json").write_text(json.dumps({"samples": rows}))
    page_file = Path(evaluate(some)["report"])
    page = Reader(page_file)
    shown = [video["aria-label"] for video in page.all("video")]
    assert {"one, seed 0", "two, seed 0"} <= set(shown) and len(shown) == 3_000_000 // size
    assert f"{8 - len(shown)} more samples are not on this page" in page.text
    assert page_file.stat().st_size < 4_300_000


def test_a_line_that_is_still_being_written_is_not_read(some: EvaluateConfig):
    with (Path(some.run) / "metrics.jsonl").open("a") as file:
        file.write(metrics_line(2500, 0.5)[:20])
    assert "2,400 steps" in Reader(Path(evaluate(some)["report"])).text


@pytest.mark.parametrize(
    "spoilt, message",
    [
        ("hello\n", "line 121: found 'hello', expected the metrics of a step"),
        ('{"step": 2500}\n', "line 121.*loss"),
        ("[1]\n", "line 121"),
        (metrics_line(2500, float("nan")), "line 121.*finite"),
        (metrics_line(100, 0.5), "do not ascend"),
    ],
)
def test_a_damaged_log_is_named(some: EvaluateConfig, spoilt: str, message: str):
    with (Path(some.run) / "metrics.jsonl").open("a") as file:
        file.write(spoilt)
    with pytest.raises(ConfigError, match=message):
        evaluate(some)


@pytest.mark.parametrize(
    "listed, message",
    [
        ("{", "no summary of sample"),
        ('{"steps": 3}', "no summary of sample.*samples"),
        ('{"samples": [{"file": "0000.mp4"}]}', "no summary of sample.*prompt"),
        ('{"samples": []}', "lists no samples"),
        ('{"samples": [{"file": "gone.mp4", "prompt": "x", "seed": 0}]}', r"gone.mp4, which is not there"),
        ('{"samples": [{"file": "torn.mp4", "prompt": "x", "seed": 0}]}', "cannot be checked.*run sample again"),
        (
            '{"samples": [{"file": "latents.safetensors", "prompt": "x", "seed": 0}]}',
            "lists latents.safetensors, expected .mp4: run sample again with mp4 among its formats",
        ),
    ],
)
def test_a_damaged_list_of_samples_is_named(some: EvaluateConfig, listed: str, message: str):
    (Path(some.samples) / "summary.json").write_text(listed)
    (Path(some.samples) / "torn.mp4").write_bytes((Path(some.samples) / "0000.mp4").read_bytes()[:100])
    with pytest.raises(ConfigError, match=message):
        evaluate(some)


def test_of_several_formats_the_video_is_shown(some: EvaluateConfig):
    """formats=[gif,mp4] lists the .gif files."""
    file = Path(some.samples) / "summary.json"
    file.write_text(file.read_text().replace(".mp4", ".gif"))
    for video in Path(some.samples).glob("*.mp4"):
        video.with_suffix(".gif").write_bytes(b"GIF89a")
    summary = evaluate(some)
    assert summary["scored"] == 4 and summary["adherence"]["seen"]["all_three"]["share"] == 1
    videos = [str(video["data-src"]) for video in Reader(Path(summary["report"])).all("video")]
    assert len(videos) == 4 and all(b"ftyp" in base64.b64decode(video.partition(",")[2])[:12] for video in videos)


def test_a_folder_that_is_absent_is_named(some: EvaluateConfig, tmp_path: Path):
    for key, command in (("samples", "sample"), ("run", "train"), ("shards", "encode")):
        with pytest.raises(ConfigError, match=f"{key} is not set: give {key}= the output folder of {command}"):
            evaluate(replace(some, **{key: ""}))
        with pytest.raises(ConfigError, match=f"no folder at gone: run {command} first"):
            evaluate(replace(some, **{key: "gone"}))
    (tmp_path / "empty").mkdir()
    for key, error, message in (
        ("samples", ConfigError, "no summary.json"),
        ("run", ConfigError, "no metrics.jsonl"),
        ("shards", DatasetError, "dataset.json"),
    ):
        with pytest.raises(error, match=message):
            evaluate(replace(some, **{key: str(tmp_path / "empty")}))
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="has not logged a step"):
        evaluate(replace(some, run=str(tmp_path / "empty")))


def test_the_command_ends_with_the_shares_and_the_path(some: EvaluateConfig, capsys: pytest.CaptureFixture[str]):
    write_samples(Path(some.samples) / "wrong", SOME, [caption(one) for one in (SOME[0], SOME[0], SOME[2], SOME[3])])
    arguments = [f"{key}={getattr(some, key)}" for key in ("run", "shards", "output")]
    main([f"samples={some.samples}/wrong", *arguments])
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "seen combinations: colour and direction right 100.0 % (2 of 2, 95 % interval 34.2 to 100.0)",
        "seen combinations: shape right 100.0 % (2 of 2, 95 % interval 34.2 to 100.0)",
        "held-out combinations: colour and direction right 50.0 % (1 of 2, 95 % interval 9.5 to 90.5)",
        "held-out combinations: shape right 50.0 % (1 of 2, 95 % interval 9.5 to 90.5)",
        f"report: {some.output}/report.html",
    ]


def test_a_kind_that_was_not_sampled_has_no_share(tmp_path: Path):
    summary = evaluate(finished_run(tmp_path, held_out()[:2]))
    assert result_lines(summary)[0] == "seen combinations: colour and direction right unknown: no samples"
    page = Reader(Path(summary["report"]))
    assert "of held-out combinations" in page.text and "seen combinations" not in page.text


def test_a_finding_names_what_differs():
    def finding(*observed: str | None) -> str:
        return Clip(Path(), "", 0, 64, 64, Combination("red", "ball", "left"), Observed(*observed)).finding

    assert finding("red", "ball", "left") == ""
    assert finding("blue", "ball", "up") == "blue, up"
    assert finding("blue", None, None) == "blue, unclear shape and direction"
    assert finding(None, None, None) == "nothing clear"


def test_a_dry_run_writes_nothing(some: EvaluateConfig, capsys: pytest.CaptureFixture[str]):
    main(["--dry-run", *(f"{key}={getattr(some, key)}" for key in ("samples", "run", "shards", "output"))])
    assert "4 samples to show, 4 of them to check" in capsys.readouterr().out
    assert not Path(some.output).exists()


def test_progress_is_told_without_a_terminal_too(some: EvaluateConfig, capsys: pytest.CaptureFixture[str]):
    evaluate(some)
    assert "check: 4 of 4" in capsys.readouterr().err
