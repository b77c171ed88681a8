"""What damaged videos do to the decoder: 500 mutations of small videos, each decoded as the encode job does it.

    python -m benchmarks.fuzz_videos   prints a table, writes outputs/benchmarks/fuzz_videos.json; about 15 seconds

A child process decodes one file after the other, under a time limit and a harder one. Where it dies the file
is counted, and the next child goes on behind it: nothing that a file does may reach the process that asked.
"""

import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream

from benchmarks.table import Row, report
from stages.decoding.decode import Decoder, decode_clip, hard_deadline
from stages.decoding.pyav_reader import probe
from stages.errors import DecodeError

MUTATIONS = 500
FRAMES, HEIGHT, WIDTH = 8, 64, 64
TIMEOUT_S, HARD_TIMEOUT_S, LOST_S = 10.0, 20.0, 40.0

REASONS = ("missing_file", "io_error", "undecodable", "too_short", "low_frame_rate", "timeout")
CRASH, EXCEPTION, HANG, WRONG = "crash", "exception", "hang", "wrong frames"

SOURCES = {  # name: codec, pixel format, options
    "h264.mp4": ("libx264", "yuv420p", {"g": "24"}),
    "h264.mkv": ("libx264", "yuv420p", {"g": "24"}),
    "hevc.mov": ("libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2"}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {}),
    "palette.gif": ("gif", "rgb8", {}),
}


def main() -> None:
    rows = []
    decoders: tuple[Decoder, ...] = ("pyav", "decord")
    with tempfile.TemporaryDirectory() as folder:
        sources = render_sources(Path(folder))
        for decoder in decoders:
            outcomes = Counter(fuzz(sources, Path(folder), MUTATIONS, decoder))
            rows += _rows(decoder, outcomes, must_hold=decoder == "pyav")
    report("fuzz_videos", rows, ("av", "decord2", "numpy"))


def _rows(decoder: str, outcomes: Counter[str], must_hold: bool) -> list[Row]:
    accounted = sum(outcomes[name] for name in ("frames", *REASONS, CRASH))
    all_accounted = Row(
        f"{decoder}: files accounted for", accounted, "files", target=f"{MUTATIONS}", holds=accounted == MUTATIONS
    )
    rows = [all_accounted] if must_hold else []
    for name in ("frames", *REASONS):
        rows.append(Row(f"{decoder}: {name}", outcomes[name], "files"))
    rows.append(Row(f"{decoder}: {CRASH} of the child, which costs the clip", outcomes[CRASH], "files"))
    for name in (HANG, EXCEPTION, WRONG):
        none = outcomes[name] == 0 if must_hold else None
        rows.append(Row(f"{decoder}: {name}", outcomes[name], "files", target="0", holds=none))
    return rows


def fuzz(sources: list[Path], folder: Path, mutations: int, decoder: Decoder = "pyav") -> Iterator[str]:
    """What became of each of so many mutated files: "frames", the reason why there are none, or the worse."""
    child = _Child(decoder)
    try:
        for seed in range(mutations):
            source = sources[seed % len(sources)]
            bad = folder / f"bad{source.suffix}"
            bad.write_bytes(mutate(source.read_bytes(), np.random.default_rng(seed)))
            if not child.alive():
                child.close()
                child = _Child(decoder)
            yield child.decode(str(bad), start_s=(0.0, 1.25)[seed % 2])
    finally:
        child.close()


class _Child:
    """A process that decodes what it is told to."""

    def __init__(self, decoder: Decoder):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, decoder), daemon=True)
        self._process.start()
        theirs.close()

    def alive(self) -> bool:
        return self._process.is_alive()

    def decode(self, path: str, start_s: float) -> str:
        started = time.monotonic()
        self._pipe.send((path, start_s))
        try:
            if self._pipe.poll(LOST_S):
                return self._pipe.recv()
        except EOFError:  # it died
            self._process.join()
            if time.monotonic() - started > HARD_TIMEOUT_S:
                return HANG
            return EXCEPTION if self._process.exitcode == 1 else CRASH
        self.close()
        return HANG

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, decoder: Decoder) -> None:
    while True:
        path, start_s = pipe.recv()
        with hard_deadline(HARD_TIMEOUT_S):
            pipe.send(_outcome(path, start_s, decoder))


def _outcome(path: str, start_s: float, decoder: Decoder) -> str:
    try:
        probe(path)
        pixels = decode_clip(
            path,
            start_s=start_s,
            frames=FRAMES,
            fps=8,
            height=HEIGHT,
            width=WIDTH,
            timeout_s=TIMEOUT_S,
            decoder=decoder,
        )
    except DecodeError as error:
        return error.reason
    return "frames" if pixels.shape == (FRAMES, HEIGHT, WIDTH, 3) and pixels.dtype == np.uint8 else WRONG


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """A copy of a file with one kind of damage."""
    bad = np.frombuffer(data, np.uint8).copy()
    kinds: list[Callable[[np.ndarray, np.random.Generator], np.ndarray]] = [
        _flip, _cut, _zero, _swap, _edit_head, _edit_tail,
    ]  # fmt: skip
    return kinds[random.integers(len(kinds))](bad, random).tobytes()


def _flip(data: np.ndarray, random: np.random.Generator) -> np.ndarray:
    places = random.integers(0, len(data), random.integers(1, 33))
    data[places] ^= (1 << random.integers(0, 8, len(places))).astype(np.uint8)
    return data


def _cut(data: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return data[: random.integers(0, len(data))]


def _zero(data: np.ndarray, random: np.random.Generator) -> np.ndarray:
    start = random.integers(0, len(data))
    data[start : start + random.integers(1, len(data) // 4)] = 0
    return data


def _swap(data: np.ndarray, random: np.random.Generator) -> np.ndarray:
    size = int(random.integers(1, len(data) // 4))
    one, other = np.sort(random.integers(0, len(data) - size, 2))
    data[one : one + size], data[other : other + size] = (
        data[other : other + size].copy(),
        data[one : one + size].copy(),
    )
    return data


def _edit_head(data: np.ndarray, random: np.random.Generator) -> np.ndarray:
    places = random.integers(0, min(1024, len(data)), random.integers(1, 9))
    data[places] = random.choice([0, 1, 127, 128, 255], len(places))
    return data


def _edit_tail(data: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An MP4 has its index at the end."""
    return _edit_head(data[::-1], random)[::-1]


def render_sources(folder: Path) -> list[Path]:
    """Small videos of 2.5 s, of a texture that moves."""
    texture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    paths = []
    for name, (codec, pixel_format, options) in SOURCES.items():
        paths.append(folder / name)
        with av.open(str(paths[-1]), "w") as container:
            stream = cast(VideoStream, container.add_stream(codec, rate=20, options=options))
            stream.height, stream.width, stream.pix_fmt = 72, 96, pixel_format
            for index in range(50):
                picture = np.ascontiguousarray(texture[index : index + 72, 2 * index : 2 * index + 96])
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return paths


if __name__ == "__main__":
    main()
