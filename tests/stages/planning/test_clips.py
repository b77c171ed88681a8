"""What a clip is cut to: lengths, sizes, windows and trimmed ends."""

from collections import Counter

import pytest

from stages.planning.plan import ClipConfig, PlanConfig, shard_plans
from tests.stages.planning.plans import FakeFiles, clip, clips, planned, sized, statuses, windows_of


@pytest.mark.parametrize(
    ("duration_ms", "bucket"),
    [(999, None), (1000, 8), (1999, 8), (2000, 16), (60_000, 16), (0, None), (1, None)],
)
def test_a_clip_goes_to_the_longest_it_fills(duration_ms: int, bucket: int | None) -> None:
    table = planned([clip("a", duration_ms)])
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
    assert statuses(planned(rows, config)) == [("rejected", "too_short"), ("planned", None)]


def test_a_longer_clip_gives_one_window_that_depends_on_the_clip_alone() -> None:
    rows = clips(200, 5000)
    starts = planned(rows)["start_s"].to_pylist()
    by_source = dict(zip(planned(rows)["source"].to_pylist(), starts, strict=True))
    reverse = planned(rows[::-1])
    again = dict(zip(reverse["source"].to_pylist(), reverse["start_s"].to_pylist(), strict=True))
    assert by_source == again
    assert 0 <= min(starts) < 0.2 and 2.8 < max(starts) <= 3.0  # 16 frames at 8 fps last 2 s
    assert all(round(start * 1000) == pytest.approx(start * 1000) for start in starts)


def test_a_clip_inside_a_whole_video_starts_at_its_timestamp() -> None:
    (start,) = planned([clip("a", 1000, start_ms=111578)])["start_s"].to_pylist()
    assert start == 111.578


def test_pictures_are_clips_of_one_frame_and_so_are_short_videos_if_asked() -> None:
    rows = [clip("picture", 0, kind="image"), clip("blink", 40), clip("long", 9000)]
    assert planned(rows)["bucket"].to_pylist().count("64x64x1") == 1
    config = PlanConfig(ClipConfig(64, 64, (1, 8), 8))
    table = planned(rows, config)
    assert dict(zip(table["source"].to_pylist(), table["bucket"].to_pylist(), strict=True)) == {
        "picture": "64x64x1",
        "blink": "64x64x1",
        "long": "64x64x8",
    }


def test_windows_never_overlap_and_are_spread_over_the_clip() -> None:
    config = PlanConfig(ClipConfig(64, 64, 8, 8, windows=3))
    rows = [clip(f"clip{number}", 1000 + 40 * number, start_ms=500) for number in range(200)]
    found = windows_of(planned(rows, config))
    for number, windows in enumerate(found[f"clip{number}"] for number in range(200)):
        starts = [start for start, _ in windows]
        assert len(starts) == min(3, (1000 + 40 * number) // 1000)
        assert all(after - before >= 0.9995 for before, after in zip(starts, starts[1:], strict=False))
        assert starts[0] >= 0.5 and starts[-1] <= 0.5 + 0.04 * number + 1e-9
        assert [fallback for _, fallback in windows] == [0.5, *starts[1:]]
    last_starts = [windows[-1][0] for windows in found.values() if len(windows) == 3]
    assert max(last_starts) > 6 and len(set(last_starts)) > 80
    single = windows_of(planned(rows, PlanConfig(ClipConfig(64, 64, 8, 8))))
    assert all(len(windows) == 1 for windows in single.values())
    assert {
        source: windows[0] for source, windows in windows_of(planned(rows, config)).items() if len(windows) == 1
    } == {source: windows[0] for source, windows in single.items() if len(found[source]) == 1}


def test_all_windows_of_a_clip_are_in_one_shard() -> None:
    config = PlanConfig(ClipConfig(64, 64, 8, 8, windows=3), shard_clips=4)
    shards = list(shard_plans([planned([*clips(3, 9000), *clips(3, 1000, first=3)], config)], "/v"))
    assert [len(shard.clips) for shard in shards] == [3, 3, 4, 2]
    for shard in shards[:3]:
        assert Counter(planned_clip.source for planned_clip in shard.clips).most_common(1)[0][1] == 3
    over = PlanConfig(ClipConfig(64, 64, 8, 8, windows=3), shard_clips=2)
    assert [len(shard.clips) for shard in shard_plans([planned(clips(2, 9000), over)], "/v")] == [3, 3]


def test_both_ends_of_a_clip_are_trimmed() -> None:
    config = PlanConfig(ClipConfig(64, 64, 8, 8, trim_s=0.25))
    table = planned([clip("short", 1499), clip("fits", 1500, start_ms=2000), *clips(100, 4000)], config)
    assert statuses(table)[0] == ("rejected", "too_short") and "250 ms" in table["message"][0].as_py()
    found = windows_of(table)
    assert found.pop("fits") == [(2.25, 2.25)]
    starts = [start for ((start, _),) in found.values()]
    assert 0.25 <= min(starts) < 0.35 and 2.6 < max(starts) <= 2.75
    picture = planned([clip("picture", 0, kind="image")], config)
    assert picture["start_s"].to_pylist() == [0.0]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (720, 1280, "288x512"),  # 16:9
        (1280, 720, "512x288"),
        (480, 640, "288x512"),  # 4:3: the square and 16:9 both keep 75 %; the larger is taken
        (720, 960, "512x512"),  # so it is here
        (720, 970, "288x512"),  # a little wider
        (1000, 1000, "512x512"),
        (400, 400, "256x256"),  # 512 would need upscaling
        (255, 1000, None),
        (288, 512, "288x512"),
        (287, 512, "256x256"),
    ],
)
def test_a_clip_goes_to_the_size_that_keeps_most_of_it(height: int, width: int, size: str | None) -> None:
    sizes = ((256, 256), (512, 512), (288, 512), (512, 288))
    table = planned([clip("a")], PlanConfig(ClipConfig(sizes=sizes, frames=8)), probe=FakeFiles(a=sized(height, width)))
    assert table["bucket"].to_pylist() == [size and f"{size}x8"]
    if size is None:
        assert statuses(table) == [("rejected", "too_small")] and "255x1000" in table["message"][0].as_py()


def test_upscaling_is_as_the_settings_say() -> None:
    files = {"a": sized(200, 200), "b": sized(100, 300)}
    rows = [clip("a"), clip("b")]

    def outcome(**changes) -> list[str | None]:
        config = PlanConfig(ClipConfig(**{"frames": 8, "sizes": ((256, 256), (128, 128))} | changes))
        table = planned(rows, config, probe=FakeFiles(**files))
        by_source = dict(zip(table["source"].to_pylist(), table["bucket"].to_pylist(), strict=True))
        return [by_source["a"], by_source["b"]]

    assert outcome() == ["128x128x8", None]
    assert outcome(max_upscale=1.28) == ["256x256x8", "128x128x8"]
    assert outcome(max_upscale=3.0) == ["256x256x8", "256x256x8"]
    assert outcome(sizes=((256, 256),), max_upscale=1.0) == [None, None]
    assert planned(rows, PlanConfig(ClipConfig(frames=8)))["bucket"].to_pylist() == ["256x256x8"] * 2  # no probe


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": ()},
        {"frames": 0},
        {"height": 0},
        {"fps": 0},
        {"frames": (8, -1)},
        {"windows": 0},
        {"trim_s": -1},
        {"max_upscale": 0},
        {"sizes": ((8, 0),)},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        ClipConfig(**wrong)
