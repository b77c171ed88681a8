"""What asks a run to stop. All ranks look before each step and agree; then they save and leave.

RUN/STOP          a file of any content (``touch RUN/STOP``); who obeys it removes it, as does a run that begins or ends
SIGUSR1, SIGTERM, SIGINT   to any rank; a second SIGINT ends the rank at once
train.max_hours   since the start of the command
the launcher      the `deepspeed` command passes no signal on, and a killed launcher leaves its ranks behind
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

STOP_FILE = "STOP"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCHER = b"deepspeed.launcher.launch"

# The ranks agree on a place in this list.
NONE, FILE, HOURS, LAUNCHER_ENDED, FIRST_SIGNAL = range(5)
REASONS = ("", f"the file {STOP_FILE}", "train.max_hours", "the launcher has ended", *(s.name for s in SIGNALS))


class StopRequests:
    """This rank's view of what asks to stop; while it is entered, signals ask rather than kill."""

    def __init__(self, run: Path, max_hours: float | None, *, main: bool):
        self._file = run / STOP_FILE
        self._main = main  # alone looks at the file and at the clock
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours is not None else None
        self._started_by = _launcher()
        self._signal: int | None = None

    def __enter__(self) -> "StopRequests":
        if self._take_file():
            print(f"{self._file} is removed, as it was there before this run: touch it to stop this one", flush=True)
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._take_file()  # it came too late, or the run failed

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def look(self) -> int:
        """The place in REASONS of what asks this rank to stop; NONE to go on."""
        if self._signal is not None:
            return FIRST_SIGNAL + SIGNALS.index(signal.Signals(self._signal))
        if self._started_by is not None and _ancestors() != self._started_by:
            return LAUNCHER_ENDED
        if self._main and self._deadline is not None and time.monotonic() > self._deadline:
            return HOURS
        return FILE if self._take_file() else NONE

    def _take_file(self) -> bool:
        """Whether the file was there, which is removed: it asks one run alone."""
        if there := self._main and self._file.exists():
            self._file.unlink(missing_ok=True)
        return there


def _launcher() -> tuple[int, int] | None:
    """The launcher that started this rank and the `deepspeed` command that started it, if so it was."""
    launcher, command = _ancestors()
    try:
        started = LAUNCHER in Path(f"/proc/{launcher}/cmdline").read_bytes()
    except OSError:
        return None
    return (launcher, command) if started else None


def _ancestors() -> tuple[int, int]:
    """Parent and grandparent. A process whose parent ends gets another one."""
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text()  # PID (NAME) STATE PARENT ...
    except OSError:  # it has just ended
        return parent, 0
    return parent, int(stat.rpartition(")")[2].split()[1])
