"""The whole road by its own commands: how long it takes, and what comes out.

python -m benchmarks.road          the demo: about 10 minutes on 2 cores
python -m benchmarks.road clips    a folder of real and odd clips (WISESORA_ASSETS): about 1 minute
python -m benchmarks.road setup    a virtual environment from nothing, then the tests in it: about 10 minutes
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.table import Row, report
from stages.decoding.decode import decode_clip
from stages.decoding.pyav_reader import probe
from stages.errors import DecodeError

PACKAGES = ("torch", "deepspeed", "ray", "av", "diffusers", "transformers")


def demo() -> list[Row]:
    """A fresh demo, start to report, and the share of its samples that show what their prompts say."""
    outputs = Path("outputs/demo")
    if outputs.exists():
        raise SystemExit(f"{outputs} exists: move it away, the demo is measured from nothing")
    minutes = _minutes(["make", "demo", f"VENV={sys.prefix}"])
    adherence = json.loads((outputs / "metrics.json").read_text())["adherence"]
    rows = [Row("demo on 2 cores, start to report", minutes, "minutes", target="<= 10", holds=minutes <= 10)]
    for split in ("held_out", "seen"):
        for what in ("colour_and_direction", "shape"):
            share = adherence[split][what]
            name, percent = f"{split}, {what} right, of {share['samples']}", 100 * share["share"]
            if (split, what) == ("held_out", "colour_and_direction"):
                rows.append(Row(name, percent, "%", target=">= 90", holds=percent >= 90 and share["samples"] >= 112))
            else:
                rows.append(Row(name, percent, "%"))
    return rows


def clips() -> list[Row]:
    """Every line of the InternVid-format sample, and every file of the folder of odd videos."""
    assets = Path(os.environ["WISESORA_ASSETS"])
    mini = assets / "internvid_mini"
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"data.metadata={mini / 'InternVid-mini.jsonl'}", f"data.videos={mini / 'clips'}", "vae=tiny",
                    "text_encoder=tiny", f"output={folder}", "clip={height: 64, width: 64, frames: 8}"]  # fmt: skip
        _minutes([sys.executable, "-m", "pipelines.encode", "--input", "internvid", *settings])
        summary = json.loads((Path(folder) / "summary.json").read_text())
    counted = summary["written"] + summary["duplicates"] + summary["filtered"] + sum(summary["rejected"].values())
    odd = sorted((assets / "videos" / "odd").iterdir())
    valid = [path for path in odd if not path.name.startswith(("bad_", "audio_only"))]
    decoded = [path for path in valid if _reason(path) is None]
    named = [path for path in odd if path not in valid and _reason(path)]
    broken = len(odd) - len(valid)
    written = summary["written"]
    return [
        Row("lines of internvid_mini accounted for", counted, "lines", target="48", holds=counted == 48),
        Row("good and odd but valid clips written", written, "clips", target="35", holds=written == 35),
        Row(f"valid odd videos decoded, of {len(valid)}", len(decoded), "files", target="all", holds=decoded == valid),
        Row(f"broken ones named, of {broken}", len(named), "files", target="all", holds=len(named) == broken),
    ]


def setup() -> list[Row]:
    """A new environment with the packages from the index, then ``make test`` in it."""
    with tempfile.TemporaryDirectory() as folder:
        venv = f"VENV={folder}/venv"
        install = _minutes(["make", "setup", venv])
        tests = _minutes(["make", "test", venv])
    return [
        Row("set-up from nothing", install, "minutes", target="<= 5", holds=install <= 5),
        Row("make test", tests, "minutes", target="<= 8", holds=tests <= 8),
    ]


def _minutes(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return (time.perf_counter() - started) / 60


def _reason(path: Path) -> str | None:
    """Why the file's first second, or what there is of it, cannot be decoded; None if it can."""
    try:
        frames = min(8, max(1, int(8 * probe(str(path)).duration_s)))
        decode_clip(str(path), start_s=0.0, frames=frames, fps=8.0, height=64, width=64, timeout_s=60.0)
    except DecodeError as error:
        return error.reason
    return None


if __name__ == "__main__":
    part = {"demo": demo, "clips": clips, "setup": setup}[sys.argv[1] if len(sys.argv) > 1 else "demo"]
    report(f"road_{part.__name__}", part(), PACKAGES)
