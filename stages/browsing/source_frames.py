"""The frames of source files once more, read by a process of its own: a file that crashes its decoder, or makes it
hang, costs that file's picture alone.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shards.schema import Bucket
from stages.decoding.decode import HANGING, Decoder, decode_clip, hard_deadline
from stages.decoding.picture import decode_image
from stages.decoding.pyav_frames import Deadline
from stages.decoding.pyav_reader import probe, read_shown
from stages.decoding.source_file import source_file
from stages.errors import DecodeError

TIMEOUT_S = 60.0
FIRST_FRAME_PX = 320
"""The longer side of the picture of a rejected clip."""


@dataclass(frozen=True)
class Source:
    """A clip in its file, at a path or URL. kind: "video" or "image". start_s: after the file's first frame."""

    path: str
    kind: str
    start_s: float


class SourceReader:
    """Reads clips of source files. A context manager, which ends the process that does it."""

    def __init__(self, timeout_s: float = TIMEOUT_S):
        self._timeout_s = timeout_s

    def __enter__(self) -> "SourceReader":
        self._pool = _one_process()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def clip(self, source: Source, bucket: Bucket, fps: float, decoder: Decoder) -> np.ndarray:
        """The frames that a dataset was made from, uint8 [T, H, W, 3]. Raises DecodeError."""
        return self._run(_clip, source, bucket, fps, decoder)

    def first_frame(self, source: Source) -> np.ndarray:
        """One small picture, uint8 [H, W, 3]: of the clip's start, or else of the file's. Raises DecodeError."""
        return self._run(_first_frame, source)

    def _run(self, function: Callable[..., np.ndarray], source: Source, *arguments: Any) -> np.ndarray:
        try:
            return self._pool.submit(_within_deadline, self._timeout_s, function, source, arguments).result()
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = _one_process()
            raise DecodeError("decoder_crash", "its decoder crashed or hung") from None


def _one_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _within_deadline(
    timeout_s: float, function: Callable[..., np.ndarray], source: Source, arguments: tuple[Any, ...]
) -> np.ndarray:
    with hard_deadline(HANGING * timeout_s), source_file(source.path) as path:
        return function(timeout_s, replace(source, path=path), *arguments)


def _clip(timeout_s: float, source: Source, bucket: Bucket, fps: float, decoder: Decoder) -> np.ndarray:
    if source.kind == "image":
        return decode_image(source.path, bucket.height, bucket.width)
    size = {"height": bucket.height, "width": bucket.width, "frames": bucket.frames}
    return decode_clip(source.path, start_s=source.start_s, fps=fps, timeout_s=timeout_s, decoder=decoder, **size)


def _first_frame(timeout_s: float, source: Source) -> np.ndarray:
    if source.kind == "image":
        return decode_image(source.path, FIRST_FRAME_PX, FIRST_FRAME_PX)[0]
    deadline = Deadline(timeout_s)
    info = probe(source.path, deadline)
    scale = FIRST_FRAME_PX / max(info.height, info.width)
    height, width = max(1, round(scale * info.height)), max(1, round(scale * info.width))
    try:
        return _frame_at(source.path, source.start_s, height, width, deadline)
    except DecodeError:  # what it was rejected for, perhaps
        return _frame_at(source.path, 0.0, height, width, deadline)


def _frame_at(path: str, start_s: float, height: int, width: int, deadline: Deadline) -> np.ndarray:
    return read_shown(path, [start_s], height, width, deadline).pictures[0]
