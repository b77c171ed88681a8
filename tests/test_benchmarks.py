"""What `benchmarks.all` runs."""

from pathlib import Path

from benchmarks.all import ALL

# They want captions, or a run of the demo.
OTHERS = {"sample_bytes", "step_cache"}


def test_every_benchmark_is_one_of_all() -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    commands = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text()}
    assert commands - {"all"} == set(ALL) - {"gpu"} | OTHERS
