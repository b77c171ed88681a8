"""`evaluate --checkpoint`: everything it needs is found, everything is measured, and told on the page."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.vae import FrozenVAE
from pipelines.evaluate import main
from shards.dataset import Dataset
from shards.schema import LATENTS, MEAN
from stages.errors import ConfigError
from stages.evaluation.config import ClipsConfig, EvaluateConfig, LossConfig
from stages.evaluation.evaluate import evaluate, result_lines
from stages.evaluation.measure import Subject
from stages.video import write_mp4
from tests.stages.evaluation.test_clip_score import tiny_clip
from tests.stages.evaluation.test_evaluate import Reader
from tests.stages.evaluation.test_features import Plain
from tests.stages.evaluation.tiny_run import SIZE, write_dataset, write_run

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measured")
    shards = write_dataset(root / "shards")
    write_run(root / "run", shards)
    write_run(root / "other", shards, seed=1)
    tiny_clip(root / "clip")
    torch.jit.script(Plain()).save(str(root / "features.pt"))
    return root


@pytest.fixture(scope="module")
def config(folder: Path) -> EvaluateConfig:
    return EvaluateConfig(
        checkpoint=str(folder / "run"),
        against=str(folder / "other"),
        output=str(folder / "report"),
        features=str(folder / "features.pt"),
        clip=str(folder / "clip"),
        loss=LossConfig(10, 3),
        clips=ClipsConfig(samples=6, steps=2, guidance_scale=2.0, real=8),
    )


@pytest.fixture(scope="module")
def summary(config: EvaluateConfig) -> dict:
    return evaluate(config)


@pytest.fixture(scope="module")
def metrics(summary: dict) -> dict:
    return json.loads((Path(summary["report"]).parent / "metrics.json").read_text())


def test_samples_are_made_of_held_out_captions(summary: dict, metrics: dict, folder: Path) -> None:
    index = Dataset.open(folder / "shards", filter="split < 0.3").index(SIZE)
    assert len(metrics["samples"]) == summary["samples"] == 6
    assert {row["prompt"] for row in metrics["samples"]} <= set(index["caption"].to_pylist())
    assert [row["seed"] for row in metrics["samples"]] == list(range(6))
    assert summary["scored"] == 6 and (folder / "report" / "samples" / "contact_sheet.png").is_file()


def test_all_is_measured_with_numbers_and_intervals(metrics: dict) -> None:
    loss = metrics["loss"]
    assert loss["clips"] == metrics["real_clips"] == "held-out" and len(loss["levels"]) == 3
    for curve in (loss["checkpoint"], loss["against"], loss["difference"]):
        for estimate in (curve["overall"], *curve["by_level"]):
            assert estimate["samples"] == 10 and estimate["interval"] is not None
    assert [row["name"] for row in metrics["motion"]] == ["motion", "flicker", "frozen", "sharpness", "colour_drift"]
    for row in (*metrics["motion"], metrics["nearest"], metrics["clip_score"]):
        assert (row["samples"]["samples"], row["real"]["samples"]) == (6, 8)
    assert [row["features"] for row in metrics["frechet"]] == ["features.pt", "VAE latents"]
    assert [row["diagnostic"] for row in metrics["frechet"]] == [False, True]
    for row in metrics["frechet"]:
        assert row["samples"] == 6 and row["warning"].startswith("6 samples: below 2048")
    nearest = metrics["nearest"]
    assert nearest["training"] > 20 and len(nearest["pairs"]) == 6 and len(nearest["nearer"]["interval"]) == 2


def test_the_page_tells_it(summary: dict, metrics: dict) -> None:
    page = Reader(Path(summary["report"]))
    assert "⚠ 6 samples: below 2048 the distance is mostly bias" in page.text
    for text in ("Loss by noise level", "The first less the second", "CLIP score", "colour drift, levels of 255",
                 "VAE latents", "a diagnostic", metrics["nearest"]["pairs"][0]["clip"]):  # fmt: skip
        assert text in page.text, text
    assert f"{metrics['loss']['difference']['overall']['value']:.4g}" in page.text
    marks = [attributes["title"] for tag, attributes in page.elements if tag == "b" and "title" in attributes]
    assert len(marks) == 3 * 3, "a mark for each level of two losses and their difference"
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "poster"} & attributes.keys(), tag


def test_the_command_ends_with_the_most_important(summary: dict) -> None:
    lines = result_lines(summary)
    assert lines[4].startswith("loss on held-out clips: ") and "10 samples" in lines[4]
    assert lines[5].startswith("less that of ") and lines[5].endswith("below 0 is better")
    assert sum(line.startswith("warning: 6 samples: below 2048") for line in lines) == 2
    assert lines[-1] == f"report: {summary['report']}"


def test_real_clips_as_samples_are_at_no_distance(config: EvaluateConfig, folder: Path, tmp_path: Path) -> None:
    """Of a folder of videos without latents: those of the very clips that they are compared with, of three prompts."""
    held_out, vae = Dataset.open(folder / "shards", filter="split < 0.3"), FrozenVAE.load("tiny")
    rows = range(held_out.index(SIZE).num_rows)
    for row in rows:
        write_mp4(tmp_path / f"{row}.mp4", vae.decode(held_out.read(SIZE, row, LATENTS)[MEAN]), 8, crf=0)
    listed = [{"file": f"{row}.mp4", "prompt": f"prompt {row % 3}", "seed": 0} for row in rows]
    (tmp_path / "summary.json").write_text(json.dumps({"samples": listed}))
    given = replace(config, samples=str(tmp_path), output=str(tmp_path / "report"), against="", clip="",
                    loss=LossConfig(1, 1), clips=ClipsConfig())  # fmt: skip
    evaluate(given)
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())
    # H.264 costs next to nothing here, except that it halves the colours, whose edges are then less sharp.
    tolerances = {"motion": 0.01, "flicker": 0.01, "frozen": 0, "sharpness": 0.25, "colour_drift": 0.01}
    for row in found["motion"]:
        expected = pytest.approx(row["real"]["value"], rel=tolerances[row["name"]])
        assert row["samples"]["value"] == expected != 0, row["name"]
    assert found["frechet"][0]["distance"] < 1e-4 < np.sum(found["frechet"][0]["at_half"])
    for row in (*found["motion"], found["nearest"]):
        assert (row["samples"]["samples"], row["samples"]["groups"]) == (len(rows), 3), "one prompt is one group"


def test_a_dataset_that_was_moved_is_that_of_both_runs(folder: Path, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, tmp_path / "gone", seed=seed) for seed, name in enumerate(("run", "other"))]
    subject = Subject.open(EvaluateConfig(str(runs[0]), str(runs[1]), shards=str(folder / "shards")))
    assert subject.against and subject.against.data.shards == str(folder / "shards")


def test_samples_of_a_size_that_was_not_trained_are_not_compared(config: EvaluateConfig, tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", np.zeros((5, 64, 64, 3), np.uint8), 8)
    (tmp_path / "summary.json").write_text(json.dumps({"samples": [{"file": "a.mp4", "prompt": "a", "seed": 0}]}))
    summary = evaluate(replace(config, samples=str(tmp_path), output=str(tmp_path / "report"), against="", clip=""))
    assert any(
        line.startswith("note: the samples are 64x64x5, of which the run has no") for line in result_lines(summary)
    )


def test_a_checkpoint_folder_names_its_run(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"{config.checkpoint}/checkpoints/step-0000007"
    main(["--dry-run", "--checkpoint", folder, f"against={config.against}", "loss.samples=20", "output=gone"])
    told = capsys.readouterr().out
    assert "64 samples to make and show in gone/report.html" in told
    assert f"the loss of {folder} and of {config.against}/checkpoints" in told
    assert "at 10 levels on up to 20 held-out clips" in told and not Path("gone").exists()


def test_another_vae_than_the_checkpoints_is_refused(folder: Path, tmp_path: Path) -> None:
    other = {"weights_hash": "other"}
    run = write_run(tmp_path / "run", folder / "shards", vae=other)
    with pytest.raises(ConfigError, match="pretrained_model_path=tiny has another VAE than the checkpoint"):
        evaluate(EvaluateConfig(checkpoint=str(run)))
    (tmp_path / "run" / "config.yaml").write_text("train: {}\n")
    (tmp_path / "run" / "checkpoints" / "step-0000007" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="config.yaml does not hold the settings of a run"):
        evaluate(EvaluateConfig(checkpoint=str(run)))
