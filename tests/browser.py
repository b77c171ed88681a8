"""Headless Chromium, driven over the pipe of its DevTools protocol: nothing to install beside the browser.

Messages are JSON, each ended by a zero byte; the browser reads them from its file descriptor 3 and answers on 4.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
).split()
BRIDGE = (  # subprocess gives a child the descriptors it has, and Chromium wants 3 and 4
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
ANSWER_S = 60.0


class Page:
    """One tab. ``events`` collects what the browser tells by itself: errors, requests, messages."""

    def __init__(self, write: int, read: int):
        self._write, self._read = write, read
        self._number, self._buffer, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], ANSWER_S)
            assert ready, "the browser does not answer"
            received = os.read(self._read, 1 << 20)
            assert received, "the browser has ended"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, location: Path | str, width: int, height: int, *, dark: bool = False) -> None:
        """Show a file or a URL in a window of ``width`` x ``height`` CSS pixels; below 700 it is a phone's."""
        phone = width < 700
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=location.resolve().as_uri() if isinstance(location, Path) else location)
        self.wait("document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, timeout_s: float = 20) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + timeout_s
        while not self.ask(expression):
            assert time.monotonic() < end, f"not within {timeout_s:g} s: {expression}"
            time.sleep(0.05)

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """The window, or the whole page, as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def errors(self) -> list[str]:
        """What the console would show in red: exceptions, failed requests, refused content."""
        self.ask("0")  # collects what has come meanwhile
        found = [event["params"] for event in self.events if _is_error(event)]
        return [json.dumps(params)[:500] for params in found]

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        self.ask("0")
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


def _is_error(event: dict[str, Any]) -> bool:
    params = event.get("params", {})
    return (
        event.get("method") == "Runtime.exceptionThrown"
        or (event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"))
        or (event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error")
    )


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser with its profile in the folder ``profile``; skips the test where none is installed."""
    binary = next((found for name in NAMES if (found := shutil.which(name))), None)
    if binary is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium to run this test")
    to_browser, from_us = map(_high, os.pipe())
    from_browser, to_us = map(_high, os.pipe())
    process = subprocess.Popen(
        [sys.executable, "-c", BRIDGE, str(to_browser), str(to_us), binary, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(to_browser, to_us),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(to_us)
    try:
        yield Page(from_us, from_browser)
    finally:
        os.close(from_us)  # the browser ends when its pipe does
        _end(process)
        os.close(from_browser)


def _high(descriptor: int) -> int:
    """The same pipe under a number that neither 3 nor 4 can collide with."""
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return high


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
