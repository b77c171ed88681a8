"""Processes that stay: scripts run in them one after another, with torch loaded and the ranks joined once.

``python -m tests.resident`` reads a line ``[script, argument, ...]`` at a time, and answers each with one.
"""

import contextlib
import gc
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Done:
    """What a script printed; of several ranks, one after the other."""

    stdout: str
    stderr: str


class ResidentRanks:
    """As many ranks as a script asks for, started when that many are asked for first."""

    def __init__(self) -> None:
        self._of_world: dict[int, list[subprocess.Popen[str]]] = {}

    def run(self, world: int, script: str, *arguments: object, status: int = 0, timeout_s: float = 300) -> Done:
        """Run a script of the project on ``world`` ranks; fails the test unless it ends with ``status`` on all."""
        if world not in self._of_world:
            self._of_world[world] = start(world)
        ranks = self._of_world[world]
        watchdog = threading.Timer(timeout_s, self._end, [world])
        watchdog.start()
        try:
            for rank in ranks:
                print(json.dumps([script, *map(str, arguments)]), file=rank.stdin, flush=True)
            lines = [rank.stdout.readline() for rank in ranks if rank.stdout]
        finally:
            watchdog.cancel()
        assert all(lines), f"a rank of {world} ended, or took more than {timeout_s} s, in {script} {arguments}"
        found = [json.loads(line) for line in lines]
        done = Done(*("".join(answer[name] for answer in found) for name in ("stdout", "stderr")))
        if any(answer["status"] != status for answer in found):
            self._end(world)  # they may wait for each other
            raise AssertionError(f"{script} {arguments} did not exit {status}\n{done.stdout}\n{done.stderr}")
        return done

    def close(self) -> None:
        for world in list(self._of_world):
            self._end(world)

    def _end(self, world: int) -> None:
        for rank in self._of_world.pop(world, []):
            rank.kill()
            rank.communicate()


def start(world: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.resident"],
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(world)
    ]


def run_script(script: str, arguments: list[str]) -> dict:
    """As ``python script arguments`` would, but for what is loaded already."""
    sys.argv = [script, *arguments]
    linear = torch.nn.functional.linear
    status: object = 0
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    torch.nn.functional.linear = linear  # ZeRO-3 puts its own there, which rounds otherwise, and leaves it
    gc.collect()
    return {"status": status, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what prints past Python's streams is no answer
    for line in sys.stdin:
        script, *arguments = json.loads(line)
        print(json.dumps(run_script(script, arguments)), file=answers, flush=True)
