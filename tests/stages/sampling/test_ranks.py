"""Samples spread over ranks, and shared by ranks: the same files as those of one process, or the same latents."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.weights import CheckpointInfo, find_checkpoint, read_info
from stages.errors import ConfigError
from stages.sampling.checkpoint import check_ranks
from stages.sampling.config import SampleConfig
from tests.resident import ResidentRanks
from tests.running import free_port, run
from tests.stages.sampling.sequence_run import FRAMES, RANKS
from tests.stages.small_run import CONFIG, small_run

PROMPTS = "text_prompt=[a ball, a cube, a rather long prompt of a blue square that moves up and up, a star, a moon]"


def test_two_ranks_make_the_files_of_one(resident_ranks: ResidentRanks, tmp_path: Path) -> None:
    source = small_run(tmp_path / "run")
    settings = [PROMPTS, f"ckpt={source}", "height=32", "width=32", "frames=2", "steps=2", "batch_size=2",
                "formats=[png,latents]"]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                f"--master_port={free_port()}"]  # fmt: skip
    done = run(*torchrun, "pipelines/sample.py", *settings, f"output={tmp_path / 'two'}")
    resident_ranks.run(1, "pipelines/sample.py", *settings, f"output={tmp_path / 'one'}")
    one, two = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 5 + 4
    for name in one.keys() - {"config.yaml"}:
        assert one[name].read_bytes() == two[name].read_bytes(), name
    assert len(json.loads(two["summary.json"].read_text())["samples"]) == 5
    assert done.stdout.count("5 videos from") == 1
    assert "decode: 3 of 3" in done.stderr  # the first rank's share, though it makes the sheet of all


def test_ranks_that_share_each_video_make_the_latents_of_one(tmp_path: Path) -> None:
    source = small_run(tmp_path / "run")
    run(sys.executable, "-m", "tests.stages.sampling.sequence_run", source, tmp_path)
    expected, whole = torch.load(tmp_path / "1-0.pt")
    assert whole == {(4, FRAMES)} and expected.std() > 0.1  # two samples and their null branches
    for rank in range(RANKS):
        latents, seen = torch.load(tmp_path / f"{RANKS}-{rank}.pt")
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
        assert seen == {(4, 2 + rank % 2)}


@pytest.mark.parametrize(
    ("ranks", "sharing", "changes", "message"),
    [
        (1, 2, {}, "sequence_parallel: found 2, expected a divisor of the 1 ranks"),
        (4, 3, {}, "found 3, expected a divisor of the 4 ranks"),
        (4, 2, {"temporal_attention": "full"}, "expected 1 for a checkpoint with temporal_attention=full"),
        (4, 2, {}, None),
        (4, 1, {"temporal_attention": "full"}, None),
    ],
)
def test_what_ranks_cannot_share_is_refused(
    ranks: int, sharing: int, changes: dict, message: str | None, info: CheckpointInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    config, info = SampleConfig(sequence_parallel=sharing), replace(info, transformer=replace(CONFIG, **changes))
    if message is None:
        check_ranks(config, info)
        return
    with pytest.raises(ConfigError) as error:
        check_ranks(config, info)
    assert message in str(error.value)


def test_ranks_that_share_a_video_have_no_step_cache(info: CheckpointInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_ranks(SampleConfig(sequence_parallel=1, step_cache=0.1), info)
    with pytest.raises(ConfigError, match="step_cache: found 0.1 with sequence_parallel 2"):
        check_ranks(SampleConfig(sequence_parallel=2, step_cache=0.1), info)


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> CheckpointInfo:
    return read_info(find_checkpoint(str(small_run(tmp_path_factory.mktemp("small") / "run"))))
