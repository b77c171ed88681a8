"""The plan: every row accounted for, nothing renumbered, nothing planned twice."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from shards.errors import DatasetError
from shards.schema import Bucket
from stages.decode import decode_source
from stages.errors import ConfigError, DecodeError
from stages.metadata import Row, read_internvid
from stages.plan import (
    ClipConfig,
    Outcomes,
    PlanConfig,
    append_plan,
    counts,
    load_plan,
    plan,
    shard_plans,
)

CONFIG = PlanConfig(ClipConfig(64, 64, (8, 16), 8), shard_clips=4)


def clip(name: str, duration_ms: int = 1000, **changes) -> Row:
    values = {"identity": name, "source": name, "path": f"{name}.mp4", "duration_ms": duration_ms} | changes
    return Row(**values)


def clips(count: int, duration_ms: int = 1000, first: int = 0) -> list[Row]:
    return [clip(f"clip{number:03d}", duration_ms) for number in range(first, first + count)]


def statuses(table: pa.Table) -> list[tuple[str, str | None]]:
    return list(zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True))


def committed(table: pa.Table, rejects: dict[str, str] | None = None) -> Outcomes:
    """All shards committed, with the rejects given by source."""
    outcomes: dict[tuple[str, int], dict[str, str]] = {}
    for shard in shard_plans(table, "/videos"):
        reasons = {clip.key: (rejects or {}).get(clip.source, "") for clip in shard.clips}
        outcomes[shard.bucket.name, shard.number] = {key: reason for key, reason in reasons.items() if reason}
    return outcomes


@pytest.mark.parametrize(
    ("duration_ms", "bucket"),
    [(999, None), (1000, 8), (1999, 8), (2000, 16), (60_000, 16), (0, None), (1, None)],
)
def test_a_clip_goes_to_the_longest_it_fills(duration_ms: int, bucket: int | None) -> None:
    table = plan([clip("a", duration_ms)], CONFIG, "set")
    if bucket is None:
        assert statuses(table) == [("rejected", "too_short")] and table["key"].to_pylist() == [None]
    else:
        assert table["bucket"].to_pylist() == [f"64x64x{bucket}"]


@pytest.mark.parametrize(
    ("fps", "frames", "needed_ms"), [(29.97, 30, 1002), (23.976, 24, 1002), (12.5, 25, 2000), (7, 1000, 142858)]
)
def test_rates_that_are_no_whole_numbers_need_whole_milliseconds(fps: float, frames: int, needed_ms: int) -> None:
    config = PlanConfig(ClipConfig(64, 64, frames, fps))
    rows = [clip("short", needed_ms - 1), clip("enough", needed_ms)]
    assert statuses(plan(rows, config, "set")) == [("rejected", "too_short"), ("planned", None)]


def test_a_longer_clip_gives_one_window_that_depends_on_the_clip_alone() -> None:
    rows = clips(200, 5000)
    starts = plan(rows, CONFIG, "set")["start_s"].to_pylist()
    by_source = dict(zip(plan(rows, CONFIG, "set")["source"].to_pylist(), starts, strict=True))
    reverse = plan(rows[::-1], CONFIG, "set")
    again = dict(zip(reverse["source"].to_pylist(), reverse["start_s"].to_pylist(), strict=True))
    assert by_source == again
    assert 0 <= min(starts) < 0.2 and 2.8 < max(starts) <= 3.0  # 16 frames at 8 fps last 2 s
    assert all(round(start * 1000) == pytest.approx(start * 1000) for start in starts)


def test_a_clip_inside_a_whole_video_starts_at_its_timestamp() -> None:
    (start,) = plan([clip("a", 1000, start_ms=111578)], CONFIG, "set")["start_s"].to_pylist()
    assert start == 111.578


def test_pictures_are_clips_of_one_frame_and_so_are_short_videos_if_asked() -> None:
    rows = [clip("picture", 0, kind="image"), clip("blink", 40), clip("long", 9000)]
    assert plan(rows, CONFIG, "set")["bucket"].to_pylist().count("64x64x1") == 1
    config = PlanConfig(ClipConfig(64, 64, (1, 8), 8))
    table = plan(rows, config, "set")
    assert dict(zip(table["source"].to_pylist(), table["bucket"].to_pylist(), strict=True)) == {
        "picture": "64x64x1",
        "blink": "64x64x1",
        "long": "64x64x8",
    }


def test_every_row_has_its_place_in_the_table() -> None:
    rows = [
        clip("good", caption="a dog", aesthetic=5.5, umt=0.4),
        clip("gone", path=None),
        clip("good"),
        clip("short", 10),
        clip("broken", reason="bad_metadata", message="line 5: not JSON"),
        clip("broken", reason="bad_metadata", message="line 6: not JSON"),
    ]
    table = plan(rows, CONFIG, "set")
    assert Counter(statuses(table)) == {
        ("planned", None): 1,
        ("rejected", "missing_file"): 1,
        ("duplicate", None): 1,
        ("rejected", "too_short"): 1,
        ("rejected", "bad_metadata"): 2,
    }
    assert all(table["message"][row].as_py() for row in range(6) if table["status"][row].as_py() == "rejected")
    ((shard,),) = [shard_plans(table, "/videos")]
    assert (shard.bucket, shard.number) == (Bucket(64, 64, 8), 0)
    (planned,) = shard.clips
    assert dataclasses.asdict(planned) | {"key": ""} == {
        "key": "",
        "source": "good",
        "kind": "video",
        "path": "/videos/good.mp4",
        "start_s": 0.0,
        "clip_start_s": 0.0,
        "fps": 8.0,
        "duration_s": 1.0,
        "caption": "a dog",
        "aesthetic": 5.5,
        "umt": 0.4,
        "matching_score": None,
        "desirable_filtering": None,
    }
    assert re.fullmatch(r"good_[0-9a-f]{16}", planned.key)


def test_shards_are_filled_in_turn_and_sorted_by_key() -> None:
    table = plan(clips(10) + clips(5, 2000, first=10), CONFIG, "set")
    shards = shard_plans(table, "/videos")
    sizes = [(shard.bucket.frames, shard.number, len(shard.clips)) for shard in shards]
    assert sizes == [(16, 0, 4), (16, 1, 1), (8, 0, 4), (8, 1, 4), (8, 2, 2)]
    for shard in shards:
        keys = [clip.key for clip in shard.clips]
        assert keys == sorted(set(keys))
    assert len({clip.key for shard in shards for clip in shard.clips}) == 15
    assert shard_plans(table, "/videos", done={("64x64x16", 0), ("64x64x8", 1)}) == [shards[i] for i in (1, 2, 4)]


def test_keys_tell_apart_datasets_spans_and_buckets() -> None:
    def keys(rows: Sequence[Row], name: str = "set", config: PlanConfig = CONFIG) -> list[str]:
        return plan(rows, config, name)["key"].to_pylist()

    spans = [clip("a 1 2", source="a"), clip("a 2 3", source="a")]
    other = PlanConfig(ClipConfig(32, 32, (8, 16), 8))
    assert len({*keys(spans), *keys(spans, "other"), *keys(spans, config=other)}) == 6
    assert keys(spans) == keys(spans)


def test_the_same_metadata_adds_nothing_and_longer_metadata_only_adds(tmp_path: Path) -> None:
    rows = [*clips(6), clip("clip003"), clip("gone", path=None)]
    append_plan(tmp_path, plan(rows, CONFIG, "set", load_plan(tmp_path)))
    first = load_plan(tmp_path)
    assert first.num_rows == 8
    assert plan(rows, CONFIG, "set", first).num_rows == 0
    longer = [*clips(3, first=6), *rows, clip("clip003"), *clips(2, first=9)]
    append_plan(tmp_path, plan(longer, CONFIG, "set", first))
    both = load_plan(tmp_path)
    assert both.slice(0, 8).equals(first)
    assert both.num_rows == 8 + 6 and both["status"].to_pylist()[8:].count("duplicate") == 1
    assert [shard.number for shard in shard_plans(both, "/")] == [0, 1, 2, 3]
    assert plan(longer, CONFIG, "set", both).num_rows == 0
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["000000.parquet", "000001.parquet"]
    append_plan(tmp_path, plan(longer, CONFIG, "set", both))
    assert len(list((tmp_path / "plan").iterdir())) == 2


def test_other_clip_settings_are_refused_by_name() -> None:
    first = plan(clips(2), CONFIG, "set")
    other = PlanConfig(ClipConfig(64, 96, (8, 16), 10))
    with pytest.raises(ConfigError, match=r"clip.width was 64, now 96; clip.fps was 8.*, now 10"):
        plan(clips(2), other, "set", first)
    assert plan(clips(2), dataclasses.replace(CONFIG, shard_clips=9), "set", first).num_rows == 0


def test_a_retry_plans_rejected_clips_into_new_shards() -> None:
    rows = [*clips(6), clip("late", path=None), clip("clip001"), clip("late", path=None)]
    first = plan(rows, CONFIG, "set")
    outcomes = committed(first, {"clip001": "timeout", "clip002": "undecodable"})
    before = counts(first, outcomes)
    assert before.rejected == {"missing_file": 1, "timeout": 1, "undecodable": 1}
    assert (before.written, before.duplicates, before.pending) == (4, 2, 0)

    rows[6] = clip("late")
    assert plan(rows, CONFIG, "set", first, outcomes=outcomes).num_rows == 0
    added = plan(rows, CONFIG, "set", first, retry={"missing_file", "timeout"}, outcomes=outcomes)
    assert sorted(added["source"].to_pylist()) == ["clip001", "late"] and set(added["shard"].to_pylist()) == {2}
    both = pa.concat_tables([first, added])
    between = counts(both, outcomes)
    assert (between.rows, between.written, between.pending) == (9, 4, 2)
    assert between.rejected == {"undecodable": 1}
    assert plan(rows, CONFIG, "set", both, retry={"timeout"}, outcomes=outcomes).num_rows == 0  # not done yet

    outcomes = {**outcomes, **committed(added, {"clip001": "timeout"})}
    after = counts(both, outcomes)
    assert (after.written, after.pending, after.rejected) == (5, 0, {"timeout": 1, "undecodable": 1})
    third = plan(rows, CONFIG, "set", both, retry={"timeout"}, outcomes=outcomes)
    assert third["source"].to_pylist() == ["clip001"] and third["attempt"].to_pylist() == [2]
    assert third["key"].to_pylist() == [key for key in first["key"].to_pylist() if key and "clip001" in key]


def test_a_retry_that_fails_the_same_way_adds_nothing() -> None:
    rows = [clip("gone", path=None)]
    first = plan(rows, CONFIG, "set")
    assert plan(rows, CONFIG, "set", first, retry={"missing_file"}).num_rows == 0
    changed = [clip("gone", 10)]
    added = plan(changed, CONFIG, "set", first, retry={"missing_file"})
    assert statuses(added) == [("rejected", "too_short")]
    assert counts(pa.concat_tables([first, added]), {}).rejected == {"too_short": 1}


def test_the_counts_add_up() -> None:
    rows = [*clips(9), clip("gone", path=None), clip("clip000"), clip("short", 5)]
    table = plan(rows, CONFIG, "set")
    some = committed(table, {"clip004": "timeout"})
    some = {shard: rejects for shard, rejects in some.items() if shard[1] != 2}
    for outcomes in ({}, some, committed(table)):
        totals = counts(table, outcomes)
        rest = totals.written + totals.filtered + totals.duplicates + totals.pending
        assert totals.rows == totals.clips == rest + sum(totals.rejected.values()) == 12
    assert counts(table, some).pending == 1


def test_a_plan_is_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = plan(clips(3), CONFIG, "set")
    append_plan(tmp_path, table)
    monkeypatch.setattr("stages.plan_table._part_names", lambda dataset: [])  # as another run saw it before
    with pytest.raises(ConfigError, match="another run"):
        append_plan(tmp_path, table)


def test_a_damaged_plan_is_named_and_never_read_as_another(tmp_path: Path) -> None:
    append_plan(tmp_path, plan(clips(200), CONFIG, "set"))
    whole = load_plan(tmp_path)
    part = tmp_path / "plan/000000.parquet"
    data = part.read_bytes()
    flips = [data[:n] + bytes([data[n] ^ 4]) + data[n + 1 :] for n in range(10, len(data) // 2, len(data) // 60)]
    named = 0
    for damaged in (*flips, data[: len(data) // 2], b""):
        part.write_bytes(damaged)
        try:
            assert load_plan(tmp_path).equals(whole)  # what was hit says nothing of the rows
        except DatasetError as error:
            assert "000000.parquet" in str(error)
            named += 1
    assert named > 20
    assert load_plan(tmp_path / "absent").num_rows == 0


@pytest.mark.parametrize("wrong", [{"frames": ()}, {"frames": 0}, {"height": 0}, {"fps": 0}, {"frames": (8, -1)}])
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        ClipConfig(**wrong)


def test_internvid_mini_is_accounted_for(assets: Path) -> None:
    folder = assets / "internvid_mini"
    videos = str(folder / "clips")
    config = PlanConfig(ClipConfig(64, 64, 8, 8))
    table = plan(read_internvid(str(folder / "InternVid-mini.jsonl"), videos), config, "mini")
    assert table.num_rows == 48
    rejects = {}
    (shard,) = shard_plans(table, videos)
    for planned in shard.clips:
        try:
            assert decode_source(planned, 8, 64, 64, timeout_s=60, decoder="pyav").pixels.shape == (8, 64, 64, 3)
        except DecodeError as error:
            rejects[planned.source] = error.reason
    assert rejects == {
        "xuB_xUfojwb": "undecodable",  # empty
        "RsVy8p8rsY2": "undecodable",  # an HTML page
        "khR1ZEG6tY0": "undecodable",  # random bytes
        "VCOFWO5tqXG": "undecodable",  # cut off, without its index
        "ihSuoxN01JW": "undecodable",  # cut off
        "MInKByxFPmz": "undecodable",  # audio only
    }
    totals = counts(table, committed(table, rejects))
    assert totals.written == 30 + 5  # the good ones, and those that are turned, 10 bit, stretched, ...
    assert (totals.rows, totals.duplicates, totals.pending) == (48, 1, 0)
    assert totals.rejected == {
        "bad_metadata": 1,
        "bad_timestamps": 1,
        "missing_file": 2,
        "too_short": 2,
        "undecodable": 6,
    }
