"""The plan: every row accounted for, nothing renumbered, nothing planned twice."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DatasetError
from shards.schema import Bucket
from stages.decoding.decode import decode_source
from stages.errors import ConfigError, DecodeError
from stages.planning.metadata import Row, read_internvid
from stages.planning.plan import ClipConfig, Outcomes, Plan, PlanConfig, counts, plan, shard_plans
from tests.stages.planning.plans import CONFIG, clip, clips, committed, make_plan, no_probe, planned, statuses, stored


def test_every_row_has_its_place_in_the_table() -> None:
    rows = [
        clip("good", caption="a dog", aesthetic=5.5, umt=0.4),
        clip("gone", path=None),
        clip("good"),
        clip("short", 10),
        clip("broken", reason="bad_metadata", message="line 5: not JSON"),
        clip("broken", reason="bad_metadata", message="line 6: not JSON"),
    ]
    table = planned(rows)
    assert Counter(statuses(table)) == {
        ("planned", None): 1,
        ("rejected", "missing_file"): 1,
        ("duplicate", None): 1,
        ("rejected", "too_short"): 1,
        ("rejected", "bad_metadata"): 2,
    }
    assert all(table["message"][row].as_py() for row in range(6) if table["status"][row].as_py() == "rejected")
    (shard,) = shard_plans([table], "/videos")
    assert (shard.bucket, shard.number) == (Bucket(64, 64, 8), 0)
    (clip_to_decode,) = shard.clips
    assert dataclasses.asdict(clip_to_decode) | {"key": ""} == {
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
    assert re.fullmatch(r"good_[0-9a-f]{16}", clip_to_decode.key)


def test_shards_are_filled_in_turn_and_sorted_by_key() -> None:
    table = planned(clips(10) + clips(5, 2000, first=10))
    shards = list(shard_plans([table], "/videos"))
    sizes = [(shard.bucket.frames, shard.number, len(shard.clips)) for shard in shards]
    assert sizes == [(8, 0, 4), (8, 1, 4), (16, 0, 4), (8, 2, 2), (16, 1, 1)]  # as they get full
    for shard in shards:
        keys = [clip.key for clip in shard.clips]
        assert keys == sorted(set(keys))
    assert len({clip.key for shard in shards for clip in shard.clips}) == 15
    done = {("64x64x16", 0), ("64x64x8", 1)}
    assert list(shard_plans([table], "/videos", done)) == [shards[i] for i in (0, 3, 4)]


def test_keys_tell_apart_datasets_spans_and_buckets() -> None:
    def keys(rows: Sequence[Row], name: str = "set", config: PlanConfig = CONFIG) -> list[str]:
        return planned(rows, config, name)["key"].to_pylist()

    spans = [clip("a 1 2", source="a"), clip("a 2 3", source="a")]
    other = PlanConfig(ClipConfig(32, 32, (8, 16), 8))
    assert len({*keys(spans), *keys(spans, "other"), *keys(spans, config=other)}) == 6
    assert keys(spans) == keys(spans)


def test_the_same_metadata_adds_nothing_and_longer_metadata_only_adds(tmp_path: Path) -> None:
    rows = [*clips(6), clip("clip003"), clip("gone", path=None)]
    dataset = Plan(tmp_path)
    dataset.append(planned(rows))
    first = stored(dataset)
    assert first.num_rows == 8
    assert planned(rows, previous=dataset).num_rows == 0
    longer = [*clips(3, first=6), *rows, clip("clip003"), *clips(2, first=9)]
    dataset.append(planned(longer, previous=dataset))
    both = stored(dataset)
    assert both.slice(0, 8).equals(first)
    assert both.num_rows == 8 + 6 and both["status"].to_pylist()[8:].count("duplicate") == 1
    assert [shard.number for shard in shard_plans([both], "/")] == [0, 1, 2, 3]
    assert planned(longer, previous=dataset).num_rows == 0
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["000000.parquet", "000001.parquet"]


def many_rows() -> list[Row]:
    """Rows of every kind, duplicates near and far, enough for several parts of several batches."""
    rng = np.random.default_rng(7)
    rows = []
    for number in range(400):
        kind = rng.integers(0, 10)
        if kind == 0:
            rows.append(clip(f"short{number}", int(rng.integers(1, 999))))
        elif kind == 1:
            rows.append(clip(f"gone{number}", path=None))
        elif kind == 2:
            rows.append(clip(f"bad{number % 50}", reason="bad_metadata", message="line: not JSON"))
        elif kind == 3 and number > 20:
            rows.append(rows[int(rng.integers(0, number))])
        elif kind == 4:
            rows.append(clip(f"ugly{number}", 2000, aesthetic=1.0))
        else:
            rows.append(
                clip(f"clip{number}", int(rng.integers(1000, 9000)), aesthetic=5.0, first_of_line=number % 3 == 0)
            )
    return rows


MANY = PlanConfig(ClipConfig(64, 64, (8, 16), 8, windows=3, trim_s=0.1), shard_clips=5, filter="not (aesthetic < 4)")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.planning.plan.BATCH_ROWS", 8)
    monkeypatch.setattr("stages.planning.plan.PART_ROWS", 60)


def part_bytes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "plan").iterdir())]


@pytest.mark.usefixtures("small_parts")
def test_a_run_killed_between_any_two_parts_goes_on_to_the_same_plan(tmp_path: Path) -> None:
    rows = many_rows()
    make_plan(tmp_path / "whole", rows, MANY)
    whole = part_bytes(tmp_path / "whole")
    assert len(whole) > 5
    for killed_after in range(len(whole)):
        folder = tmp_path / f"killed{killed_after}"
        make_plan(folder, rows, MANY, parts=killed_after)
        make_plan(folder, rows, MANY)
        assert part_bytes(folder) == whole


def test_two_runs_that_plan_at_once_do_not_both_plan(tmp_path: Path) -> None:
    late = Plan(tmp_path)  # knows nothing of what the other stores meanwhile
    (part,) = plan(clips(10), CONFIG, "set", late, probe=no_probe)
    make_plan(tmp_path, clips(10))
    with pytest.raises(ConfigError, match="another run has just written .*000000.parquet: run the same command again"):
        late.append(part)
    assert stored(Plan(tmp_path)).num_rows == 10


@pytest.mark.usefixtures("small_parts")
def test_parts_hold_whole_shards_and_say_the_same_as_one_large_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = many_rows()
    in_parts = make_plan(tmp_path / "parts", rows, MANY)
    shards = [shard for part in in_parts.parts() for shard in shard_plans([part], "/v")]
    assert len({(shard.bucket, shard.number) for shard in shards}) == len(shards)
    monkeypatch.setattr("stages.planning.plan.PART_ROWS", 10**6)
    at_once = make_plan(tmp_path / "once", rows, MANY)
    assert len(list(at_once.parts())) == 1
    assert list(shard_plans(at_once.parts(), "/v")) == shards
    assert counts(at_once, {}) == counts(in_parts, {})


@pytest.mark.usefixtures("small_parts")
def test_longer_metadata_changes_no_part(tmp_path: Path) -> None:
    rows = many_rows()
    make_plan(tmp_path, rows[:200], MANY)
    before = part_bytes(tmp_path)
    dataset = make_plan(tmp_path, rows, MANY)
    after = part_bytes(tmp_path)
    assert after[: len(before)] == before and len(after) > len(before)
    once = make_plan(tmp_path / "once", rows, MANY)
    totals = counts(dataset, {})
    assert totals == counts(once, {})
    keys = [clip.key for shard in shard_plans(dataset.parts(), "/v") for clip in shard.clips]
    assert len(set(keys)) == len(keys) == totals.pending


def test_a_plan_is_tried_out_without_touching_the_dataset(tmp_path: Path) -> None:
    dataset = make_plan(tmp_path / "real", clips(5))
    draft = Plan(tmp_path / "draft", before=dataset)
    for part in plan([*clips(5), *clips(4, first=5)], CONFIG, "set", draft, probe=no_probe):
        draft.append(part)
    assert counts(draft, {}).pending == 9 and counts(dataset, {}).pending == 5
    assert draft.settings() == dataset.settings()


def test_other_clip_settings_are_refused_by_name(tmp_path: Path) -> None:
    dataset = make_plan(tmp_path, clips(2))
    other = PlanConfig(ClipConfig(64, 96, (8, 16), 10))
    with pytest.raises(ConfigError, match=r"clip.sizes was 64x64, now 64x96; clip.fps was 8.*, now 10"):
        planned(clips(2), other, previous=dataset)
    for change in ({"windows": 2}, {"trim_s": 0.5}, {"max_upscale": 2.0}, {"sizes": ((64, 64), (32, 32))}):
        clip_config = dataclasses.replace(CONFIG.clip, **change)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"clip.{next(iter(change))} was"):
            planned(clips(2), dataclasses.replace(CONFIG, clip=clip_config), previous=dataset)
    with pytest.raises(ConfigError, match="filter was , now duration_s > 1"):
        planned(clips(2), dataclasses.replace(CONFIG, filter="duration_s > 1"), previous=dataset)
    same = dataclasses.replace(CONFIG, shard_clips=9, clip=dataclasses.replace(CONFIG.clip, sizes=((64, 64),)))
    assert planned(clips(2), same, previous=dataset).num_rows == 0


def test_a_retry_plans_rejected_clips_into_new_shards(tmp_path: Path) -> None:
    rows = [*clips(6), clip("late", path=None), clip("clip001"), clip("late", path=None)]
    dataset = make_plan(tmp_path, rows)
    first = stored(dataset)
    outcomes = committed(first, {"clip001": "timeout", "clip002": "undecodable"})
    before = counts(dataset, outcomes)
    assert before.rejected == {"missing_file": 1, "timeout": 1, "undecodable": 1}
    assert (before.written, before.duplicates, before.pending) == (4, 2, 0)

    rows[6] = clip("late")
    assert planned(rows, previous=dataset, outcomes=outcomes).num_rows == 0
    added = planned(rows, previous=dataset, retry={"missing_file", "timeout"}, outcomes=outcomes)
    assert sorted(added["source"].to_pylist()) == ["clip001", "late"] and set(added["shard"].to_pylist()) == {2}
    dataset.append(added)
    between = counts(dataset, outcomes)
    assert (between.rows, between.written, between.pending) == (9, 4, 2)
    assert between.rejected == {"undecodable": 1}
    assert planned(rows, previous=dataset, retry={"timeout"}, outcomes=outcomes).num_rows == 0  # not done yet

    outcomes = {**outcomes, **committed(added, {"clip001": "timeout"})}
    after = counts(dataset, outcomes)
    assert (after.written, after.pending, after.rejected) == (5, 0, {"timeout": 1, "undecodable": 1})
    third = planned(rows, previous=dataset, retry={"timeout"}, outcomes=outcomes)
    assert third["source"].to_pylist() == ["clip001"] and third["attempt"].to_pylist() == [2]
    assert third["key"].to_pylist() == [key for key in first["key"].to_pylist() if key and "clip001" in key]


def test_a_retry_that_fails_the_same_way_adds_nothing(tmp_path: Path) -> None:
    rows = [clip("gone", path=None)]
    dataset = make_plan(tmp_path, rows)
    assert planned(rows, previous=dataset, retry={"missing_file"}).num_rows == 0
    added = planned([clip("gone", 10)], previous=dataset, retry={"missing_file"})
    assert statuses(added) == [("rejected", "too_short")]
    dataset.append(added)
    assert counts(dataset, {}).rejected == {"too_short": 1}


def test_a_retry_plans_only_the_windows_that_failed(tmp_path: Path) -> None:
    config = PlanConfig(ClipConfig(64, 64, 8, 8, windows=4), shard_clips=4)
    rows = [clip("long", 9000), clip("late", 9000, path=None)]
    dataset = make_plan(tmp_path, rows, config)
    (shard,) = shard_plans(dataset.parts(), "/v")
    failed = [shard.clips[1].key, shard.clips[3].key]
    outcomes: Outcomes = {(shard.bucket.name, 0): {failed[0]: "timeout", failed[1]: "io_error"}}
    totals = counts(dataset, outcomes)
    assert (totals.rows, totals.clips, totals.written) == (2, 5, 2)
    assert totals.rejected == {"io_error": 1, "missing_file": 1, "timeout": 1}

    rows[1] = clip("late", 9000)
    added = planned(rows, config, previous=dataset, retry={"timeout", "missing_file"}, outcomes=outcomes)
    keys = added["key"].to_pylist()
    assert failed[0] in keys and failed[1] not in keys and len(keys) == 1 + 4
    dataset.append(added)
    totals = counts(dataset, outcomes)
    assert (totals.rows, totals.clips, totals.written, totals.pending) == (2, 8, 2, 5)
    assert totals.rejected == {"io_error": 1}

    rows[0] = clip("long", 1500)  # another file: it has a single window now
    shorter = planned(rows, config, previous=dataset, retry={"io_error"}, outcomes=outcomes)
    assert statuses(shorter) == [("rejected", "too_short")]


def test_the_counts_add_up(tmp_path: Path) -> None:
    rows = [*clips(9), clip("gone", path=None), clip("clip000"), clip("short", 5), clip("ugly", aesthetic=1.0)]
    rows += [clip("second of a line", first_of_line=False)]
    dataset = make_plan(tmp_path, rows, dataclasses.replace(CONFIG, filter="aesthetic is None or aesthetic > 2"))
    table = stored(dataset)
    some = committed(table, {"clip004": "timeout"})
    some = {shard: rejects for shard, rejects in some.items() if shard[1] != 2}
    for outcomes in ({}, some, committed(table)):
        totals = counts(dataset, outcomes)
        rest = totals.written + totals.filtered + totals.duplicates + totals.pending
        assert totals.clips == rest + sum(totals.rejected.values()) == 14 and totals.rows == 13
        assert (totals.filtered, totals.duplicates) == (1, 1)
    assert counts(dataset, some).pending == 2 and counts(dataset, some).rejected["timeout"] == 1


def test_a_plan_is_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = planned(clips(3))
    Plan(tmp_path).append(table)
    monkeypatch.setattr("shards.storage.list_folder", lambda folder: [])  # as another run saw it before
    with pytest.raises(ConfigError, match="another run"):
        Plan(tmp_path).append(table)


def test_a_damaged_plan_is_named_and_never_read_as_another(tmp_path: Path) -> None:
    dataset = Plan(tmp_path)
    dataset.append(planned(clips(200)))
    whole = stored(dataset)
    part = tmp_path / "plan/000000.parquet"
    data = part.read_bytes()
    flips = [data[:n] + bytes([data[n] ^ 4]) + data[n + 1 :] for n in range(10, len(data) // 2, len(data) // 60)]
    named = 0
    for damaged in (*flips, data[: len(data) // 2], b""):
        part.write_bytes(damaged)
        try:
            assert stored(dataset).equals(whole)  # what was hit says nothing of the rows
        except DatasetError as error:
            assert "000000.parquet" in str(error)
            named += 1
    assert named > 20
    assert stored(Plan(tmp_path / "absent")).num_rows == 0


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    Plan(tmp_path).append(planned(clips(3)).drop_columns(["window"]))
    with pytest.raises(DatasetError, match="another version"):
        list(Plan(tmp_path).parts())


def test_internvid_mini_is_accounted_for(assets: Path, tmp_path: Path) -> None:
    folder = assets / "internvid_mini"
    videos = str(folder / "clips")
    config = PlanConfig(ClipConfig(64, 64, 8, 8))
    dataset = make_plan(tmp_path, list(read_internvid(str(folder / "InternVid-mini.jsonl"), videos)), config)
    table = stored(dataset)
    assert table.num_rows == 48
    rejects = {}
    (shard,) = shard_plans([table], videos)
    for planned_clip in shard.clips:
        try:
            assert decode_source(planned_clip, 8, 64, 64, timeout_s=60, decoder="pyav").pixels.shape == (8, 64, 64, 3)
        except DecodeError as error:
            rejects[planned_clip.source] = error.reason
    assert rejects == {
        "xuB_xUfojwb": "undecodable",  # empty
        "RsVy8p8rsY2": "undecodable",  # an HTML page
        "khR1ZEG6tY0": "undecodable",  # random bytes
        "VCOFWO5tqXG": "undecodable",  # cut off, without its index
        "ihSuoxN01JW": "undecodable",  # cut off
        "MInKByxFPmz": "undecodable",  # audio only
    }
    totals = counts(dataset, committed(table, rejects))
    assert totals.written == 30 + 5  # the good ones, and those that are turned, 10 bit, stretched, ...
    assert (totals.rows, totals.duplicates, totals.pending) == (48, 1, 0)
    assert totals.rejected == {
        "bad_metadata": 1,
        "bad_timestamps": 1,
        "missing_file": 2,
        "too_short": 2,
        "undecodable": 6,
    }
