"""Commands and scripts of the project as processes, with one thread each."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN = "pipelines/train.py"


def run(*arguments: object, status: int = 0, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's folder; fails the test unless it exits with ``status``."""
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
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), TRAIN]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool], timeout_s: float = 180) -> None:
    """Until something is so, of a process that still runs then."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
