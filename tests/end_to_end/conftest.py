"""One small road, walked once for all tests: render and encode, here; train on two ranks and sample, by commands."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.command import run as run_command
from pipelines.encode import main

ROOT = Path(__file__).parent.parent.parent
TRAIN = "pipelines/train.py"
SMALL = ["shapes.clips=48", "shard_clips=16"]


def run(*arguments: object, status: int = 0, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command of the project; fails the test unless it exits with ``status``."""
    done = subprocess.run([str(part) for part in arguments], cwd=ROOT, env=environment(), timeout=timeout_s,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == status, f"{arguments} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def environment() -> dict[str, str]:
    """Ours, with one thread a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(name: str) -> list[str]:
    return [sys.executable, "-m", f"pipelines.{name}"]


def deepspeed(ranks: int) -> list[str]:
    port = str(29500 + os.getpid() % 400)
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--num_gpus", str(ranks), "--master_port", port, TRAIN]


def hashes(shards: Path) -> set[str]:
    """The names of all tars, which carry the hash of their bytes, and of the index."""
    return {str(path.relative_to(shards)) for pattern in ("*/*/*.tar", "index/*") for path in shards.glob(pattern)}


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool], timeout_s: float = 180) -> None:
    """Until something is so, of a process that still runs then."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def encode(*arguments: object, status: int = 0) -> None:
    """The encode command in this process, on the cluster that it has; fails the test unless it gives ``status``."""
    assert run_command(main, [str(part) for part in arguments]) == status


@dataclass(frozen=True)
class Road:
    """The folders that the commands wrote."""

    shards: Path
    run: Path
    samples: Path


def train_settings(shards: Path | str, run: Path) -> list[str]:
    """A run of 4 steps that saves every 2."""
    return [
        "--config", "configs/train/shapes.yaml", f"data.shards={shards}", f"output={run}", "train.steps=4",
        "train.save_every=2", "train.log_every=1", "train.log_sample_ids=true", "train.batch_size=8",
        "train.milestone_every=2", "model.num_layers=1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def shards(ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("road") / "shards"
    encode("--input", "shapes", f"output={folder}", *SMALL)
    return folder


@pytest.fixture(scope="session")
def road(shards: Path) -> Road:
    trained, samples = shards.with_name("run"), shards.with_name("samples")
    run(*deepspeed(2), *train_settings(shards, trained))
    prompts = "text_prompt=[a red ball moves left, a blue square moves up, a red ball moves left]"
    run(*command("sample"), prompts, f"ckpt={trained}", f"output={samples}", "steps=2", "batch_size=2")
    return Road(shards, trained, samples)
