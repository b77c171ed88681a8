"""Ways to read a part of a tar: where it is, kept open, or (``cache.TarCache``) from a local copy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shards import storage

RESTORE = "restore it from a copy, or remove it with its commit and run the same encode again"


@dataclass(frozen=True)
class Tar:
    """A tar of a dataset: where it is, the hash (xxh3_128) of its bytes, and how many there are."""

    path: storage.Place
    hash: str
    bytes: int


class Tars(Protocol):
    """Reads tars."""

    def read_into(self, tar: Tar, offset: int, buffer: memoryview) -> int:
        """As ``storage.read_into``; FileNotFoundError if there is no such tar."""

    def damaged(self, tar: Tar) -> str:
        """Is told that what it read was damaged; says what to do about it."""


class TarsInPlace:
    """Tars where they are, each opened to read from it."""

    def read_into(self, tar: Tar, offset: int, buffer: memoryview) -> int:
        return storage.read_into(tar.path, offset, buffer)

    def damaged(self, tar: Tar) -> str:
        return RESTORE


class TarsKeptOpen(TarsInPlace):
    """Local tars that are read in many places, the last ``limit`` of them kept open."""

    def __init__(self, limit: int):
        self._files = storage.OpenFiles(limit)

    def read_into(self, tar: Tar, offset: int, buffer: memoryview) -> int:
        assert isinstance(tar.path, Path)
        return self._files.read_into(tar.path, offset, buffer)
