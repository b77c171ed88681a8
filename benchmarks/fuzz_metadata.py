"""Damaged metadata is read, planned and counted to the last line: ``python -m benchmarks.fuzz_metadata``.

Ten thousand seeded mutations of real rows of InternVid's JSON lines, Panda-70M's CSV and the JSON files of its
downloader: bytes flipped, cut and doubled, fields swapped, removed, renamed and replaced by anything. Each kind is
read in a process of its own, so that a crash is seen, and within a time, so that a hang is.
"""

import csv
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.table import Row, report
from stages.planning import metadata
from stages.planning.metadata import read_internvid
from stages.planning.panda import read_panda
from stages.planning.plan import ClipConfig, Plan, PlanConfig, counts, plan, probe_here

MUTATIONS = 10_000
LIMIT_S = 300
SEED = 0

INTERNVID = [
    {
        "YoutubeID": "HdYoyzCSWyw",
        "Start_timestamp": "00:03:10.567",
        "End_timestamp": "00:03:11.200",
        "Caption": "woman using a computer mouse and keyboard",
        "Aesthetic_Score": 4.58984375,
        "UMT_Score": 0.39794921875,
    },
    {
        "YoutubeID": "qJrOyggIB-w",
        "Start_timestamp": "00:07:33.689",
        "End_timestamp": "00:07:51.085",
        "Caption": "a screen shot of heroes of the storm with people in action",
        "Aesthetic_Score": 4.29296875,
        "UMT_Score": 0.4501953125,
    },
]
PANDA = [
    {
        "videoID": "-2yHu5qgTzM",
        "url": "https://www.youtube.com/watch?v=-2yHu5qgTzM",
        "timestamp": [["0:01:20.880", "0:01:23.983"], ["0:02:31.151", "0:02:34.320"]],
        "caption": ["A neuron in a black background.", 'A woman isn\'t standing on a black "background".'],
        "matching_score": [0.451416015625, 0.4990234375],
        "desirable_filtering": ["1_still_foreground_image", "desirable"],
        "shot_boundary_detection": [[["0:00:00.000", "0:00:03.069"]], [["0:00:00.000", "0:00:03.169"]]],
    }
]
DOWNLOADED = [
    {
        "url": "https://www.youtube.com/watch?v=-2yHu5qgTzM",
        "caption": "A neuron in a black background.",
        "matching_score": "0.451416015625",
        "desirable_filtering": "desirable",
        "shot_boundary_detection": "[['0:00:00.000', '0:00:03.069']]",
        "clips": "[('00:01:20.880', '00:01:23.983')]",
        "key": "0000000_00000",
        "status": "success",
        "error_message": None,
    }
]

_ANYTHING: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e308,
    10**400,
    float("inf"),
    float("nan"),
    "",
    " ",
    "0",
    "\ud800",
]
_ANYTHING += [[], {}, [None], [[]], {"a": {"b": []}}, "x" * 50_000, "9" * 5000, "[" * 3000, "[" * 150 + "]" * 150]
_ANYTHING += ["-" * 20_000 + "1", "'\\d'", "\0", "\r", "b'a'", "99:99:99.999", "0:0:0", "https://youtu.be/", [1] * 5000]


@dataclass(frozen=True)
class Outcome:
    """What became of the mutated lines of one kind. usable: clips that were neither rejected nor duplicates."""

    lines: int
    counted_lines: int
    clips: int
    accounted_clips: int
    planned_again: int
    usable: int
    slowest_s: float


def fuzz(kind: str, mutations: int, folder: Path, seed: int = SEED) -> Outcome:
    """Write mutated rows below a folder, plan them, and count them."""
    rng = random.Random(f"{kind} {seed}")
    videos = folder / "videos"
    videos.mkdir()
    lines, read = KINDS[kind](rng, mutations, folder)
    config = PlanConfig(ClipConfig(64, 64, (1, 8), windows=2))
    stored, slowest_s = Plan(folder / "dataset"), _Slowest()
    for part in plan(slowest_s.timed(read()), config, kind, stored, probe=probe_here(str(videos))):
        stored.append(part)
    totals = counts(stored, {})
    again = sum(part.num_rows for part in plan(read(), config, kind, stored, probe=probe_here(str(videos))))
    return Outcome(
        lines=lines,
        counted_lines=totals.rows,
        clips=sum(part.num_rows for part in stored.parts(["clip"])),
        accounted_clips=totals.pending + totals.filtered + totals.duplicates + sum(totals.rejected.values()),
        planned_again=again,
        usable=totals.pending + totals.rejected.get("missing_file", 0),
        slowest_s=slowest_s.seconds,
    )


Read = Callable[[], Iterator[metadata.Row]]


def _internvid(rng: random.Random, mutations: int, folder: Path) -> tuple[int, Read]:
    content = [_bytes(rng, json.dumps(_fields(rng, rng.choice(INTERNVID))).encode()) for _ in range(mutations)]
    path = folder / "rows.jsonl"
    return _write(path, content), lambda: read_internvid(str(path), str(folder / "videos"))


def _panda(rng: random.Random, mutations: int, folder: Path) -> tuple[int, Read]:
    content = [_bytes(rng, _csv_line(_fields(rng, rng.choice(PANDA)))) for _ in range(mutations)]
    path = folder / "rows.csv"
    header = ",".join(PANDA[0]).encode()
    return _write(path, [header, *content]) - 1, lambda: read_panda(str(path), str(folder / "videos"))


def _downloaded(rng: random.Random, mutations: int, folder: Path) -> tuple[int, Read]:
    for number in range(mutations):
        path = folder / f"videos/{number // 1000:05}/{number // 1000:05}00_{number % 1000:05}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_bytes(rng, json.dumps(_fields(rng, rng.choice(DOWNLOADED))).encode()))
        if rng.random() < 0.5:
            path.with_suffix(".mp4").touch()
    return mutations, lambda: read_panda("", str(folder / "videos"))


KINDS = {"internvid": _internvid, "panda70m": _panda, "downloader": _downloaded}


def _fields(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """The row of another video, mutated."""
    name = "".join(rng.choices("abcXYZ019-_", k=11))
    old = row.get("YoutubeID") or row["url"][-11:]
    fields = {key: value.replace(old, name) if isinstance(value, str) else value for key, value in row.items()}
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        key, other = rng.choice(list(fields)), rng.choice(list(fields))
        what = rng.randrange(5)
        if what == 0:
            fields[key], fields[other] = fields[other], fields[key]
        elif what == 1 and len(fields) > 1:
            del fields[key]
        elif what == 2:
            fields[key] = rng.choice(_ANYTHING)
        elif what == 3:
            fields[key.swapcase()] = fields.pop(key)
        else:
            fields[key] = [fields[key], rng.choice(_ANYTHING)]
    return fields


def _bytes(rng: random.Random, line: bytes) -> bytes:
    data = bytearray(line)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 8])):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice([1, 1, 2, 10, 100]))
        what = rng.randrange(4)
        if what == 0:
            data[start:end] = rng.randbytes(end - start)
        elif what == 1:
            del data[start:end]
        elif what == 2:
            data[start:start] = data[start:end] * rng.choice([1, 2, 50])
        elif rng.random() < 0.2:
            del data[start:]
    return bytes(data)


def _csv_line(fields: dict[str, Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([str(value) for value in fields.values()])
    return text.getvalue().encode(errors="surrogatepass")


def _write(path: Path, lines: list[bytes]) -> int:
    """How many lines it has that are not blank."""
    path.write_bytes(b"\n".join(line.replace(b"\n", b" ") for line in lines))
    return sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))


class _Slowest:
    """The longest time that an iterator took for one item."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, items: Iterator[metadata.Row]) -> Iterator[metadata.Row]:
        started = time.perf_counter()
        for item in items:
            self.seconds = max(self.seconds, time.perf_counter() - started)
            yield item
            started = time.perf_counter()


def main() -> None:
    rows = []
    for number, kind in enumerate(KINDS):
        mutations = MUTATIONS // 3 + (number < MUTATIONS % 3)
        try:
            command = [sys.executable, "-m", "benchmarks.fuzz_metadata", kind, str(mutations)]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S)
            ended = "" if child.returncode == 0 else f"exit status {child.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"not done in {LIMIT_S} s"
        if ended:
            rows.append(Row(f"{kind}: {ended}", 1, "crashes", target="0", holds=False))
            continue
        outcome = Outcome(**json.loads(child.stdout))
        lost = abs(outcome.lines - outcome.counted_lines) + abs(outcome.clips - outcome.accounted_clips)
        rows += [
            Row(f"{kind}: crashes and hangs", 0, "of 1", target="0", holds=True),
            Row(f"{kind}: lines with mutations", outcome.lines, "lines"),
            Row(f"{kind}: lines and clips that are not accounted for", lost, "lines", target="0", holds=lost == 0),
            Row(f"{kind}: clips that a second run plans again", outcome.planned_again, "clips"),
            Row(f"{kind}: clips that could still be used", outcome.usable, "clips"),
            Row(f"{kind}: slowest line", outcome.slowest_s, "s"),
        ]
    report("fuzz_metadata", rows, ["pyarrow"])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as where:
            print(json.dumps(asdict(fuzz(sys.argv[1], int(sys.argv[2]), Path(where)))))
    else:
        main()
