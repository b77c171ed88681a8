import time

import pytest

from stages.timing import timed


def test_the_first_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [100.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work() -> str:
        now[0] += 0.25 if calls else 5
        calls.append(1)
        return "result"

    assert timed(work, 1.0) == (0.25, "result") and len(calls) == 5
