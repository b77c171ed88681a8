"""Does an encode's memory grow with its clips?

    python -m benchmarks.encode_memory [CLIPS]      prints a table, writes outputs/benchmarks/encode_memory.json

Encodes 500 clips, then CLIPS (10,000) with the same command, and compares the peaks of all its processes together:
the driver, Ray, the workers and the decoders, memory that several share counted once. About 5 minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.table import Row, report
from stages.shapes.render import ShapesConfig, render_dataset

FEW, MANY = 500, 10_000
SOURCES = 16
SETTINGS = ["clip={height: 32, width: 32, frames: 4, fps: 4}", "vae=tiny", "text_encoder=tiny", "shard_clips=64"]


def main() -> None:
    many = int(sys.argv[1]) if len(sys.argv) > 1 else MANY
    with tempfile.TemporaryDirectory() as folder:
        _, videos = render_dataset(Path(folder) / "data", ShapesConfig(clips=SOURCES))
        few_gb, many_gb = (_peak_gb(Path(folder), Path(videos), clips) for clips in (FEW, many))
    against, ratio = f"{FEW} clips", many_gb / few_gb
    rows = [
        Row(f"peak memory of an encode of {FEW} clips", few_gb, "GB"),
        Row(f"peak memory of an encode of {many} clips", many_gb, "GB", against, ratio, "<= 1.1", ratio <= 1.1),
    ]
    report("encode_memory", rows, ("ray", "torch"))


def _peak_gb(folder: Path, videos: Path, clips: int) -> float:
    metadata, output = folder / f"{clips}.jsonl", folder / f"shards-{clips}"
    metadata.write_text("".join(_lines(videos, clips)))
    command = [sys.executable, "-m", "pipelines.encode", "--input", "internvid", *SETTINGS]
    command += [f"data.metadata={metadata}", f"data.videos={videos}", f"output={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _tree_bytes(process.pid))
        time.sleep(0.25)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["written"] == clips, summary
    return peak / 1e9


def _tree_bytes(pid: int) -> int:
    """The proportional set sizes of a process and all below it."""
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:
        return 0  # one has just ended: the next look will do
    return total


def _lines(videos: Path, clips: int) -> list[str]:
    """So many different clips by their names, of a few files."""
    files = sorted(path.name for path in videos.iterdir())
    times = {"Start_timestamp": "00:00:00.000", "End_timestamp": "00:00:01.000"}
    rows = (
        {"YoutubeID": f"clip{n:07d}", **times, "Caption": f"caption {n}", "video_path": files[n % len(files)]}
        for n in range(clips)
    )
    return [json.dumps(row) + "\n" for row in rows]


if __name__ == "__main__":
    main()
