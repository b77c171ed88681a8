"""Does a killed encode leave the dataset that an unkilled one leaves?

    python -m benchmarks.kills [MOMENTS]      prints a table, writes outputs/benchmarks/kills.json

At each of MOMENTS (20) random moments a run's driver is killed with SIGKILL, then a worker of another run, then a
whole node of a Ray cluster of three; each time the same command runs again. A minute or so for each moment.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil

from benchmarks.table import Row, report
from shards.dataset import Dataset

CLIPS, SHARD_CLIPS = 48, 8
SETTINGS = ["--input", "shapes", f"shapes.clips={CLIPS}", f"shard_clips={SHARD_CLIPS}"]
PORT = 6399

Kill = Callable[[subprocess.Popen], None]


@dataclass
class Tally:
    """equal: datasets with the hashes of an unkilled run. redone: committed shards that were made again."""

    trials: int = 0
    equal: int = 0
    lost: int = 0
    twice: int = 0
    redone: int = 0


def main() -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"  # the cluster is of this machine alone
    moments = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        started = time.perf_counter()
        _encode(root / "unkilled", root).wait()
        length_s = time.perf_counter() - started
        wanted = _hashes(root / "unkilled")
        tallies = {"driver": _trials(root, wanted, moments, length_s, _kill_driver, "driver")}
        tallies["worker"] = _trials(root, wanted, moments, length_s, _kill_worker, "worker")
        with _cluster() as cluster:
            tallies["node"] = _trials(root, wanted, moments, length_s, cluster.kill_node, "node")
    rows = [row for what, tally in tallies.items() for row in _rows(what, tally)]
    report("kills", rows, ("ray", "torch"))


def _rows(what: str, tally: Tally) -> Iterator[Row]:
    trials = f"of {tally.trials}"
    yield Row(
        f"{what}: datasets as without a kill", tally.equal, trials, None, None, trials, tally.equal == tally.trials
    )
    yield Row(f"{what}: clips lost", tally.lost, "clips", None, None, "0", tally.lost == 0)
    yield Row(f"{what}: clips twice", tally.twice, "clips", None, None, "0", tally.twice == 0)
    yield Row(f"{what}: committed shards made again", tally.redone, "shards", None, None, "0", tally.redone == 0)


def _trials(root: Path, wanted: set[str], moments: int, length_s: float, kill: Kill, what: str) -> Tally:
    tally, chance = Tally(), random.Random(what)
    for number in count():
        if tally.trials == moments:
            break
        dataset = root / f"{what}-{number}"
        process = _encode(dataset, root)
        _sleep(chance.uniform(0, length_s), process)
        if process.poll() is not None:  # it was faster than the first, and there is nobody left to kill
            length_s *= 0.9
            continue
        tally.trials += 1
        kill(process)
        process.wait()
        committed = len(list(dataset.glob("*/*/*.parquet")))
        again = _encode(dataset, root).wait()
        if again:
            print(f"{what} {tally.trials}: the same command exited {again}")
            continue
        tally.equal += _hashes(dataset) == wanted
        opened = Dataset.open(dataset)
        keys = Counter(key for bucket in opened.buckets for key in opened.index(bucket)["key"].to_pylist())
        tally.lost += CLIPS - len(keys)
        tally.twice += sum(count > 1 for count in keys.values())
        tally.redone += _made(dataset) - (2 * CLIPS // SHARD_CLIPS - committed)
        print(
            f"{what} {tally.trials}/{moments}: {committed} shards committed, {tally.equal} datasets equal", flush=True
        )
    return tally


def _made(dataset: Path) -> int:
    """Shards that the last run made, of both columns."""
    columns = json.loads((dataset / "summary.json").read_text())["this_run"]["columns"]
    return sum(column["shards"] for column in columns.values())


def _hashes(dataset: Path) -> set[str]:
    """The names of tars and indexes, which hold the hashes of their bytes."""
    return {str(path.relative_to(dataset)) for what in ("*/*/*.tar", "index/*") for path in dataset.glob(what)}


def _encode(dataset: Path, root: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipelines.encode", *SETTINGS, f"output={dataset}", f"data.videos={root / 'data'}"]
    address = os.environ.get("RAY_ADDRESS", "local")
    return _quiet(command, {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": address})


def _quiet(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=nowhere, stderr=nowhere)


def _sleep(seconds: float, process: subprocess.Popen) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)


def _kill_driver(process: subprocess.Popen) -> None:
    """And what it leaves of its Ray."""
    left = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in psutil.wait_procs(left, timeout=5)[1]:
        child.kill()


def _kill_worker(process: subprocess.Popen) -> None:
    """One of the actors that make shards; waits for one to be there. The run goes on by itself."""
    while process.poll() is None:
        actors = [child for child in psutil.Process(process.pid).children(recursive=True) if _is_actor(child)]
        if actors:
            random.choice(actors).send_signal(signal.SIGKILL)
            return
        time.sleep(0.01)


def _is_actor(process: psutil.Process) -> bool:
    try:
        return any("_ShardActor" in part for part in process.cmdline())
    except psutil.Error:
        return False


class _Cluster:
    """A head and two more nodes on this machine, each a process tree of its own."""

    def __init__(self) -> None:
        self._head = self._start("--head", f"--port={PORT}", "--include-dashboard=false")
        self._nodes = [self._join(), self._join()]

    def kill_node(self, process: subprocess.Popen) -> None:
        """One that is not the head. A new one takes its place."""
        node = self._nodes.pop(random.randrange(len(self._nodes)))
        self._end(node)
        self._nodes.append(self._join())

    def stop(self) -> None:
        for node in (*self._nodes, self._head):
            self._end(node)

    def _join(self) -> subprocess.Popen:
        return self._start(f"--address=127.0.0.1:{PORT}")

    def _start(self, *arguments: str) -> subprocess.Popen:
        ray = str(Path(sys.executable).with_name("ray"))
        node = _quiet([ray, "start", "--block", "--num-cpus=1", *arguments], dict(os.environ))
        time.sleep(10)  # until it is there
        return node

    @staticmethod
    def _end(node: subprocess.Popen) -> None:
        tree = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in tree:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        node.wait()


@contextmanager
def _cluster() -> Iterator[_Cluster]:
    cluster = _Cluster()
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{PORT}"
    try:
        yield cluster
    finally:
        del os.environ["RAY_ADDRESS"]
        cluster.stop()


if __name__ == "__main__":
    main()
