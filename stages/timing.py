"""How long work takes here."""

import time
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


def timed(work: Callable[[], _Result], least_s: float) -> tuple[float, _Result]:
    """The seconds that one call takes once it is warm, over calls for ``least_s`` at least; and what it gives."""
    result = work()  # kernels are chosen at the first call
    calls, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < least_s:
        work()
        calls += 1
    return seconds / calls, result
