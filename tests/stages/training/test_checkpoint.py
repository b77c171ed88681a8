"""Checkpoints are written beside the training: what is seen meanwhile, what a kill leaves, what stays."""

import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from models.errors import WeightsError
from models.loading import load_transformer
from models.objective import ObjectiveConfig
from models.transformer import Transformer, TransformerConfig
from models.weights import CheckpointInfo, save_checkpoint
from pipelines.config import load_config
from stages.engine import OPTIMIZER_STATES, WEIGHTS, Ranks
from stages.errors import ConfigError, WorkError
from stages.output import save_settings, settings_text
from stages.training import checkpoint
from stages.training.checkpoint import Checkpoints, Progress
from stages.training.config import TrainConfig
from stages.training.guard import Guard

SIZES = TransformerConfig(in_channels=2, out_channels=2, text_dim=4, num_layers=1, num_heads=2, head_dim=12)
INFO = CheckpointInfo(0, SIZES, ObjectiveConfig("velocity"), {}, {}, 1 / 8)
FRESH = Guard()
FILES = {"config.yaml", "ema.safetensors", "model.json", "model.safetensors", "null_text.safetensors"}


class FakeEngine:
    """Holds its state whole, filled with the number of the step."""

    def __init__(self) -> None:
        self.shapes = {name: tensor.shape for name, tensor in Transformer(SIZES, "velocity").state_dict().items()}
        self.trained, self.frozen = sum(shape.numel() for shape in self.shapes.values()), 0
        self.value = 0.0
        self.restored: dict[str, object] = {}
        self.trained_names = set(self.shapes)

    def gather(self, kind: str) -> dict[str, torch.Tensor]:
        offset = (WEIGHTS, *OPTIMIZER_STATES).index(kind) / 8
        return {name: torch.full(shape, self.value + offset) for name, shape in self.shapes.items()}

    def scatter(self, kind: str, tensors: dict[str, torch.Tensor]) -> None:
        self.restored[kind] = {float(tensor.max()) for tensor in tensors.values()}

    def set_step(self, step: int) -> None:
        self.restored["step"] = step


class Run:
    """A run of one rank that saves when told to."""

    def __init__(self, folder: Path, **settings: Any):
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text("seed: 0\n")
        self.folder, self.engine = folder, FakeEngine()
        ranks = Ranks(0, 1, torch.device("cpu"))
        given = {"keep_last": 1, "milestone_every": None, **settings}
        self.checkpoints = Checkpoints(folder, INFO, torch.ones(2, 4), self.engine, ranks, **given)  # type: ignore[arg-type]

    def save(self, step: int, guard: Guard = FRESH) -> None:
        self.engine.value = float(step)
        self.checkpoints.save(Progress(step, step, 0, 1, 1, "hash", guard))

    def seen(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*/step-*"))


class SlowDisk:
    """Writing checkpoint 2 waits, nearly done."""

    def __init__(self) -> None:
        self.waits, self.go_on = threading.Event(), threading.Event()

    def save_checkpoint(self, folder: Path, info: CheckpointInfo, *rest: Any) -> None:
        save_checkpoint(folder, info, *rest)
        if info.step == 2:
            self.waits.set()
            assert self.go_on.wait(60)


def test_training_goes_on_while_a_checkpoint_is_written_and_a_kill_leaves_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk()
    monkeypatch.setattr(checkpoint, "save_checkpoint", disk.save_checkpoint)
    run = Run(tmp_path / "run")
    run.save(1)
    run.save(2)
    run.engine.value = 3.0  # trained on before step 2 is on disk
    assert disk.waits.wait(60)
    killed = shutil.copytree(run.folder, tmp_path / "killed")
    assert run.seen() == ["step-0000001"] and checkpoint.newest(killed) == killed / "checkpoints" / "step-0000001"
    assert len(list((killed / "checkpoints").iterdir())) == 2
    disk.go_on.set()
    run.checkpoints.wait()
    (folder,) = (run.folder / "checkpoints").iterdir()
    assert folder.name == "step-0000002"
    assert {path.name for path in folder.iterdir()} == {
        *FILES, "training.json", "exp_avg.safetensors", "exp_avg_sq.safetensors"
    }  # fmt: skip
    for name, value in (("model", 2.0), ("ema", 2.125), ("exp_avg", 2.25), ("exp_avg_sq", 2.375)):
        assert {float(tensor.max()) for tensor in load_file(folder / f"{name}.safetensors").values()} == {value}

    again = Run(killed)
    again.save(2)
    again.checkpoints.wait()
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step-0000002"]


def test_milestones_stay_and_open(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", milestone_every=2)
    for step in (1, 2, 3, 4, 5, 4):  # goes back, as a resume from step 3 does
        run.save(step)
    run.checkpoints.wait()
    assert [path.name for path in sorted((run.folder / "milestones").iterdir())] == ["step-0000002", "step-0000004"]
    for step, folder in ((2.0, "step-0000002"), (4.0, "step-0000004")):
        milestone = run.folder / "milestones" / folder
        assert {path.name for path in milestone.iterdir()} == FILES
        for name, value in (("model", step), ("ema", step + 0.125)):
            assert {float(tensor.max()) for tensor in load_transformer(milestone, name).state_dict().values()} == {
                value
            }


def test_the_newest_by_their_steps_are_kept_and_an_incomplete_one_is_none_of_them(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", keep_last=2)
    for step in (9998000, 9999000, 10000000):
        run.save(step)
    run.checkpoints.wait()
    assert run.seen() == ["step-10000000", "step-9999000"]

    incomplete = Run(tmp_path / "incomplete", keep_last=1)
    (incomplete.folder / "checkpoints/step-0000009").mkdir(parents=True)
    with pytest.raises(WeightsError, match="holds checkpoints, config.yaml; expected"):
        checkpoint.newest(incomplete.folder)  # no run begins anew in its place
    for step in (1, 2):
        incomplete.save(step)
    incomplete.checkpoints.wait()
    assert incomplete.seen() == ["step-0000002", "step-0000009"]


def test_adam_has_counted_the_steps_that_were_not_skipped(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.save(5, Guard(skipped_steps=2, norms=3, norm_mean=1 / 3))
    run.checkpoints.wait()
    folder = checkpoint.newest(run.folder)
    assert folder
    progress = checkpoint.resume_point(folder, Progress(0, 0, 0, 1, 1, "hash"), INFO, "")
    assert progress == Progress(5, 5, 0, 1, 1, "hash", Guard(skipped_steps=2, norms=3, norm_mean=1 / 3))
    checkpoint.restore(folder, run.engine, progress)  # type: ignore[arg-type]
    assert run.engine.restored == {
        "weights": {5.0},
        "ema": {5.125},
        "exp_avg": {5.25},
        "exp_avg_sq": {5.375},
        "step": 3,
    }


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], None),
        (["output=b", "data.shards=other/place", "data.cache_gb=1", "data.read_threads=1", "train.steps=9"], None),
        (["train.batch_size=null", "train.batch_tokens=512", "train.save_every=3", "train.max_hours=1"], None),
        (["train.gradient_accumulation=2", "deepspeed.zero_optimization.stage=3", "validation.every=7"], None),
        (["data.strides=[1, 2]"], "data.strides was [1], is [1, 2]"),
        (["data.subclip_frames=[4]"], "data.subclip_frames was [], is [4]"),
        (["data.text={t5: 2, short: 1}"], "data.text.t5 was 1.0, is 2.0"),
        (["train.caption_dropout=0.2"], "train.caption_dropout was 0.1, is 0.2"),
        (
            ["optimizer.lr=0.5", "train.precision=fp32"],
            'train.precision was "bf16", is "fp32"; optimizer.lr was 0.0001, is 0.5',
        ),
    ],
)
def test_a_resume_tells_which_settings_change_the_steps_to_come(
    settings: list[str], told: str | None, tmp_path: Path
) -> None:
    given = ["output=a", "train.batch_size=8", "data.text={t5: 1, short: 1}"]
    before, now = (load_config(TrainConfig, None, [*given, *changes]) for changes in ([], settings))
    save_settings(tmp_path, before)
    found = checkpoint.changed_settings(tmp_path, settings_text(now))
    assert found == told


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_the_former(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", milestone_every=2)
    (run.folder / "milestones").touch()  # where a folder should be
    run.save(1)
    run.save(2)
    run.save(3)  # waits for the one before
    assert "a checkpoint could not be written" in str(run.checkpoints.failure())
    with pytest.raises(WorkError, match="milestones"):
        run.checkpoints.wait()
    assert run.seen() == ["step-0000001"]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "run", keep_last=2, milestone_every=10)
    numbers = run.engine.trained
    needed = 3 * 16 * numbers + 2 * 8 * numbers  # of the milestones at 10 and 20
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed))
    assert "2 milestones" in run.checkpoints.check_room(0, 29)
    with pytest.raises(ConfigError, match="GB free"):
        run.checkpoints.check_room(0, 30)
    assert "1 milestones" in run.checkpoints.check_room(10, 29)
    (run.folder / "checkpoints/step-0000002").mkdir(parents=True)  # incomplete: it takes the place of none
    run.save(1)
    run.checkpoints.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 16 * numbers))
    assert "2 milestones" in run.checkpoints.check_room(1, 29)  # one of the three is there
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 16 * numbers - 1))
    with pytest.raises(ConfigError, match="GB free"):
        run.checkpoints.check_room(1, 29)
