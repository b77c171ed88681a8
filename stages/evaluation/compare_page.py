"""The page of a comparison: which arm is better, and how sure that is."""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from stages.evaluation.arms import Comparison
from stages.evaluation.judge import Judged
from stages.evaluation.paired import Difference
from stages.output import settings_text, write_text
from stages.page import render_page

Row = tuple[str, Difference]


def write_page(path: Path, comparison: Comparison, judged: Sequence[Judged], levels: Sequence[float]) -> None:
    """Write the page as one HTML file."""
    first, *others = judged
    text = render_page(
        "compare.html",
        today=datetime.now(timezone.utc).date().isoformat(),
        judged=judged,
        first=first,
        others=others,
        by_arm=[(one.arm.name, one.difference) for one in others],
        by_level=[
            [(f"level {level:g}", difference) for level, difference in zip(levels, one.level_differences, strict=True)]
            for one in others
        ],
        levels=levels,
        clips=comparison.clips,
        ground=comparison.ground,
        holdout=comparison.holdout,
        config=comparison.config,
        settings=settings_text(comparison.config),
        place=place,
        most_of=most_of,
    )
    write_text(path, text)


def most_of(rows: Sequence[Row]) -> float:
    """The end of the scale that shows all intervals, with 0 in its middle."""
    return max(abs(bound) for _, difference in rows for bound in difference.interval) or 1.0


def place(value: float, most: float) -> float:
    """Per cent from the left of a scale from -most to most."""
    return round(50 + 50 * value / most, 2)
