"""Planning at the size of InternVid: ``python -m benchmarks.plan [ROWS]``, ten million unless told otherwise.

Writes made-up InternVid lines, plans them in a process of its own, part by part, counts what became of them and
walks all shards. Ten million rows take 3 GB of the temporary folder.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.table import Row, report
from shards.dataset import create_dataset
from stages.planning.metadata import read_internvid
from stages.planning.plan import ClipConfig, Plan, PlanConfig, counts, plan, probe_here, shard_plans

ROWS = 10_000_000
VIDEOS = 100_000
MOST_GB, MOST_MINUTES = 4, 10
SEED = 0

_LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)
_WORDS = "a the man woman dog child street car red blue is are walking running with on in of and standing".split()


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory() as folder:
        _child("write", folder, rows)
        measured = json.loads(_child("plan", folder, rows))
    minutes, peak_gb = measured["seconds"] / 60, measured["peak_gb"]
    report(
        "plan",
        [
            Row("rows", rows, "rows"),
            Row("planned, counted and walked", rows / measured["seconds"], "rows/s"),
            Row("time", minutes, "minutes", target=f"<= {MOST_MINUTES}", holds=minutes <= MOST_MINUTES),
            Row("  of which planning", measured["plan_s"] / 60, "minutes"),
            Row("  counting", measured["count_s"] / 60, "minutes"),
            Row("  walking the shards", measured["walk_s"] / 60, "minutes"),
            Row("processor time of it all", measured["processor_s"] / 60, "minutes"),
            Row("peak memory", peak_gb, "GB", target=f"<= {MOST_GB}", holds=peak_gb <= MOST_GB),
            Row("plan on disk", measured["bytes"] / rows, "bytes/row"),
            Row("clips", measured["clips"], "clips"),
            Row("clips planned", measured["pending"], "clips"),
        ],
        ["pyarrow", "numpy", "xxhash"],
    )


def write(folder: Path, rows: int) -> None:
    """The metadata, and an empty file for nine of ten whole videos that it speaks of."""
    rng = np.random.default_rng(SEED)
    ids = [bytes(row).decode() for row in rng.choice(_LETTERS, (VIDEOS, 11))]
    (folder / "videos").mkdir()
    for name in ids[: VIDEOS * 9 // 10]:
        (folder / "videos" / f"{name}.mp4").touch()
    with open(folder / "rows.jsonl", "w", encoding="ascii") as file:
        for start in range(0, rows, 100_000):
            file.writelines(_lines(rng, ids, min(100_000, rows - start)))


def _lines(rng: np.random.Generator, ids: list[str], rows: int) -> list[str]:
    picked = rng.integers(0, len(ids), rows).tolist()
    starts = rng.integers(0, 3_600_000, rows).tolist()
    lasts = np.clip(rng.lognormal(1.3, 1.0, rows) * 1000, 300, 120_000).astype(int).tolist()  # 84 % under 10 s
    scores = np.clip(rng.normal([4.5, 0.4], [0.6, 0.03], (rows, 2)), 0, 10).astype(np.float16).tolist()
    words = rng.integers(0, len(_WORDS), (rows, 20)).tolist()
    lengths = rng.integers(5, 21, rows).tolist()
    return [
        json.dumps(
            {
                "YoutubeID": ids[video],
                "Start_timestamp": _clock(start),
                "End_timestamp": _clock(start + last),
                "Caption": " ".join(_WORDS[word] for word in caption[:length]),
                "Aesthetic_Score": aesthetic,
                "UMT_Score": umt,
            }
        )
        + "\n"
        for video, start, last, (aesthetic, umt), caption, length in zip(
            picked, starts, lasts, scores, words, lengths, strict=True
        )
    ]


def _clock(milliseconds: int) -> str:
    seconds, fraction = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{fraction:03}"


def measure(folder: Path) -> dict[str, float]:
    """Plan, count and walk, in this process; its peak memory is of nothing else."""
    videos = str(folder / "videos")
    root = create_dataset(folder / "dataset", "internvid")
    stored = Plan(root)
    config = PlanConfig(ClipConfig(frames=(16, 24, 32, 40, 48, 56)), filter="aesthetic >= 3.5")
    times = [time.perf_counter()]
    rows = read_internvid(str(folder / "rows.jsonl"), videos)
    for part in plan(rows, config, "internvid", stored, probe=probe_here(videos)):
        stored.append(part)
    times.append(time.perf_counter())
    totals = counts(stored, {})
    times.append(time.perf_counter())
    walked = sum(len(shard.clips) for shard in shard_plans(stored.parts(), videos))
    times.append(time.perf_counter())
    assert walked == totals.pending
    plan_s, count_s, walk_s = np.diff(times).tolist()
    return {
        "seconds": times[-1] - times[0],
        "plan_s": plan_s,
        "count_s": count_s,
        "walk_s": walk_s,
        "processor_s": time.process_time(),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "bytes": sum(path.stat().st_size for path in (folder / "dataset/plan").iterdir()),
        "clips": totals.clips,
        "pending": totals.pending,
    }


def _child(what: str, folder: str, rows: int) -> str:
    command = [sys.executable, "-m", "benchmarks.plan", "--child", what, folder, str(rows)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, where, number = sys.argv[2:]
        if what == "write":
            write(Path(where), int(number))
        else:
            print(json.dumps(measure(Path(where))))
    else:
        main()
