"""Charts as plain numbers. A page's template draws them, so that they follow the reader's screen and colours.

Positions are per cent of the plot, from its top left corner.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SMOOTHING_SHARE = 0.02
"""Standard deviation of the smoothing, as a share of the chart's width."""
MOST_BINS = 400
"""A longer series is drawn as the extremes, and smoothed from the means, of so many runs of points."""
MOST_TICKS = 6
LOG_FROM_RATIO = 5
"""Positive values that span more than this get a logarithmic axis."""
SIDE_BY_SIDE = 1.4
"""Per cent of the width between the intervals of several series at one place."""
TAIL_SHARE = 0.005
"""A histogram leaves out so much at either end where that halves its width."""


@dataclass(frozen=True)
class Tick:
    """A labelled line of the grid."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """What is drawn: both lines as SVG paths, the grid, and the smoothed points for a reader who asks.

    readout: one [x, y, x's label, y's label] a smoothed point.
    """

    raw: str
    smooth: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    logarithmic: bool
    readout: list[tuple[float, float, str, str]]

    @property
    def last(self) -> str:
        """The smoothed value at the end."""
        return self.readout[-1][3]


@dataclass(frozen=True)
class Bar:
    """Values from ``left`` to ``left + width``; their number as a height and in words."""

    left: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Histogram:
    """How values are spread. ``outside`` counts those in the tails that are not drawn."""

    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    outside: int


@dataclass(frozen=True)
class Mark:
    """A value with its interval, and both in words."""

    x: float
    y: float
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class IntervalChart:
    """Values with intervals: for each series its marks, and the line through them as an SVG path."""

    series: list[tuple[list[Mark], str]]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True)
class _Axis:
    """From values to per cent of the plot: ``start`` is at 0, ``end`` at 100."""

    start: float
    end: float
    logarithmic: bool = False

    def place(self, values: Any) -> Any:
        start, end = (math.log(self.start), math.log(self.end)) if self.logarithmic else (self.start, self.end)
        values = np.log(values) if self.logarithmic else np.asarray(values, float)
        return 100 * (values - start) / (end - start)

    def ticks(self, values: Sequence[float]) -> list[Tick]:
        return [Tick(round(float(self.place(value)), 2), number(value)) for value in values]


def line_chart(steps: Sequence[float], values: Sequence[float], *, from_zero: bool = False) -> Chart:
    """A chart of finite ``values`` at ascending ``steps`` > 0, one or more. ``from_zero`` shows the zero of y."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    raw_x, raw_y = _extremes(x, y)
    smooth_x, smooth_y = _smoothed(x, y)
    shown_y = np.append(raw_y, 0.0) if from_zero else raw_y
    low, high = float(shown_y.min()), float(shown_y.max())
    logarithmic = low > 0 and high > LOG_FROM_RATIO * low
    y_values = log_ticks(low, high) if logarithmic else ticks(low, high)
    x_axis, y_axis = _Axis(0, x[-1]), _Axis(y_values[-1], y_values[0], logarithmic)
    x_values = [value for value in ticks(0, x[-1]) if value <= x[-1]]
    at_x, at_y = x_axis.place(smooth_x).round(2), y_axis.place(smooth_y).round(2)
    labels = [(number(round(step)), f"{value:.3g}") for step, value in zip(smooth_x, smooth_y, strict=True)]
    return Chart(
        raw=_path(x_axis.place(raw_x), y_axis.place(raw_y)),
        smooth=_path(at_x, at_y),
        x_ticks=x_axis.ticks(x_values),
        y_ticks=y_axis.ticks(y_values),
        logarithmic=logarithmic,
        readout=[(a, b, *label) for a, b, label in zip(at_x.tolist(), at_y.tolist(), labels, strict=True)],
    )


def interval_chart(
    x: Sequence[float], series: Sequence[Sequence[tuple[float, float, float]]], x_end: float
) -> IntervalChart:
    """A chart of (value, low, high) at each ``x`` of 0 to ``x_end``, of one or more series; all finite."""
    bounds = np.array(series, float)  # [series, len(x), 3]
    y_values = ticks(float(bounds.min()), float(bounds.max()))
    x_axis, y_axis = _Axis(0, x_end), _Axis(y_values[-1], y_values[0])
    at_y = y_axis.place(bounds).round(2).tolist()
    drawn = []
    for place, (values, places) in enumerate(zip(series, at_y, strict=True)):
        aside = SIDE_BY_SIDE * (place - (len(series) - 1) / 2)
        at_x = (x_axis.place(x) + aside).round(2).tolist()
        labels = [f"{value:.4g} ({low:.4g} to {high:.4g})" for value, low, high in values]
        marks = [Mark(a, y, low, high, label) for a, (y, low, high), label in zip(at_x, places, labels, strict=True)]
        drawn.append((marks, _path(np.array(at_x), np.array(places)[:, 0])))
    return IntervalChart(drawn, x_axis.ticks(ticks(0, x_end)), y_axis.ticks(y_values))


def histogram(values: np.ndarray) -> Histogram:
    """How many of the finite ``values``, one or more, lie in each of some bins with round edges."""
    low, high = _without_tails(values)
    whole = bool(np.all(values == np.rint(values)))
    grid = _whole_ticks(low, high + 1) if whole else ticks(low, high)  # a whole number starts its bin
    parts = next(n for n in (5, 2, 1) if not whole or (grid[1] - grid[0]) % n == 0)
    edges = np.linspace(grid[0], grid[-1], (len(grid) - 1) * parts + 1)
    counts = np.histogram(values, edges)[0].tolist()
    y_values = _whole_ticks(0, max(1, *counts))
    x_axis, y_axis = _Axis(grid[0], grid[-1]), _Axis(y_values[-1], y_values[0])
    at = x_axis.place(edges).round(3).tolist()
    last_of_bin = 1 if whole else 0
    bars = []
    for place, count in enumerate(counts):
        first, last = number(round(edges[place], 9)), number(round(edges[place + 1] - last_of_bin, 9))
        label = f"{first if first == last else f'{first} to {last}'}: {count:,}"
        bars.append(Bar(at[place], at[place + 1] - at[place], round(100 * count / y_values[-1], 3), label))
    return Histogram(bars, x_axis.ticks(grid), y_axis.ticks(y_values), len(values) - sum(counts))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, that enclose low..high: 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        low, high = low - abs(low) / 2 - (low == 0), high + abs(high) / 2 + (high == 0)
    for step in _round_numbers(math.floor(math.log10(high - low)) - 1):
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first < MOST_TICKS:
            return [round(place * step, 12) for place in range(first, last + 1)]
    raise AssertionError("steps grow without end")


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose low..high, 0 < low; fewer in each decade when they are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        values = [step * 10.0**exponent for exponent in exponents for step in steps]
        first = max(place for place, value in enumerate(values) if value <= low)
        last = min(place for place, value in enumerate(values) if value >= high)
        if last - first < MOST_TICKS:
            break
    return [float(f"{value:.6g}") for value in values[first : last + 1]]


def number(value: float) -> str:
    """A number for a person: 2,400 or 0.05."""
    return f"{value:,.10g}"


def _whole_ticks(low: float, high: float) -> list[float]:
    return sorted({float(round(value)) for value in ticks(low, high)})


def _without_tails(values: np.ndarray) -> tuple[float, float]:
    """The range that a histogram draws."""
    low, high = float(values.min()), float(values.max())
    first, last = np.quantile(values, [TAIL_SHARE, 1 - TAIL_SHARE], method="nearest").tolist()
    return (first, last) if first < last and 2 * (last - first) < high - low else (low, high)


def _round_numbers(exponent: int) -> Iterator[float]:
    while True:
        yield from (factor * 10.0**exponent for factor in (1, 2, 5))
        exponent += 1


def _extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The series itself, or the lowest and the highest point of each bin, in order."""
    if len(x) <= 2 * MOST_BINS:
        return x, y
    bins = np.array_split(np.arange(len(x)), MOST_BINS)
    picked = np.array([sorted((run[y[run].argmin()], run[y[run].argmax()])) for run in bins]).ravel()
    return x[picked], y[picked]


def _smoothed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bin means under a Gaussian window, which is cut at the ends: no lag, unlike a running average."""
    bins = np.array_split(np.arange(len(x)), min(len(x), MOST_BINS))
    mean_x, mean_y = (np.array([series[run].mean() for run in bins]) for series in (x, y))
    width = SMOOTHING_SHARE * (x[-1] - x[0]) or 1.0
    weights = np.exp(-0.5 * ((mean_x[:, None] - mean_x) / width) ** 2)
    return mean_x, weights @ mean_y / weights.sum(axis=1)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data; a single point becomes a line of no length, which round caps make a dot."""
    points = [f"{a:.2f},{b:.2f}" for a, b in zip(x, y, strict=True)]
    return "M" + "L".join(points if len(points) > 1 else points * 2)
