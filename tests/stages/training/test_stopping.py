"""What asks a run to stop, as one rank sees it."""

import os
import signal
from pathlib import Path

import pytest

from stages.errors import WorkError
from stages.training.stopping import NONE, REASONS, SIGNALS, StopRequests


def reason(stops: StopRequests) -> str:
    return REASONS[stops.look()]


def test_a_stop_file_is_obeyed_once(tmp_path: Path) -> None:
    with StopRequests(tmp_path, 1.0, main=True) as stops:
        (tmp_path / "STOP").touch()
        assert reason(stops) == "the file STOP"
        assert not (tmp_path / "STOP").exists() and stops.look() == NONE


def test_a_stop_file_that_nobody_obeyed_stops_no_later_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "STOP"
    with pytest.raises(WorkError), StopRequests(tmp_path, 1.0, main=True):
        file.touch()  # during the last step, or one that fails
        with StopRequests(tmp_path, 1.0, main=False):
            pass
        assert file.exists()  # which rank 0 alone may remove
        raise WorkError
    assert not file.exists() and not capsys.readouterr().out

    file.touch()  # a kill leaves it
    with StopRequests(tmp_path, 1.0, main=True) as stops:
        assert stops.look() == NONE and not file.exists()
    assert f"{file} is removed, as it was there before this run: touch it" in capsys.readouterr().out


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
