"""The page about a dataset in a real browser: its pictures load, its charts are drawn, it fits, it asks for nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.browsing.browse import BrowseConfig, browse
from tests.browser import Page, chromium
from tests.stages.browsing.small_dataset import small_dataset

pytestmark = pytest.mark.browser

NARROW, DESKTOP = (400, 800), (1280, 900)
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
SPILLING = "[...document.querySelectorAll('.card')].filter((c) => c.scrollHeight > c.clientHeight + 1).length"
BROKEN = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).length"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of card: one source is gone, one record is damaged."""
    folder = tmp_path_factory.mktemp("small")
    dataset = small_dataset(folder)
    (dataset.videos / "64x64x8-1.mp4").unlink()
    (tar,) = (dataset.path / "64x64x4" / "latents").glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    return Path(browse(BrowseConfig(shards=str(dataset.path), output=str(folder / "page")))["page"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("size", [NARROW, DESKTOP], ids=["narrow", "desktop"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everything_loads_and_fits(page: Page, file: Path, size: tuple[int, int], dark: bool):
    page.events.clear()
    page.open(file, *size, dark=dark)
    for place in range(4):
        page.ask(f"document.querySelectorAll('video')[{place}].scrollIntoView({{block: 'center'}})")
        page.wait(f"document.querySelectorAll('video')[{place}].readyState >= 3")
        page.wait(f"document.querySelectorAll('video')[{place}].currentTime > 0")
    sizes = page.ask("[...document.querySelectorAll('video')].map((v) => v.clientWidth / v.clientHeight)")
    assert sorted(round(size, 1) for size in sizes) == [1, 2, 2, 2], "beside its source, but for the one that is gone"
    assert page.ask("document.images.length") == 2 and page.ask(BROKEN) == 0
    assert page.ask(FITS)
    page.ask("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.ask(FITS) and page.ask(SPILLING) == 0
    assert page.errors() == []
    assert [url for url in page.requests() if not url.startswith(("blob:", "data:"))] == [file.resolve().as_uri()]


def test_histograms_are_drawn_within_their_plots(page: Page, file: Path):
    page.open(file, *NARROW)
    inside = page.ask(
        "[...document.querySelectorAll('.plot')].map((plot) => { const box = plot.getBoundingClientRect();"
        " const bars = [...plot.querySelectorAll('rect')].map((bar) => bar.getBoundingClientRect());"
        " return [Math.max(...bars.map((bar) => bar.height)) > 40, bars.every((bar) => bar.left >= box.left - 2 &&"
        " bar.right <= box.right + 2 && bar.top >= box.top - 2 && bar.bottom <= box.bottom + 2)]; })"
    )
    assert inside == [[True, True]] * 4


def test_a_keyboard_and_a_reader_get_everything(page: Page, file: Path):
    page.open(file, *DESKTOP)
    unnamed = "[...document.querySelectorAll('video, svg, img')].filter((o) => !(o.ariaLabel || o.alt)).length"
    assert page.ask(unnamed) == 0
    page.ask("document.getElementById('pause').focus()")
    assert page.ask("document.activeElement.id") == "pause"
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13)
    page.wait("document.getElementById('pause').textContent === 'Play all'")
    page.wait("[...document.querySelectorAll('video')].every((video) => !video.src || video.paused)")
