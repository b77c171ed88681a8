"""What a verification of a dataset tells: faults, notes, and how much it has read."""

from collections.abc import Callable
from dataclasses import dataclass

from shards import storage
from shards.storage import Place


@dataclass(frozen=True)
class Fault:
    """Something in a dataset that is not as it was written.

    ``part`` is the key of a record, or says which other part of the file it is (``trailer``, ``rows``, ...).
    ``redo`` are files that the same encode makes again, byte for byte, once they are away; none if it cannot.
    """

    path: Place
    part: str
    found: str
    expected: str
    redo: tuple[Place, ...]

    @property
    def advice(self) -> str:
        """What to do."""
        return "repair it with --repair, or restore it from a copy" if self.redo else "restore it from a copy"

    def __str__(self) -> str:
        return f"fault: {self.path}: {self.part}: found {self.found}, expected {self.expected}; {self.advice}"


@dataclass(frozen=True)
class Note:
    """Something worth knowing that is no fault, such as what a kill left behind."""

    path: Place
    message: str

    def __str__(self) -> str:
        return f"note: {self.path}: {self.message}"


Finding = Fault | Note


def damage(path: Place, error: Exception) -> str:
    """What was found at a path that could not be read."""
    if not storage.exists(path):
        return "nothing"
    return f"a file that {' '.join(str(error).split()).removeprefix(f'{path} ')}"


@dataclass
class Tally:
    """What has been read. ``after_tar`` is called after each tar."""

    after_tar: Callable[[], object] = lambda: None
    files: int = 0
    tar_bytes: int = 0
    records: int = 0
