"""Arms that are compared take turns, so that whatever else the machine does slows all of them alike."""

import time
from collections.abc import Callable, Mapping


def fastest(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The seconds of each arm's best round, after a round that warms all of them up."""
    seconds = dict.fromkeys(arms, float("inf"))
    for number in range(rounds + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            if number:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds
