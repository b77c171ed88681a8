"""The page to sample on: by its API, in a browser, and with nothing fetched from or sent to anywhere else."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.app import main as app
from pipelines.command import run
from pipelines.sample import main as sample
from stages.sampling.models import Models
from stages.sampling.record import read_record
from tests.browser import chromium
from tests.running import ROOT, environment
from tests.stages.sampling.test_files import frames
from tests.stages.small_run import small_run

SETTINGS = ["a red ball moves left", "blue", 5, 2, 3.0, 48, 32, 3]  # the page's, in its order
COMMAND = """
import socket, sys
from pipelines.app import main
real = socket.socket.connect
def connect(own, to):
    print("connects to", to[0], flush=True)
    return real(own, to)
socket.socket.connect = connect
main(sys.argv[1:])
"""
"""The app, telling whom it connects to."""


@dataclass(frozen=True)
class Served:
    url: str
    run: Path
    log: Path

    def make(self, *values: Any) -> list[Any]:
        """What the page shows after a click; AssertionError with what it tells instead."""
        request = urllib.request.Request(f"{self.url}/gradio_api/call/make", json.dumps({"data": values}).encode(),
                                         {"Content-Type": "application/json"})  # fmt: skip
        with urllib.request.urlopen(request) as answer:
            number = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{self.url}/gradio_api/call/make/{number}") as answer:
            told = answer.read().decode()
        assert "event: complete" in told, told
        return json.loads(told.partition("event: complete\ndata: ")[2].splitlines()[0])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install -e '.[app]' to run this test")
    folder = tmp_path_factory.mktemp("page")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = Served(f"http://127.0.0.1:{port}", small_run(folder / "run"), folder / "log")
    with open(found.log, "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, f"ckpt={found.run}", f"output={folder / 'made'}", f"port={port}"],
            cwd=ROOT, env={**environment(), "GRADIO_TEMP_DIR": str(folder / "gradio")}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        for _ in range(1200):
            with socket.socket() as trial:
                if not trial.connect_ex(("127.0.0.1", port)):
                    break
            assert process.poll() is None, found.log.read_text()
            time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait()


def test_the_page_makes_what_the_command_makes(served: Served, tmp_path: Path) -> None:
    _, video, about, history = served.make(*SETTINGS)  # the first is the visitor's state
    made = Path(video["path"])
    assert run(sample, ["--prompt", "a red ball moves left", "negative_prompt=blue", "seed=5", "steps=2",
                        "guidance_scale=3", "width=48", "height=32", "frames=3", "batch_size=1",
                        f"ckpt={served.run}", f"output={tmp_path}"]) == 0  # fmt: skip
    (expected,) = tmp_path.glob("*.mp4")
    assert np.abs(frames(made) - frames(expected)).max() <= 1
    theirs, ours = read_record(expected)["settings"], read_record(made)["settings"]
    assert ours == theirs
    assert "seed 5 · 2 steps · guidance 3 · 48 × 32, 3 frames" in about
    assert [item["caption"] for item in history] == ["a red ball moves left"]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, "  ", "no prompt"),
        (2, -1, "seed: found -1"),
        (2, None, "seed: found nothing"),
        (5, 50, "multiples of 16"),
        (7, 0, "frames: found 0"),
    ],
)
def test_a_mistake_is_told_in_a_line(place: int, value: Any, message: str, served: Served) -> None:
    with pytest.raises(AssertionError, match=f"event: error\n.*{message}"):
        served.make(*SETTINGS[:place], value, *SETTINGS[place + 1 :])


@pytest.mark.browser
def test_a_person_makes_videos_and_goes_back_to_the_first(served: Served, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as page:
        page.open(served.url, 1280, 900)
        page.wait("!!document.querySelector('#make') && !!document.querySelector('textarea')", 60)
        for number, more in enumerate(["a red", " ball"], 1):
            page.ask("document.querySelector('textarea').focus()")
            page.call("Input.insertText", text=more)
            page.ask("document.querySelector('#make').click()")
            page.wait(f"document.querySelectorAll('#history .gallery-item').length == {number}", 60)
        page.wait("document.querySelector('#about').innerText.includes('a red ball')")
        page.wait("document.querySelector('#video video').videoWidth == 64")
        page.ask("document.querySelectorAll('#history .gallery-item button')[1].click()")
        page.wait("document.querySelector('textarea').value == 'a red'")
        page.open(served.url, 390, 844)  # a phone: nothing sticks out
        page.wait("!!document.querySelector('#make') && document.documentElement.scrollWidth <= 390", 60)
        assert page.errors() == []
        assert {url for url in page.requests() if not url.startswith((served.url, "data:", "blob:"))} == set()


def test_nothing_goes_to_another_machine(served: Served) -> None:
    served.make(*SETTINGS)
    connected = {line for line in served.log.read_text().splitlines() if line.startswith("connects to")}
    assert connected == {"connects to 127.0.0.1"}  # Gradio looks whether its page is there


def test_models_that_are_kept_are_loaded_once(tmp_path: Path) -> None:
    checkpoint, models = small_run(tmp_path) / "checkpoints" / "step-0000007", Models.on_this_machine()
    assert models.transformer(checkpoint, weights="ema") is not models.transformer(checkpoint, weights="ema")
    kept = models.kept()
    assert kept.transformer(checkpoint, weights="ema") is kept.transformer(checkpoint, weights="ema")
    assert kept.vae("tiny", models.device) is kept.vae("tiny", models.device)


def test_a_missing_gradio_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "stages.sampling.web", raising=False)
    assert run(app, []) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "needs gradio" in told and "pip install -e '.[app]'" in told
