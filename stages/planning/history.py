"""What a plan has already: rows that are not planned again, and those that are, for a retry."""

from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.schema import Bucket
from stages.planning.hashes import HashCounts
from stages.planning.outcomes import IDENTITY, RESULT, LastAttempts, Outcomes, occurrence_ids, results
from stages.planning.plan_table import Plan


class History:
    """The stored plan, and the rows that were met since, as hashes.

    ``next_shard``: of each bucket.
    """

    NEW, DONE = -1, -2

    def __init__(self, plan: Plan, retry: Collection[str], outcomes: Outcomes):
        self.next_shard: dict[Bucket, int] = {}
        self._stored, self._met = HashCounts(), HashCounts()
        last = LastAttempts(plan) if retry else None
        failed = []
        for part in plan.parts(sorted({*IDENTITY, *RESULT}) if retry else ["clip", "occurrence", "bucket", "shard"]):
            self._stored.add(occurrence_ids(part["clip"].to_numpy(), part["occurrence"].to_numpy()))
            highest = part.select(["bucket", "shard"]).drop_null().group_by("bucket").aggregate([("shard", "max")])
            for row in highest.to_pylist():
                self.next_shard[Bucket.parse(row["bucket"])] = row["shard_max"] + 1
            if last:
                failed.append(_failed(part, last, set(retry), outcomes))
        tries = pa.concat_tables([_NO_TRIES, *failed]).sort_by("clip")
        self._clips = tries["clip"].to_numpy()
        self._windows, self._attempts = tries["window"].to_numpy(), tries["attempt"].to_numpy()
        reasons = pc.dictionary_encode(tries["reason"]).combine_chunks()
        self._reasons, self._reason_codes = reasons.dictionary.to_pylist(), reasons.indices.to_numpy()

    def meet(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the clips (uint64 [N]) of the next rows: their occurrences, int64 [N], and what is to be done.

        That is NEW, DONE, or where ``tries`` finds the failed tries of the row.
        """
        occurrences = self._met.add(clips)
        places = np.where(self._stored.count(occurrence_ids(clips, occurrences)) > 0, self.DONE, self.NEW)
        if len(self._clips):
            found = np.minimum(np.searchsorted(self._clips, clips), len(self._clips) - 1)
            again = (places == self.DONE) & (occurrences == 0) & (self._clips[found] == clips)
            places = np.where(again, found, places)
        return occurrences, places

    def tries(self, place: int) -> Mapping[int | None, tuple[int, str]]:
        """The failed tries of a row: window (None: all of them) -> the next attempt, and why the last one failed."""
        clip, found = self._clips[place], {}
        while place < len(self._clips) and self._clips[place] == clip:
            window, attempt = int(self._windows[place]), int(self._attempts[place])
            found[None if window == _ALL else window] = attempt + 1, self._reasons[self._reason_codes[place]]
            place += 1
        return found


_ALL = -1
_NO_TRIES = pa.schema(
    {"clip": pa.uint64(), "window": pa.int32(), "attempt": pa.int32(), "reason": pa.string()}
).empty_table()


def _failed(part: pa.Table, last: LastAttempts, retry: set[str], outcomes: Outcomes) -> pa.Table:
    reasons = results(part, outcomes)["reason"]
    wanted = pc.and_(pc.is_in(reasons, pa.array(sorted(retry))), pc.equal(part["occurrence"], 0))
    tries = pa.table(
        {
            "clip": part["clip"],
            "window": pc.fill_null(part["window"], _ALL),
            "attempt": part["attempt"],
            "reason": reasons,
        }
    )
    return tries.filter(pc.and_(wanted, last.are(part)))
