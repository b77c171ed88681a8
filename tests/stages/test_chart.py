"""Charts as numbers: axes that enclose the data, a smoothed line without lag, long series thinned but not cut."""

import math
import re

import numpy as np
import pytest

from stages.chart import Chart, histogram, interval_chart, line_chart, log_ticks, number, ticks


def points(path: str) -> np.ndarray:
    """The coordinates of SVG path data, [n, 2]."""
    return np.array([[float(value) for value in pair.split(",")] for pair in re.split("[ML]", path)[1:]])


def placed(chart: Chart, axis: str, label: str) -> float:
    return next(tick.at for tick in getattr(chart, f"{axis}_ticks") if tick.label == label)


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.13, 0.19), (-3, 7), (0, 2400), (1e-7, 3e-7), (5, 5), (0, 0), (-2, -2)]
)
def test_ticks_enclose_the_data_at_equal_round_distances(low: float, high: float):
    values = ticks(low, high)
    assert values[0] <= low and high <= values[-1] and 2 <= len(values) <= 6
    steps = np.diff(values)
    assert steps == pytest.approx(steps[0])
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9), 6) in (1, 2, 5)


@pytest.mark.parametrize("low, high", [(0.1, 1.5), (0.15, 0.9), (1e-5, 3), (1, 10), (2, 11)])
def test_log_ticks_enclose_the_data(low: float, high: float):
    values = log_ticks(low, high)
    assert values[0] <= low and high <= values[-1] and 2 <= len(values) <= 7
    assert all(later > earlier for earlier, later in zip(values, values[1:], strict=False))


def test_points_lie_where_the_axes_say():
    chart = line_chart([0.5, 1, 2], [1, 3, 2])
    assert not chart.logarithmic
    at = points(chart.raw)
    assert at[1] == pytest.approx([50, placed(chart, "y", "3")])
    assert at[2] == pytest.approx([placed(chart, "x", "2"), placed(chart, "y", "2")])
    assert placed(chart, "y", "3") < placed(chart, "y", "1"), "upwards is more"


def test_a_loss_that_falls_far_gets_a_logarithmic_axis():
    chart = line_chart([1, 2, 3], [10, 1, 0.1])
    assert chart.logarithmic
    assert points(chart.raw)[:, 1] == pytest.approx([0, 50, 100])


def test_zero_is_shown_when_asked():
    chart = line_chart([1, 2], [40, 42], from_zero=True)
    assert placed(chart, "y", "0") == 100


def test_smoothing_follows_a_line_without_lag_and_takes_noise_away():
    steps = np.arange(1, 1001)
    noise = np.random.default_rng(0).normal(0, 1, 1000)
    chart = line_chart(steps, 100 + steps / 10 + noise, from_zero=True)
    smooth, raw = points(chart.smooth), points(chart.raw)
    middle = smooth[(smooth[:, 0] > 10) & (smooth[:, 0] < 90)]
    top = 100 - placed(chart, "y", "200")
    expected = 100 - top * (100 + middle[:, 0]) / 200
    assert np.abs(middle[:, 1] - expected).max() < 0.25
    assert np.abs(np.diff(middle[:, 1])).mean() < np.abs(np.diff(raw[:, 1])).mean() / 4


def test_a_long_series_keeps_its_extremes():
    values = np.ones(100_000)
    values[77_777], values[12_345] = 1.9, 0.5
    chart = line_chart(np.arange(1, 100_001), values)
    at = points(chart.raw)
    assert len(at) <= 800
    assert at[at[:, 1].argmin()] == pytest.approx([77.778, 100 * (2 - 1.9) / 1.6], abs=2)
    assert at[at[:, 1].argmax(), 0] == pytest.approx(12.346, abs=0.01)


def test_one_point_is_a_dot_that_can_be_seen():
    chart = line_chart([20], [0.5])
    assert len(points(chart.smooth)) == 2 and chart.last == "0.5"


def test_numbers_are_written_for_people():
    assert [number(value) for value in (2400, 0.05, 1_000_000, 0)] == ["2,400", "0.05", "1,000,000", "0"]


def test_a_histogram_counts_every_value_where_it_lies():
    values = np.random.default_rng(0).normal(5, 1, 2000)
    chart = histogram(values)
    highest = float(chart.y_ticks[-1].label.replace(",", ""))
    counts = [round(bar.height * highest / 100) for bar in chart.bars]
    assert sum(counts) == 2000 and chart.outside == 0 and 8 <= len(chart.bars) <= 25
    start, end = (float(tick.label) for tick in (chart.x_ticks[0], chart.x_ticks[-1]))
    for bar, count in zip(chart.bars, counts, strict=True):
        left, right = (start + (end - start) * at / 100 for at in (bar.left, bar.left + bar.width))
        assert count == ((values >= left) & (values < right)).sum()
        assert bar.label == f"{number(round(left, 6))} to {number(round(right, 6))}: {count:,}"


def test_whole_numbers_have_bars_of_their_own():
    chart = histogram(np.array([1, 1, 2, 4.0]))
    assert [bar.label for bar in chart.bars] == ["1: 2", "2: 1", "3: 0", "4: 1"]
    assert [tick.label for tick in chart.y_ticks] == ["0", "1", "2"]
    assert [bar.label for bar in histogram(np.array([8.0])).bars] == ["8: 1"]
    assert histogram(np.arange(100.0)).bars[0].label == "0 to 3: 4"


def test_a_far_tail_is_counted_and_not_drawn():
    chart = histogram(np.concatenate([np.linspace(2, 9, 998), [500, 900]]))
    assert chart.outside == 2 and float(chart.x_ticks[-1].label) <= 10
    assert histogram(np.array([1.0, 2, 500])).outside == 0, "few values are all drawn"


def test_marks_and_intervals_lie_where_the_axes_say_and_side_by_side():
    first, second = [(1.0, 0.5, 1.5), (2.0, 1.5, 2.5)], [(0.5, 0.0, 1.0), (2.5, 2.0, 3.0)]
    chart = interval_chart([0.25, 0.75], [first, second], x_end=1)
    assert {tick.label: tick.at for tick in chart.x_ticks}["0.2"] == 20
    at = {tick.label: tick.at for tick in chart.y_ticks}
    (marks, path), (others, _) = chart.series
    assert [mark.y for mark in marks] == [at["1"], at["2"]] and points(path)[:, 1].tolist() == [at["1"], at["2"]]
    assert (others[0].low, others[1].high) == (at["0"], at["3"]), "an interval is enclosed by the axis"
    assert marks[0].x < 25 < others[0].x and marks[0].x + others[0].x == 50
    assert marks[0].label == "1 (0.5 to 1.5)"
    alone, _ = interval_chart([0.25], [[(1, 1, 1)]], x_end=1).series[0]
    assert alone[0].x == 25
