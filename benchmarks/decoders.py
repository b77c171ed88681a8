"""How fast a clip is decoded: 56 frames at 8 fps of 7 s of 720p, scaled and cropped to 256 x 256.

    python -m benchmarks.decoders      prints a table, writes outputs/benchmarks/decoders.json; about 1 minute

Everything decodes with one thread, and processor time is measured, so that other work on the machine does not
count. The yardstick is a pass that decodes every packet and keeps nothing.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np

from benchmarks.table import Row, report
from stages.decode import decode_clip
from stages.pyav_reader import opened

FRAMES, FPS = 56, 8
ROUNDS = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "clip.mp4")
        _render(path)
        decode = partial(decode_clip, path, fps=FPS, height=256, width=256, timeout_s=600.0)
        whole = partial(decode, start_s=0.0, frames=FRAMES)
        ways: list[Callable[[], object]] = [
            lambda: _decode_only(path),
            whole,
            partial(whole, decoder="decord"),
            lambda: [decode(start_s=index / FPS, frames=1) for index in range(FRAMES)],
        ]
        bare, ours, decord, reopened = (_fastest(way) for way in ways)
    rows = [
        _row("56 frames, PyAV", ours, "a pass over all packets", bare / ours, 0.75),
        _row("56 frames, decord", decord, "a pass over all packets", bare / decord, None),
        _row("one call a frame", reopened, "56 frames, PyAV", reopened / ours, 3.0),
    ]
    report("decoders", rows, ("av", "decord2", "numpy"))


def _row(name: str, seconds: float, against: str, ratio: float, reach: float | None) -> Row:
    holds = None if reach is None else ratio >= reach
    return Row(name, seconds * 1000, "ms", against, ratio, None if reach is None else f">= {reach}", holds)


def _fastest(way: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        way()
        times.append(time.process_time() - started)
    return min(times)


def _decode_only(path: str) -> None:
    with opened(path) as (container, stream):
        for _ in container.decode(stream):
            pass


def _render(path: str) -> None:
    """A drifting texture with x264's default settings: B-frames, a key frame every 8 s."""
    texture = np.random.default_rng(0).normal(size=(1080, 1920))
    for _ in range(4):  # smooth it
        rows = texture + np.roll(texture, 2, 0)
        texture = (rows + np.roll(rows, 2, 1)) / 2
    picture = np.clip(128 + 40 * texture, 0, 255).astype(np.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for index in range(210):
            part = picture[index : index + 720, 2 * index : 2 * index + 1280]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(part), format="gray")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
