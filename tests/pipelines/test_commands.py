"""Every command starts in a process of its own."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from pipelines.command import run
from shards.errors import DatasetError, StoreError
from tests.running import ROOT

COMMANDS = sorted(path.stem for path in (ROOT / "pipelines").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_is_for(name: str) -> None:
    if name == "app" and find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install -e '.[app]' to run this test")
    command = [sys.executable, "-m", f"pipelines.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"usage: {name}.py" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("error", "status", "told"), [(DatasetError, 2, "error: s3://a\n"), (StoreError, 1, "failed: s3://a\n")]
)
def test_a_store_that_fails_is_no_mistake_of_the_user(
    error: type[Exception], status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: object) -> None:
        raise error("s3://a")

    assert run(main) == status and capsys.readouterr().err == told


def test_the_encode_command_leaves_models_to_its_workers() -> None:
    """It starts in the time that Ray takes, and its process holds none of their libraries."""
    listed = "import sys, pipelines.encode; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listed], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "ray" in loaded and not {"torch", "transformers", "diffusers"} & loaded
