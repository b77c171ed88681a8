"""Whether damage is found: a flipped bit or a cut, at a uniformly random place of a random tar.

python -m benchmarks.corruption      renders and encodes 96 clips, then 200 trials; about 2 minutes

Each trial damages one tar, verifies the whole dataset, reads every sample of the tar's column as training does, and
puts the bytes back. The trailer of a tar is behind its last sample: verification alone looks at it.
"""

import bisect
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.table import Row, report
from shards.dataset import Dataset
from shards.errors import ShardError
from shards.schema import KEY, LENGTH, OFFSET
from shards.verification.fault import Fault
from shards.verification.verify import verify
from shards.writer import read_commit

TRIALS, SEED = 200, 0
SETTINGS = ("shapes.clips=96", "shard_clips=16")
TRAILER = "trailer"


@dataclass(frozen=True)
class Trial:
    """What was done to a tar, who saw it, and whether the part that holds it was named."""

    cut: bool
    part: str
    found: bool
    named: bool
    read: bool


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shards"
        command = [sys.executable, "-m", "pipelines.encode", "--input", "shapes", f"output={root}", *SETTINGS]
        subprocess.run(command, check=True, env={**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"})
        if any(isinstance(finding, Fault) for finding in verify(root)):
            raise SystemExit(f"{root} has faults before anything was done to it")
        draw = np.random.default_rng(SEED)
        tars = sorted(root.rglob("*.tar"))
        trials = [_trial(root, tars[draw.integers(len(tars))], bool(number % 2), draw) for number in range(TRIALS)]
    report("corruption", _rows(trials), ("numpy", "pyarrow", "xxhash"))


def _trial(root: Path, tar: Path, cut: bool, draw: np.random.Generator) -> Trial:
    whole = tar.read_bytes()
    position, bit = int(draw.integers(len(whole))), int(draw.integers(8))
    damaged = bytearray(whole[:position] if cut else whole)
    if not cut:
        damaged[position] ^= 1 << bit
    part = _part(tar, position)
    tar.write_bytes(damaged)
    try:
        faults = [finding for finding in verify(root) if isinstance(finding, Fault)]
        named = [(fault.path, fault.part) for fault in faults] == [(tar, part)]
        return Trial(cut, part, bool(faults), named, _seen_by_reader(root, tar))
    finally:
        tar.write_bytes(whole)


def _part(tar: Path, position: int) -> str:
    """Whose byte it is: the key of a record, or the trailer; from the commit alone."""
    rows = read_commit(tar.parent / f"{tar.name.partition('-')[0]}.parquet").written
    ends = [
        start + length for start, length in zip(*(rows[name].to_pylist() for name in (OFFSET, LENGTH)), strict=True)
    ]
    place = bisect.bisect_right(ends, position)
    return rows[KEY][place].as_py() if place < len(ends) else TRAILER


def _seen_by_reader(root: Path, tar: Path) -> bool:
    """Whether reading all samples of the tar's column stops at this tar."""
    bucket, column = tar.parent.parent.name, tar.parent.name
    dataset = Dataset.open(root)
    try:
        for row in range(dataset.index(bucket).num_rows):
            dataset.read(bucket, row, column)
    except ShardError as error:
        return str(tar) in str(error)
    return False


def _rows(trials: list[Trial]) -> list[Row]:
    rows = []
    for kind, chosen in (
        ("flipped bits", [trial for trial in trials if not trial.cut]),
        ("cut tars", [trial for trial in trials if trial.cut]),
        ("all trials", trials),
    ):
        count, good = len(chosen), sum(trial.found and trial.named for trial in chosen)
        rows.append(
            Row(
                f"{kind}: found, shard and key or trailer named", good, "trials", target=f"{count}", holds=good == count
            )
        )
    inside = [trial for trial in trials if trial.part != TRAILER]
    seen = sum(trial.read for trial in inside)
    name = "damage before the trailer that reading sees"
    rows.append(Row(name, seen, "trials", target=f"{len(inside)}", holds=seen == len(inside)))
    rows.append(Row("damage in the trailer", len(trials) - len(inside), "trials"))
    return rows


if __name__ == "__main__":
    main()
