"""Every command starts in a process of its own."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.resident import ROOT

COMMANDS = sorted(path.stem for path in (ROOT / "pipelines").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_is_for(name: str) -> None:
    if name == "app" and find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install 'wisesora[app]' to run this test")
    command = [sys.executable, "-m", f"pipelines.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"usage: {name}.py" in done.stdout, done.stderr
