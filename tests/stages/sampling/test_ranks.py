"""Samples spread over ranks: the same files as those of one process."""

import json
import os
import sys
from pathlib import Path

from tests.end_to_end.conftest import ROOT, run
from tests.stages.small_run import small_run

PROMPTS = "text_prompt=[a ball, a cube, a rather long prompt of a blue square that moves up and up, a star, a moon]"


def test_two_ranks_make_the_files_of_one(tmp_path: Path) -> None:
    source = small_run(tmp_path / "run")
    settings = [PROMPTS, f"ckpt={source}", "height=32", "width=32", "frames=2", "steps=2", "batch_size=2",
                "formats=[png,latents]"]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                f"--master_port={28100 + os.getpid() % 300}"]  # fmt: skip
    script = ROOT / "pipelines" / "sample.py"
    told = run(*torchrun, script, *settings, f"output={tmp_path / 'two'}").stdout
    run(sys.executable, script, *settings, f"output={tmp_path / 'one'}")
    one, two = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 5 + 4
    for name in one.keys() - {"config.yaml"}:
        assert one[name].read_bytes() == two[name].read_bytes(), name
    assert len(json.loads(two["summary.json"].read_text())["samples"]) == 5
    assert told.count("5 videos from") == 1
