"""How fast a clip is decoded: 56 frames at 8 fps of 7 s of 720p, scaled and cropped to 256 x 256.

    python -m benchmarks.decoders      prints a table, writes outputs/benchmarks/decoders.json; about 2 minutes

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
from stages.decoding.decode import decode_clip
from stages.decoding.pyav_frames import opened

FRAMES, FPS = 56, 8
ROUNDS = 5
BARE = "a pass over all packets"

GROUPS = {
    "": {},
    ", no B-frame refers to another": {"x264-params": "b-pyramid=none"},
    ", P-frames alone": {"bf": "0"},
}
"""x264's settings, its own by default: B-frames, half of which others refer to, and a key frame every 8 s."""


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "clip.mp4")
        for noise, content in ((0, "clean"), (4, "grainy")):
            for name, options in GROUPS.items():
                _render(path, noise, options)
                target = 0.75 if not name else None
                rows.append(_against_bare(f"56 frames, PyAV, {content}{name}", path, "pyav", target))
        _render(path, 0, {})
        rows.append(_against_bare("56 frames, decord", path, "decord", None))
        rows.append(_reopened(path))
    report("decoders", rows, ("av", "decord2", "numpy"))


def _against_bare(name: str, path: str, decoder: str, target: float | None) -> Row:
    bare, ours = _fastest(partial(_decode_only, path), partial(_decode, path, decoder=decoder))
    return _row(name, ours, BARE, bare / ours, target)


def _reopened(path: str) -> Row:
    whole, single = _fastest(
        partial(_decode, path),
        lambda: [_decode(path, start_s=index / FPS, frames=1) for index in range(FRAMES)],
        rounds=2,
    )
    return _row("one call a frame", single, "56 frames, PyAV", single / whole, 3.0)


def _row(name: str, seconds: float, against: str, ratio: float, target: float | None) -> Row:
    holds = None if target is None else ratio >= target
    return Row(name, seconds * 1000, "ms", against, ratio, None if target is None else f">= {target}", holds)


def _fastest(*ways: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """The shortest processor time of each; they take turns, so that a slow spell of the machine meets all."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, spent in zip(ways, times, strict=True):
            started = time.process_time()
            way()
            spent.append(time.process_time() - started)
    return [min(spent) for spent in times]


def _decode(path: str, **settings) -> np.ndarray:
    whole = {"start_s": 0.0, "frames": FRAMES, "fps": FPS, "height": 256, "width": 256, "timeout_s": 600.0}
    return decode_clip(path, **(whole | settings))


def _decode_only(path: str) -> None:
    with opened(path) as (container, stream):
        for _ in container.decode(stream):
            pass


def _render(path: str, noise: float, options: dict[str, str]) -> None:
    """A drifting texture, with grain of so many levels."""
    random = np.random.default_rng(0)
    texture = random.normal(size=(1080, 1920))
    for _ in range(4):  # smooth it
        rows = texture + np.roll(texture, 2, 0)
        texture = (rows + np.roll(rows, 2, 1)) / 2
    grain = random.normal(0, 1, (800, 1400))
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for index in range(210):
            part = 128 + 40 * texture[index : index + 720, 2 * index : 2 * index + 1280]
            if noise:
                down, right = random.integers(0, 80), random.integers(0, 120)
                part = part + noise * grain[down : down + 720, right : right + 1280]
            frame = av.VideoFrame.from_ndarray(part.clip(0, 255).astype(np.uint8), format="gray")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
