"""What asks a run to stop, as one rank sees it."""

import os
import signal
from pathlib import Path

import pytest

from stages.training.stopping import NONE, REASONS, SIGNALS, StopRequests


def reason(stops: StopRequests) -> str:
    return REASONS[stops.look()]


def test_a_stop_file_is_obeyed_once_also_one_that_came_while_the_run_started(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    with StopRequests(tmp_path, 1.0, main=True) as stops:
        assert reason(stops) == "the file STOP"
        assert not (tmp_path / "STOP").exists() and stops.look() == NONE


def test_the_file_and_the_clock_are_rank_0s(tmp_path: Path) -> None:
    with StopRequests(tmp_path, 0.0, main=False) as stops:
        (tmp_path / "STOP").touch()
        assert stops.look() == NONE
    with StopRequests(tmp_path, 0.0, main=True) as stops:
        assert reason(stops) == "train.max_hours"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_leaves_the_former_handler(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with StopRequests(tmp_path, None, main=False) as stops:
        os.kill(os.getpid(), number)
        assert reason(stops) == number.name
    assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_the_rank(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StopRequests(tmp_path, None, main=True):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
