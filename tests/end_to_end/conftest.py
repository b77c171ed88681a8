"""One small road, walked once for all tests: render and encode, here; train on two ranks and sample, by commands."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.command import run as run_command
from pipelines.encode import main
from tests.running import command, deepspeed, run

SMALL = ["shapes.clips=48", "shard_clips=16"]


def hashes(shards: Path) -> set[str]:
    """The names of all tars, which carry the hash of their bytes, and of the index."""
    return {str(path.relative_to(shards)) for pattern in ("*/*/*.tar", "index/*") for path in shards.glob(pattern)}


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
