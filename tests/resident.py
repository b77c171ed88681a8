"""Processes that stay: scripts run in them one after another, with torch loaded and the ranks joined once.

``python -m tests.resident`` reads a line ``[script, argument, ...]`` at a time, and answers each with one.
"""

import gc
import io
import json
import os
import runpy
import selectors
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tests.running import ROOT, environment, free_port


@dataclass(frozen=True)
class Done:
    """What a script printed; of several ranks, one after the other."""

    stdout: str
    stderr: str


class ResidentRanks:
    """As many ranks as a script asks for, started when that many are asked for first."""

    def __init__(self) -> None:
        self._of_world: dict[int, list[subprocess.Popen[str]]] = {}
        self._environment = environment()

    def run(self, world: int, script: str, *arguments: object, status: int = 0, timeout_s: float = 300) -> Done:
        """Run a script of the project on ``world`` ranks; fails the test unless it ends with ``status`` on all."""
        if world not in self._of_world:
            self._of_world[world] = start(world, self._environment)
        ranks = self._of_world[world]
        answers: dict[int, dict] = {}
        try:
            for rank in ranks:
                assert rank.stdin
                print(json.dumps([script, *map(str, arguments)]), file=rank.stdin, flush=True)
            for number, line in lines_of(ranks, timeout_s):
                assert line, f"rank {number} ended, or took more than {timeout_s} s, beside {answers}"
                answers[number] = json.loads(line)
                assert answers[number]["status"] == status, f"{script} {arguments} did not exit {status}: {answers}"
        except BaseException:
            self._end(world)  # they may wait for each other
            raise
        return Done(*("".join(answers[number][name] for number in range(world)) for name in ("stdout", "stderr")))

    def close(self) -> None:
        """Let all of them end by themselves, as they must be able to."""
        ranks = [rank for ranks in self._of_world.values() for rank in ranks]
        for rank in ranks:
            assert rank.stdin
            rank.stdin.close()
        statuses = [rank.wait(60) for rank in ranks]
        for rank in ranks:
            assert rank.stdout
            rank.stdout.close()
        assert statuses == [0] * len(ranks)

    def _end(self, world: int) -> None:
        for rank in self._of_world.pop(world):
            rank.kill()
            rank.communicate()


def start(world: int, variables: dict[str, str]) -> list[subprocess.Popen[str]]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.resident"],
            cwd=ROOT,
            env=variables | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(world)
    ]


def lines_of(ranks: list[subprocess.Popen[str]], timeout_s: float) -> Iterator[tuple[int, str]]:
    """A line of each rank, as they come; an empty one from a rank that has ended, or that the time ran out for."""
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as waiting:
        for number, rank in enumerate(ranks):
            assert rank.stdout
            waiting.register(rank.stdout, selectors.EVENT_READ, number)
        while waiting.get_map():
            ready = waiting.select(max(0, deadline - time.monotonic()))
            if not ready:
                yield min(key.data for key in waiting.get_map().values()), ""
            for key, _ in ready:
                waiting.unregister(key.fileobj)
                yield key.data, key.fileobj.readline()


def run_script(script: str, arguments: list[str]) -> int | str:
    """Its exit status, as of ``python script arguments`` but for what is loaded already."""
    sys.argv = [script, *arguments]
    linear = torch.nn.functional.linear
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own there, which rounds otherwise, and leaves it
        gc.collect()
    return 0


def serve() -> None:
    given, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what prints past Python's streams is no answer
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()  # for good: what logs may keep them
    from stages.engine import start_ranks  # only now, as DeepSpeed logs when it is imported

    start_ranks()
    for line in given:
        script, *arguments = json.loads(line)
        answer = {"status": run_script(script, arguments)}
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            answer[name] = stream.getvalue()
            stream.seek(0)
            stream.truncate()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
