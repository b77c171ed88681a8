"""How the making of a column goes: a live bar, and the same figures for the summary."""

import time
from collections import Counter
from types import TracebackType
from typing import Any

from shards.schema import WRITTEN
from stages.columns import ShardReport
from stages.output import progress_bar


class Progress:
    """Adds up the reports of a column's shards; a context that shows a bar.

    places: how many workers there are, so that shares are of all of them.
    """

    def __init__(self, column: str, clips: int, shards: int, places: int):
        self.statuses: Counter[str] = Counter()
        self.column, self._clips, self._shards, self._places = column, clips, shards, places
        self._done = self._under_way = 0
        self._frames = self._replaced = self._reused = 0
        self._busy_s = self._wait_s = 0.0

    def __enter__(self) -> "Progress":
        self._started = time.perf_counter()
        self._bar = progress_bar(self._clips, self.column, "clip")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._seconds = time.perf_counter() - self._started
        self._bar.close()

    def watch(self, clips: int) -> None:
        """How many clips of unfinished shards have come so far."""
        self._under_way = clips
        self._bar.update(self.statuses.total() + clips - self._bar.n)

    def add(self, report: ShardReport) -> None:
        self.statuses.update(report.statuses)
        self._done += 1
        self._frames += report.frames
        self._replaced += report.replaced
        self._reused += report.reused
        self._busy_s += report.busy_s
        self._wait_s += report.wait_s
        self._seconds = time.perf_counter() - self._started
        now = self.summary()
        self._bar.set_postfix_str(
            f"{self._done}/{self._shards} shards, {now['frames_per_s']:.0f} frames/s, busy {now['busy_share']:.0%}, "
            f"waiting for frames {now['wait_share']:.0%}, rejected {now['reject_rate']:.1%}",
            refresh=False,
        )
        self.watch(max(0, self._under_way - report.statuses.total()))

    def summary(self) -> dict[str, Any]:
        """replaced: captions that are not the metadata's.

        reused: captions that another column, or a shard just before, had encoded.
        busy_share: of the workers' time in their models; wait_share: waiting for decoded frames.
        """
        clips, seconds = self.statuses.total(), max(self._seconds, 1e-9)
        return {
            "shards": self._done,
            "clips": clips,
            "frames": self._frames,
            "replaced": self._replaced,
            "reused": self._reused,
            "seconds": round(seconds, 1),
            "clips_per_s": clips / seconds,
            "frames_per_s": self._frames / seconds,
            "busy_share": self._busy_s / seconds / self._places,
            "wait_share": self._wait_s / seconds / self._places,
            "reject_rate": (clips - self.statuses[WRITTEN]) / max(1, clips),
        }
