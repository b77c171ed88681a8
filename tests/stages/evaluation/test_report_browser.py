"""The report in a real browser: its videos play, its curves are drawn, it fits a phone, it asks for nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.evaluation.evaluate import evaluate, look_at
from stages.evaluation.inputs import read_manifest, read_samples, read_training
from stages.evaluation.report import Page, write_report
from stages.shapes.render import held_out, seen
from tests.browser import Page as Tab
from tests.browser import chromium
from tests.stages.evaluation.finished_run import finished_run
from tests.stages.evaluation.measured_example import example

pytestmark = pytest.mark.browser

PHONE, DESKTOP = (360, 780), (1400, 1000)
PLAYING = "[...document.querySelectorAll('video')].filter((v) => v.readyState >= 3 && !v.paused && v.currentTime > 0)"
OPEN = "[...document.querySelectorAll('video')].filter((video) => video.src)"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shown = [one for one in held_out()[:3] for _ in range(4)] + seen()[:30]
    return Path(evaluate(finished_run(tmp_path_factory.mktemp("run"), shown))["report"])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that is measured of a checkpoint, with names as long as they get."""
    config = finished_run(tmp_path_factory.mktemp("measured"), held_out()[:2])
    training, manifest = read_training(config.run), read_manifest(config.shards)
    path = Path(config.run) / "report.html"
    clip = look_at(Path(config.samples), read_samples(config.samples)["samples"][0])
    write_report(path, Page([clip], None, training, manifest, [], "", example()))
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Tab) -> Tab:
    browser.events.clear()
    return browser


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_videos_play_and_nothing_overflows(page: Tab, report: Path, size: tuple[int, int], dark: bool):
    page.open(report, *size, dark=dark)
    assert page.ask("innerWidth") == size[0]
    page.ask("document.querySelector('[data-kind=held-out]').scrollIntoView()")
    page.wait(f"{PLAYING}.length >= 8")
    page.ask(f"window.first = {PLAYING}[0]; window.last_s = first.currentTime")
    page.wait("first.currentTime !== last_s")
    assert page.ask("[first.videoWidth, first.videoHeight]") == [64, 64]
    assert page.ask("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.ask("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.ask("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.errors() == []
    assert [url for url in page.requests() if not url.startswith("blob:")] == [report.resolve().as_uri()]


def test_only_videos_near_the_screen_are_open(page: Tab, report: Path):
    page.open(report, *PHONE)
    page.ask("document.querySelector('[data-kind=held-out]').scrollIntoView()")
    page.wait(f"{PLAYING}.length >= 8")
    assert page.ask(f"{OPEN}.length") < page.ask("document.querySelectorAll('video').length") == 42
    page.ask("document.querySelector('footer').scrollIntoView()")
    page.wait(f"{OPEN}.length === 0")


def test_curves_are_drawn_within_their_plots(page: Tab, report: Path):
    page.open(report, *PHONE)
    boxes = page.ask(
        "[...document.querySelectorAll('path')].map((path) => {"
        " const line = path.getBoundingClientRect(), plot = path.closest('.plot').getBoundingClientRect();"
        " return [path.getTotalLength() > 50, line.width / plot.width, line.left >= plot.left - 4,"
        " line.right <= plot.right + 4, line.top >= plot.top - 4, line.bottom <= plot.bottom + 4,"
        " getComputedStyle(path).stroke !== 'none']; })"
    )
    assert len(boxes) == 4
    for long, share, *inside in boxes:
        assert long and share > 0.9 and all(inside)
    small = (
        "[...document.querySelectorAll('.plot span')].filter((s) => parseFloat(getComputedStyle(s).fontSize) < 11.5)"
    )
    assert page.ask(f"{small}.length") == 0


def test_pointing_at_a_curve_reads_it(page: Tab, report: Path):
    page.open(report, *DESKTOP)
    page.ask("document.querySelector('.plot').scrollIntoView({block: 'center'})")
    before = page.ask("document.querySelector('output').textContent")
    box = page.ask("document.querySelector('.plot').getBoundingClientRect().toJSON()")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["left"] + box["width"] / 2, y=box["top"] + 20)
    page.wait(f"document.querySelector('output').textContent !== {before!r}")
    assert "at step 1,2" in page.ask("document.querySelector('output').textContent")


def test_the_videos_can_be_paused_and_played(page: Tab, report: Path):
    page.open(report, *DESKTOP)
    page.ask("document.querySelector('[data-kind=held-out]').scrollIntoView()")
    page.wait(f"{PLAYING}.length >= 8")
    page.ask("document.getElementById('pause').click()")
    page.wait(f"{PLAYING}.length === 0")
    assert page.ask("document.getElementById('pause').textContent") == "Play all"
    page.ask("document.getElementById('pause').click()")
    page.wait(f"{PLAYING}.length >= 8")


def test_dark_and_light_are_readable(page: Tab, report: Path):
    """Text against its ground has the contrast that WCAG asks for, 4.5 to 1, in both colour schemes."""
    contrast = """(() => {
      const light = (colour) => { const c = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
      const of = (selector) => getComputedStyle(document.querySelector(selector));
      const ground = light(of('.card').backgroundColor);
      return ['h1', 'small', '.good', '.bad'].map((text) => {
        const pair = [light(of(text).color), ground].sort((a, b) => b - a);
        return (pair[0] + 0.05) / (pair[1] + 0.05); }); })()"""
    grounds = []
    for dark in (False, True):
        page.open(report, *DESKTOP, dark=dark)
        assert min(page.ask(contrast)) >= 4.5
        grounds.append(page.ask("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_what_was_measured_fits_and_two_checkpoints_are_told_apart(page: Tab, measured: Path, size: tuple[int, int]):
    page.open(measured, *size)
    page.ask("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.ask("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    narrow = "[...document.querySelectorAll('.measured th, .measured td + td')].filter((cell) => cell.clientWidth < 50)"
    assert page.ask(f"{narrow}.length") == 0
    look = (
        "((one) => { const s = getComputedStyle(one); return [s.backgroundColor, s.borderRadius, one.offsetWidth]; })"
    )
    first, second = (page.ask(f"{look}(document.querySelector('.plot b.series{number}'))") for number in (0, 1))
    assert first[0] != second[0] and first[1] != second[1] and first[2] == second[2] > 4
    assert page.errors() == []
