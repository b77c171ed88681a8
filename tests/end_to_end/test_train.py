"""The train command: what it leaves, what it never loads, and how it goes on after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.latents import LatentStats
from models.loading import load_transformer
from models.objective import make_objective
from models.transformer import TransformerConfig
from models.weights import find_checkpoint, read_info, read_null_text
from shards.loader import DataConfig
from stages.training.held_out import ValidationConfig
from stages.training.loss import LatentLoss
from stages.training.validate import HeldOut
from tests.end_to_end.conftest import Road, train_settings
from tests.end_to_end.test_training_samples import SETTINGS as SAMPLED
from tests.end_to_end.test_training_samples import assert_samples_of, prompts_of
from tests.models.networks import pixart, randomise
from tests.models.originals import pixart_positions, pixart_state, save_pth
from tests.resident import ResidentRanks
from tests.running import ROOT, TRAIN, deepspeed, environment, run, wait_for

STATE = ("model", "ema", "exp_avg", "exp_avg_sq")

LOADED_MODULES = """
import sys
from pipelines.train import main
main(sys.argv[1:])
print("LOADED", *sorted(sys.modules))
"""

SLOW_BOARD = """
import shutil, sys, time
from unittest.mock import patch
from tensorboard.summary.writer.record_writer import RecordWriter
from pipelines.command import run
from pipelines.train import main

def slowly(writer, data, write=RecordWriter.write):
    time.sleep(0.1)
    write(writer, data)

folder, *settings = sys.argv[1:]
with patch.object(RecordWriter, "write", slowly):
    status = run(main, [*settings, f"output={folder}"])
    shutil.copytree(f"{folder}/tensorboard", f"{folder}/left")  # as a process that ends now leaves it
sys.exit(status)
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
    milestones = sorted((road.run / "milestones").iterdir())
    assert [read_info(milestone).step for milestone in milestones] == [2, 4]
    assert not [path for path in milestones[0].iterdir() if path.name.startswith("exp_avg")]


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
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = metrics(road.run), metrics(tmp_path / "run")
    assert [line["sample_ids"] for line in ours] == [line["sample_ids"] for line in theirs]
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-5)

    loaded = next(line for line in done.stdout.splitlines() if line.startswith("LOADED")).split()
    assert "stages.train" in loaded and "deepspeed" in loaded
    assert not {"decord", "av", "sentencepiece", "ray"} & set(loaded)
    assert not {"transformers", "diffusers"} & set(loaded)
    assert not {"models.vae", "models.text", "stages.decoding.decode"} & set(loaded)


def test_two_nodes_started_by_hand_train_as_one_node_does(road: Road, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    launcher, _, _, *rest = deepspeed(1)
    hosts = [launcher, "--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1"]
    nodes = [
        subprocess.Popen([*hosts, "--node_rank", str(node), *rest, *train_settings(road.shards, tmp_path / "run")],
                         cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node in range(2)
    ]  # fmt: skip
    for node in nodes:
        output, _ = node.communicate(timeout=300)
        assert node.returncode == 0, output
    ours, theirs = (folder / "checkpoints/step-0000004/model.safetensors" for folder in (road.run, tmp_path / "run"))
    assert ours.read_bytes() == theirs.read_bytes()


MISTAKES = [
    (["data.shards=no/shards"], "no/shards does not exist"),
    (["train.batch_size=7", "train.gradient_accumulation=2"], "expected a multiple of 2"),
    (["train.stpes=7"], "did you mean 'train.steps'"),
    (["train.activation_checkpointing=true"], "did you mean 'train.activation_memory'"),
    (["model.num_headz=3"], "did you mean num_heads"),
    (["model.num_heads=3"], "belongs to another run (transformer.num_heads was 4, is 3)"),
    (["seed=1"], "belongs to another run (seed was 0, is 1)"),
    (["train.init_from=no/such/run", "output=OTHER"], "no/such/run does not exist"),
    (["deepspeed.bf16.enabled=true", "output=OTHER"], "deepspeed.bf16"),
    (["deepspeed.zero_optimisation.stage=2"], "did you mean zero_optimization"),
    (["train.gradient_accumulation=0"], "gradient_accumulation: found 0"),
    (["optimizer.lr=-1"], "lr: found -1.0"),
    (["optimizer.group_lr={nothing*: 1e-4}"], "no parameter is left for 'nothing*'"),
    (["optimizer.group_lr={'*.bias': 0}"], "were frozen and are trained, or the other way round"),
    (["train.milestone_every=3"], "milestone_every: found 3, expected a multiple of 2"),
    (["data.window_shards=3"], "window_shards was 8, is 3"),
    (["model.patch_size=3", "output=OTHER"], "expected multiples of 24 pixels"),
    (["objective.prediction=epsilon"], "flow: prediction epsilon has no use for these settings"),
    (["objective.flow.logit_mean=1"], "belongs to another run (objective.flow.logit_mean was 0.0, is 1"),
    (["validation.holdout=0.000001", "output=OTHER"], "validation.holdout is 1e-06"),
    (["validation.holdout=0.3"], "validation.holdout was 0.0, is 0.3"),
    (
        [
            "output=OTHER",
            "objective.prediction=epsilon",
            "objective.flow.shift_tokens=[256, 14336, 131072]",
            "objective.flow.shift_values=[1, 3, 6]",
            "validation.sample_every=5",
            "validation.sample_steps=2000",
        ],
        "validation.sample_steps: found 2000, expected at most 1000",
    ),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES)
def test_bad_input_is_one_clear_line(
    settings: list[str], message: str, road: Road, resident_ranks: ResidentRanks, tmp_path: Path
) -> None:
    settings = [text.replace("OTHER", str(tmp_path)) for text in settings]
    done = resident_ranks.run(1, TRAIN, *train_settings(road.shards, road.run), *settings, status=2)
    assert "Traceback" not in done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in told


def test_the_launcher_passes_the_users_mistake_on(road: Road) -> None:
    done = run(*deepspeed(2), *train_settings(road.shards, road.run), "train.batch_size=7", status=2)
    assert done.stderr.count("error: ") == 1


def test_bf16_under_zero_3_resumes_bit_equal_whatever_is_kept_for_the_backward_pass(
    road: Road, resident_ranks: ResidentRanks, tmp_path: Path
) -> None:
    def settings(folder: Path, memory: str) -> list[str]:
        return [*train_settings(road.shards, folder), "train.steps=2", "train.save_every=1", "train.precision=bf16",
                f"train.activation_memory={memory}", "deepspeed.zero_optimization.stage=3"]  # fmt: skip

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    told = run(*deepspeed(2), *settings(whole, "none")).stdout
    parameters = sum(
        tensor.numel() for tensor in load_file(whole / "checkpoints/step-0000002/model.safetensors").values()
    )
    assert f" {parameters / 1e6:.2f} M parameters, 2 ranks" in told
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-0000002")
    resident_ranks.run(2, TRAIN, *settings(stopped, "selective"))
    for name in STATE:
        ours, theirs = (folder / f"checkpoints/step-0000002/{name}.safetensors" for folder in (whole, stopped))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_held_out_clips_have_the_loss_and_the_samples_of_the_checkpoints_weights(
    road: Road, resident_ranks: ResidentRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 on two ranks as in one process, here with epsilon and its learned range."""
    resident_ranks.run(2, TRAIN, *train_settings(road.shards, tmp_path), "train.steps=2", "train.log_every=2",
        "objective.prediction=epsilon", "objective.flow.shift_tokens=[256, 14336, 131072]",
        "objective.flow.shift_values=[1, 3, 6]", "optimizer.warmup_steps=0", "validation.holdout=0.2",
        "validation.samples=5", "validation.levels=2", "validation.every=1", "deepspeed.zero_optimization.stage=3",
        *SAMPLED, "validation.sample_every=5")  # fmt: skip
    told = metrics(tmp_path)
    assert [line["step"] for line in told] == [1, 2]
    assert told[0]["validation_loss"] != told[1]["validation_loss"]

    model, info = load_transformer(tmp_path, "model"), read_info(tmp_path)
    assert (model.prediction, model.config.out_channels) == ("epsilon", 2 * model.config.in_channels)
    loss_of = LatentLoss(
        make_objective(info.objective), LatentStats.of(info.vae), read_null_text(tmp_path),
        frame_interval_s=info.frame_interval_s, caption_dropout=0.1, seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    monkeypatch.setattr("stages.training.validate.mean_over_ranks", lambda values: values)
    config = ValidationConfig(holdout=0.2, samples=5, levels=2)
    held_out = HeldOut.open(config, DataConfig(str(road.shards)), {"64x64x8": 2}, 0, 1)
    assert held_out is not None and held_out.samples == 5
    held_out.read()
    expected = held_out.losses(model, loss_of)
    assert {name: told[1][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert list(expected)[1:] == ["validation_loss/level_0.25", "validation_loss/level_0.75"]

    (samples,) = (tmp_path / "samples").iterdir()  # after the last step
    assert_samples_of(tmp_path / "checkpoints/step-0000002", prompts_of(road.shards, 0.2), samples, monkeypatch)


def test_weights_of_another_vae_are_refused(road: Road, resident_ranks: ResidentRanks, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(road.run / "checkpoints" / "step-0000004", other)
    info = json.loads((other / "model.json").read_text())
    (other / "model.json").write_text(json.dumps({**info, "vae": {**info["vae"], "weights_hash": "another"}}))
    settings = [*train_settings(road.shards, tmp_path / "run"), f"train.init_from={other}"]
    done = resident_ranks.run(1, TRAIN, *settings, status=2)
    assert "trained with another VAE than these shards: weights_hash 'another'" in done.stderr


def test_a_run_starts_from_the_weights_of_another(road: Road, resident_ranks: ResidentRanks, tmp_path: Path) -> None:
    settings = train_settings(road.shards, tmp_path / "run")
    done = resident_ranks.run(2, TRAIN, *settings, f"train.init_from={road.run}", "optimizer.lr=0.0", "train.steps=1")
    assert "100.0% of the model" in done.stdout and "predicts velocity" in done.stdout
    assert "it predicts" not in done.stdout  # something else, which would be told
    started = load_file(tmp_path / "run/checkpoints/step-0000001/model.safetensors")
    source = load_file(road.run / "checkpoints/step-0000004/ema.safetensors")
    assert all((started[name] == source[name]).all() for name in source)


def start(shards: Path, folder: Path) -> subprocess.Popen[str]:
    """A run on two ranks, once it has done a step; one that fails to stop ends after a while all the same."""
    settings = [*train_settings(shards, folder), "train.steps=100000", "train.save_every=100000",
                "train.milestone_every=null", "train.batch_size=2", "train.max_hours=0.1"]  # fmt: skip

    def written() -> int:
        return (folder / "metrics.jsonl").stat().st_size if (folder / "metrics.jsonl").exists() else 0

    before = written()
    process = subprocess.Popen([*deepspeed(2), *settings], cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    wait_for(process, lambda: written() > before)
    return process


def runs(rank: psutil.Process) -> bool:
    """Whether it still does anything; without its launcher, nobody may take note that it has ended."""
    try:
        return rank.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stopped(process: subprocess.Popen[str], run_folder: Path, ranks: list[psutil.Process]) -> int:
    """The step of the whole checkpoint that a stopped run leaves, once all of it has ended."""
    output, _ = process.communicate(timeout=180)  # also waits for the ranks, which hold the pipe
    deadline = time.monotonic() + 60
    while any(map(runs, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    checkpoint = find_checkpoint(run_folder)
    step = read_info(checkpoint).step
    assert f"stopped at step {step} (the launcher has ended): run the same command to go on" in output
    assert metrics(run_folder)[-1]["step"] == step
    return step


def test_a_run_whose_launcher_ends_saves_and_leaves(road: Road, resident_ranks: ResidentRanks, tmp_path: Path) -> None:
    """SIGTERM to the `deepspeed` command, which ends it alone; then kill -9 of the launcher that it started."""
    folder, steps = tmp_path / "run", []
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = start(road.shards, folder)
        (launcher,) = psutil.Process(process.pid).children()
        rank_processes = launcher.children()
        assert len(rank_processes) == 2
        if not steps:
            second = resident_ranks.run(1, TRAIN, *train_settings(road.shards, folder), status=2)
            assert f"{folder} is in use by process {rank_processes[0].pid} on " in second.stderr
        os.kill(process.pid if number == signal.SIGTERM else launcher.pid, number)
        steps.append(stopped(process, folder, rank_processes))
    assert 0 < steps[0] < steps[1]


def test_adaptive_clipping_resumes_bit_equal_and_nan_ends_the_run(
    road: Road, resident_ranks: ResidentRanks, tmp_path: Path
) -> None:
    settings = [*train_settings(road.shards, tmp_path), "train.save_every=100", "train.batch_size=2",
                "train.milestone_every=100", "optimizer.decay=constant", "optimizer.clip_norm=0",
                "optimizer.clip_sigmas=0.1"]  # fmt: skip
    for steps, name in ((24, "whole"), (22, "stopped"), (24, "stopped")):
        resident_ranks.run(1, TRAIN, *settings, f"output={tmp_path / name}", f"train.steps={steps}")
    (tmp_path / "slow_board.py").write_text(SLOW_BOARD)
    nan = [*settings, "optimizer.lr=1e30", "train.max_skipped=3", "train.steps=10"]
    done = resident_ranks.run(1, str(tmp_path / "slow_board.py"), tmp_path / "nan", *nan, status=1)
    for name in (*(f"{name}.safetensors" for name in STATE), "training.json"):
        ours, theirs = (tmp_path / run / "checkpoints/step-0000024" / name for run in ("whole", "stopped"))
        assert ours.read_bytes() == theirs.read_bytes(), name
    limits = [line["clip_norm"] for line in metrics(tmp_path / "stopped")]
    assert limits[:20] == 20 * [None] and min(limits[20:]) > 0
    assert limits == [line["clip_norm"] for line in metrics(tmp_path / "whole")]

    (told,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    skipped = [line for line in done.stdout.splitlines() if "is skipped, its" in line]
    assert len(skipped) == 3
    first = int(skipped[0].split()[1])
    assert f"steps {first} to {first + 2} were skipped, 3 in a row" in told
    assert metrics(tmp_path / "nan")[-1]["step"] == first - 1
    board = EventAccumulator(str(tmp_path / "nan/left"))
    board.Reload()
    assert board.Scalars("peak_memory_gb")[-1].step == first - 1  # the last of what came before it


def test_a_damaged_shard_ends_all_ranks_and_is_named(road: Road, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(road.shards, shards)
    tars = sorted(shards.glob("*/latents/*.tar"))
    for tar in tars:
        content = bytearray(tar.read_bytes())
        content[600] ^= 1  # in the first sample of each
        tar.write_bytes(content)
    settings = [*train_settings(shards, tmp_path / "run"), "train.steps=6"]  # each sample once
    done = run(*deepspeed(2), *settings, status=1)
    assert any(tar.name in done.stderr for tar in tars) and "failed: " in done.stderr
    assert "so that no rank can" in done.stderr or done.stderr.count("failed: ") == 2
    assert "Traceback" not in done.stderr


def test_a_run_starts_from_pixarts_own_file_and_goes_on_without_it(
    road: Road, resident_ranks: ResidentRanks, tmp_path: Path
) -> None:
    """It takes over the positions, keeps the spatial weights, and trains and samples with PixArt's empty caption."""
    small = TransformerConfig(out_channels=8, num_layers=1, num_heads=1, head_dim=72, text_dim=64, sample_size=16)
    reference, null_text = randomise(pixart(small)), torch.randn(40, 64)
    extra = {"pos_embed": pixart_positions(reference), "y_embedder.y_embedding": null_text}
    path = save_pth(tmp_path / "PixArt.pth", pixart_state(reference) | extra)
    settings = [
        *train_settings(road.shards, tmp_path / "run"), f"train.init_from={path}", "model.num_heads=1",
        "model.head_dim=72", "model.pooled_text=false", "train.caption_dropout=1.0", "optimizer.lr=0.0",
    ]  # fmt: skip
    done = resident_ranks.run(1, TRAIN, *settings, "train.steps=1")
    assert f"starts from {path}: " in done.stdout and "the variance half of its output is left out" in done.stdout
    path.unlink()
    resident_ranks.run(1, TRAIN, *settings, "train.steps=2")
    last = tmp_path / "run/checkpoints/step-0000002"
    config = read_info(last).transformer
    assert (config.sample_size, config.temporal_pos, config.temporal_init) == (16, "branch", "zero")
    assert torch.equal(read_null_text(last), null_text)
    weights = load_file(last / "model.safetensors")
    kept = {name: tensor for name, tensor in reference.state_dict().items() if not name.startswith("proj_out")}
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
