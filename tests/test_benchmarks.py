"""What `benchmarks.all` runs, and what can only be measured on a GPU."""

import subprocess
import sys
from pathlib import Path

from benchmarks.all import ALL
from benchmarks.gpu.__main__ import SLICES
from tests.running import ROOT, environment

# They want captions, or a run of the demo.
OTHERS = {"sample_bytes", "step_cache"}


def test_every_benchmark_is_one_of_all() -> None:
    commands = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    assert commands - {"all"} == set(ALL) - {"gpu"} | OTHERS


def test_every_slice_of_what_a_gpu_does_runs(tmp_path: Path) -> None:
    """Tiny, and here without a GPU: each line of the code, as time on one is dear."""
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    toy = [sys.executable, "-m", "benchmarks.gpu", "--toy"]
    subprocess.run(toy, cwd=tmp_path, env=variables, check=True, timeout=600)
    written = {path.stem for path in (tmp_path / "outputs/benchmarks").glob("*.json")}
    assert written == {f"gpu_{name}_toy" for name in SLICES}
