from collections import Counter

from stages.columns import ShardReport
from stages.progress import Progress


def test_the_bar_moves_with_the_clips_of_a_shard_and_counts_each_once() -> None:
    with Progress("latents", clips=40, shards=5, places=2) as progress:
        shown = []
        for clips, report in ((3, None), (10, None), (None, 8), (5, None), (None, 8), (0, None), (None, 8)):
            if report is None:
                progress.watch(clips)
            else:
                progress.add(ShardReport("64x64x8", 0, Counter(written=report - 1, timeout=1)))
            shown.append(progress._bar.n)
    assert shown == [3, 10, 10, 13, 16, 16, 24]
    assert progress.summary()["clips"] == 24
