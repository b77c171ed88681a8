"""The pages of a comparison, and of a run with samples over time, in a real browser: nothing wider than a phone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shards.dataset import Dataset
from shards.loader import DataConfig
from stages.evaluation.arms import Arm, Comparison
from stages.evaluation.compare_config import CompareConfig
from stages.evaluation.compare_page import write_page
from stages.evaluation.evaluate import evaluate
from stages.evaluation.judge import judge
from stages.shapes.render import seen
from stages.training.config import TrainConfig
from tests.browser import Page, chromium
from tests.stages.evaluation.finished_run import finished_run
from tests.stages.evaluation.test_training_samples import leave

PHONE, DESKTOP = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


def comparison_page(folder: Path) -> Path:
    names = ("all", "a-name-as-long-as-a-person-may-want-to-give", "none")
    draw = np.random.default_rng(0)
    losses = {name: draw.normal(size=(3, 20, 10)) for name in names}
    arms = [Arm(name, TrainConfig(), 20, 20, False, 5.0, 12_345_678, ['data.filter is "x"'] * 2) for name in names]
    config = CompareConfig(arms={name: [] for name in names})
    finished_run(folder, seen()[:1])
    ground = DataConfig(str(folder / "shards"))
    comparison = Comparison(config, arms, ground, 0.1, Dataset.open(ground.shards), 20)
    judged = judge(arms, losses, [str(number) for number in range(20)])
    write_page(folder / "compare.html", comparison, judged, [(place + 0.5) / 10 for place in range(10)])
    return folder / "compare.html"


def run_page(folder: Path) -> Path:
    config = finished_run(folder, seen()[:1])
    for step in range(1, 9):
        leave(folder / "run", step, ["a", "a prompt of so many words that no phone shows it in one line " * 3])
    return Path(evaluate(config)["report"])


@pytest.mark.parametrize("make", [comparison_page, run_page])
def test_no_page_is_wider_than_its_window_or_has_errors(make, page: Page, tmp_path: Path) -> None:
    file = make(tmp_path)
    for width, height in (PHONE, DESKTOP):
        page.open(file, width, height)
        assert page.ask("document.documentElement.scrollWidth") <= width
        over = """[...document.querySelectorAll('.card')].filter((card) => card.scrollWidth > card.clientWidth
          && getComputedStyle(card).overflowX === 'visible').map((card) => card.textContent.trim().slice(0, 40))"""
        assert page.ask(over) == []
    assert page.errors() == []
    assert page.requests() and all(url.startswith(("file:", "blob:", "data:")) for url in page.requests())
