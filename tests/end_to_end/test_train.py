"""The train command: what it leaves, what it never loads, and how it goes on after a kill."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.transformer import TransformerConfig
from models.weights import read_info, read_null_text
from tests.end_to_end.conftest import ROOT, Road, deepspeed, environment, run, train_settings
from tests.models.networks import pixart, randomise
from tests.models.originals import pixart_positions, pixart_state, save_pth

STATE = ("model", "ema", "exp_avg", "exp_avg_sq")

LOADED_MODULES = """
import sys
from pipelines.train import main
main(sys.argv[1:])
print("LOADED", *sorted(sys.modules))
"""


def metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_others_build_on(road: Road) -> None:
    lines = metrics(road.run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    expected = {"loss", "sample_ids", "clips_per_s", "tokens_per_s", "data_wait_share", "peak_memory_gb", "mfu"}
    assert expected <= lines[0].keys() and len(lines[0]["sample_ids"]) == 8
    summary = json.loads((road.run / "summary.json").read_text())
    assert (summary["steps"], summary["samples_seen"]) == (4, 32)
    assert summary["final_loss"] == lines[-1]["loss"]
    assert (road.run / "config.yaml").is_file() and list((road.run / "tensorboard").iterdir())


def test_the_average_is_not_the_weights(road: Road) -> None:
    checkpoint = road.run / "checkpoints" / "step-0000004"
    weights, average = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "ema"))
    assert weights.keys() == average.keys()
    assert any((weights[name] != average[name]).any() for name in weights)


def test_a_resume_is_bit_equal_to_no_stop(road: Road, tmp_path: Path) -> None:
    stopped = tmp_path / "run"
    shutil.copytree(road.run, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-0000004")  # as a kill after step 3 leaves it
    (stopped / "checkpoints" / ".step-0000004").mkdir()
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run(*deepspeed(2), *train_settings(road.shards, stopped))
    for name in STATE:
        ours, theirs = (folder / "checkpoints/step-0000004" / f"{name}.safetensors" for folder in (road.run, stopped))
        assert ours.read_bytes() == theirs.read_bytes(), name
    told = [[(line["step"], line["loss"], line["sample_ids"]) for line in metrics(run)] for run in (road.run, stopped)]
    assert told[0] == told[1]


def test_one_rank_takes_the_same_samples_in_the_same_order(road: Road, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED_MODULES, *train_settings(road.shards, tmp_path / "run")],
        cwd=ROOT, env={**environment(), "MASTER_PORT": str(29100 + os.getpid() % 300)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = metrics(road.run), metrics(tmp_path / "run")
    assert [line["sample_ids"] for line in ours] == [line["sample_ids"] for line in theirs]
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-5)

    loaded = next(line for line in done.stdout.splitlines() if line.startswith("LOADED")).split()
    assert "stages.train" in loaded and "deepspeed" in loaded
    assert not {"decord", "av", "sentencepiece", "ray"} & set(loaded)
    assert not [name for name in loaded if name.startswith(("transformers.models.t5", "diffusers.models"))]
    assert not {"models.vae", "models.text", "stages.decoding.decode"} & set(loaded)


MISTAKES = [
    (["data.shards=no/shards"], "no/shards does not exist"),
    (["train.batch_size=7", "train.gradient_accumulation=2"], "expected a multiple of 2"),
    (["train.stpes=7"], "did you mean 'train.steps'"),
    (["model.num_headz=3"], "did you mean num_heads"),
    (["model.num_heads=3"], "belongs to another run"),
    (["seed=1"], "belongs to another run (seed was 0, is 1)"),
    (["train.init_from=no/such/run", "output=OTHER"], "no/such/run does not exist"),
    (["deepspeed.bf16.enabled=true", "output=OTHER"], "deepspeed.bf16"),
    (["deepspeed.zero_optimisation.stage=2"], "did you mean zero_optimization"),
    (["train.gradient_accumulation=0"], "gradient_accumulation: found 0"),
    (["optimizer.lr=-1"], "lr: found -1.0"),
    (["data.window_shards=3"], "window_shards was 8, is 3"),
    (["model.patch_size=3", "output=OTHER"], "expected multiples of 24 pixels"),
]

ALL_MISTAKES = """
import json, sys
from pipelines.command import run
from pipelines.train import main
for settings in json.loads(sys.argv[1]):
    print("STATUS", run(main, settings))
"""


def test_bad_input_is_one_clear_line(road: Road, tmp_path: Path) -> None:
    given = train_settings(road.shards, road.run)
    cases = [[*given, *(text.replace("OTHER", str(tmp_path)) for text in settings)] for settings, _ in MISTAKES]
    done = run(sys.executable, "-c", ALL_MISTAKES, json.dumps(cases))
    assert done.stdout.count("STATUS 2") == len(MISTAKES)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr and len(told) == len(MISTAKES)
    for line, (_, message) in zip(told, MISTAKES, strict=True):
        assert message in line


def test_the_launcher_passes_the_users_mistake_on(road: Road) -> None:
    done = run(*deepspeed(2), *train_settings(road.shards, road.run), "train.batch_size=7", status=2)
    assert done.stderr.count("error: ") == 1


def test_bf16_under_zero_3_with_activation_checkpointing_resumes_bit_equal(road: Road, tmp_path: Path) -> None:
    def settings(folder: Path) -> list[str]:
        return [*train_settings(road.shards, folder), "train.steps=2", "train.save_every=1", "train.precision=bf16",
                "train.activation_checkpointing=true", "deepspeed.zero_optimization.stage=3"]  # fmt: skip

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(*deepspeed(2), *settings(whole))
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-0000002")
    run(*deepspeed(2), *settings(stopped))
    for name in STATE:
        ours, theirs = (folder / f"checkpoints/step-0000002/{name}.safetensors" for folder in (whole, stopped))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_weights_of_another_vae_are_refused(road: Road, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(road.run / "checkpoints" / "step-0000004", other)
    info = json.loads((other / "model.json").read_text())
    (other / "model.json").write_text(json.dumps({**info, "vae": {**info["vae"], "weights_hash": "another"}}))
    settings = [*train_settings(road.shards, tmp_path / "run"), f"train.init_from={other}"]
    done = run(sys.executable, "pipelines/train.py", *settings, status=2)
    assert "trained with another VAE than these shards: weights_hash 'another'" in done.stderr


def test_a_run_starts_from_the_weights_of_another(road: Road, tmp_path: Path) -> None:
    settings = train_settings(road.shards, tmp_path / "run")
    done = run(*deepspeed(2), *settings, f"train.init_from={road.run}", "optimizer.lr=0.0", "train.steps=1")
    assert "100.0% of the model" in done.stdout
    started = load_file(tmp_path / "run/checkpoints/step-0000001/model.safetensors")
    source = load_file(road.run / "checkpoints/step-0000004/ema.safetensors")
    assert all((started[name] == source[name]).all() for name in source)


def test_a_run_starts_from_pixarts_own_file_and_goes_on_without_it(road: Road, tmp_path: Path) -> None:
    """It takes over the positions, keeps the spatial weights, and trains and samples with PixArt's empty caption."""
    small = TransformerConfig(out_channels=8, num_layers=1, num_heads=1, head_dim=72, text_dim=64, sample_size=16)
    reference, null_text = randomise(pixart(small)), torch.randn(40, 64)
    extra = {"pos_embed": pixart_positions(reference), "y_embedder.y_embedding": null_text}
    path = save_pth(tmp_path / "PixArt.pth", pixart_state(reference) | extra)
    settings = [
        *train_settings(road.shards, tmp_path / "run"), f"train.init_from={path}", "model.num_heads=1",
        "model.head_dim=72", "model.pooled_text=false", "train.caption_dropout=1.0", "optimizer.lr=0.0",
    ]  # fmt: skip
    done = run(sys.executable, "pipelines/train.py", *settings, "train.steps=1")
    assert f"starts from {path}: " in done.stdout and "the variance half of its output is left out" in done.stdout
    path.unlink()
    run(sys.executable, "pipelines/train.py", *settings, "train.steps=2")
    last = tmp_path / "run/checkpoints/step-0000002"
    config = read_info(last).transformer
    assert (config.sample_size, config.temporal_pos, config.temporal_init) == (16, "branch", "zero")
    assert torch.equal(read_null_text(last)[0], null_text)
    weights = load_file(last / "model.safetensors")
    kept = {name: tensor for name, tensor in reference.state_dict().items() if not name.startswith("proj_out")}
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
