"""Fixtures and rules shared by all tests."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from upath import UPath

from stages import execute
from stages.execute import RuntimeConfig
from tests import object_store
from tests.resident import ResidentRanks

NO_ASSETS = "set WISESORA_ASSETS to a folder of real clips to run this test"

# Ray gives way to all else by default: beside another test file its workers would hardly come to run.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.pop("RAY_ADDRESS", None)  # no cluster of somebody else's

_unwanted_skips: list[str] = []


@pytest.fixture(scope="session")
def assets() -> Path:
    """The optional folder of real clips and tokenizers; tests that need it skip without it."""
    folder = os.environ.get("WISESORA_ASSETS")
    if not folder:
        pytest.skip(NO_ASSETS)
    return Path(folder)


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """A cluster for two tasks at once, which what runs in this process shares."""
    with execute.running(RuntimeConfig(decoders=2)):
        yield


@pytest.fixture(scope="session")
def resident_ranks() -> Iterator[ResidentRanks]:
    ranks = ResidentRanks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    with object_store.s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket of a real S3 server, ``s3://NAME``."""
    return object_store.new_bucket(endpoint, monkeypatch)


@pytest.fixture
def downloads(caplog: pytest.LogCaptureFixture) -> Callable[[UPath], int]:
    """How often the server has sent a file."""
    caplog.set_level(logging.INFO, "werkzeug")
    return lambda path: sum(f"GET /{path.path} " in message for message in caplog.messages)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With WISESORA_FAIL_ON_SKIP a skip hides a fault, but for a GPU, or assets that nobody promised."""
    excused = "gpu" in report.keywords or (NO_ASSETS in str(report.longrepr) and "WISESORA_ASSETS" not in os.environ)
    if report.skipped and os.environ.get("WISESORA_FAIL_ON_SKIP") and not excused:
        _unwanted_skips.append(f"{report.nodeid}: {report.longrepr}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unwanted_skips:
        print("\nskipped, with WISESORA_FAIL_ON_SKIP set:", *_unwanted_skips, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
