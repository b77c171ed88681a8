"""The benchmarks one after the other, each a process of its own, and one table of all they found.

    python -m benchmarks.all                   those of a few minutes; the GPU's too, where there is one
    python -m benchmarks.all --long            all (but sample_bytes and step_cache, which want captions and a run)
    python -m benchmarks.all loader encode     these

Writes outputs/benchmarks/all.json. The exit status is 1 if one failed or a target does not hold.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.table import FOLDER, Row, report

SHORT = (
    "memory", "model", "text_encoder", "loader", "decoders", "precompute", "train_step", "corruption", "fuzz_videos",
)  # fmt: skip
LONG = ("sampling", "encode", "encode_memory", "exactness", "fuzz_metadata", "plan", "kills", "road")
GPU = ("gpu",)
ALL = SHORT + LONG + GPU


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description="Benchmarks, in one table.")
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(ALL))
    parser.add_argument("--long", action="store_true", help="also those that take longer")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in ALL]
    if unknown:
        print(f"error: found {unknown[0]!r}, expected some of {', '.join(ALL)}", file=sys.stderr)
        return 2
    here = SHORT + (LONG if options.long else ()) + (GPU if torch.cuda.is_available() else ())
    failed, rows = [], []
    for name in options.names or here:
        print(f"{name} …", flush=True)
        found, whole = _run(name)
        if not whole:
            failed.append(name)
        rows += found
    report("all", rows, ("torch",))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or any(row.holds is False for row in rows) else 0


def _run(name: str) -> tuple[list[Row], bool]:
    """What a benchmark found, and whether it came to its end."""
    before = _written()
    environment = os.environ | ({} if name in GPU else {"CUDA_VISIBLE_DEVICES": ""})  # the others are of the CPU
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.DEVNULL, env=environment)
    tables = sorted(path for path, time in _written().items() if before.get(path) != time)
    rows = [row for path in tables for row in json.loads(path.read_text())["rows"]]
    named = [Row(**(row | {"name": f"{name}: {row['name']}"})) for row in rows]
    return named, done.returncode == 0 and bool(tables)


def _written() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in FOLDER.glob("*.json")}


if __name__ == "__main__":
    sys.exit(main())
