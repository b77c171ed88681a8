"""Whole tars of an object store, kept in a local folder of bounded size for all processes of a node.

A tar is named by the hash of its bytes, so that it is never stale, and is whole or absent: it is fetched as a
``.part`` file, which whoever fetches it holds locked, checked, and only then given its name. A lock ends with its
process; the ``.part`` file of a killed one is fetched over, or makes room. What was read least recently makes room
first. A file that is removed while another process reads it stays readable until that process closes it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash
from upath import UPath

from shards import object_store, storage
from shards.errors import DatasetError, ShardError
from shards.tars import Tar


class TarCache:
    """Tars in ``folder`` (default: ``wisesora`` in the user's folder for caches), of at most ``limit_bytes``."""

    def __init__(self, folder: str, limit_bytes: int):
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wisesora"
        self.folder, self.limit_bytes = Path(folder) if folder else default, limit_bytes
        storage.make_folder(self.folder)

    def read_into(self, tar: Tar, offset: int, buffer: memoryview) -> int:
        """``storage.read_into`` from the local copy of a tar, which is fetched if it is not there."""
        copy = self._copy(tar)
        while True:
            with suppress(FileNotFoundError):  # it made room for another tar
                os.utime(copy)  # read most recently
                return storage.read_into(copy, offset, buffer)
            self._fetch(tar)

    def damaged(self, tar: Tar) -> str:
        """Removes the local copy, which was whole when it was fetched; says what to do."""
        self._copy(tar).unlink(missing_ok=True)
        return f"its copy in {self.folder} was damaged there and is removed, run again to fetch another"

    def _copy(self, tar: Tar) -> Path:
        return self.folder / f"{tar.hash}.tar"

    def _fetch(self, tar: Tar) -> None:
        assert isinstance(tar.path, UPath)
        part = self.folder / f"{tar.hash}.{tar.bytes}.part"
        with _locked(part):
            try:
                if not self._copy(tar).exists():  # else another process has fetched it meanwhile
                    self._make_room()
                    object_store.fetch(tar.path, part)
                    _check(tar, part)
                    os.replace(part, self._copy(tar))
            finally:
                part.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Removes what was read least recently until the rest, and all that is being fetched, keeps the limit."""
        with _locked(self.folder / "lock"):
            fetched = sum(_bytes_of(part) for part in self.folder.glob("*.part") if not _abandoned(part))
            tars = [(status.st_mtime_ns, status.st_size, path) for path, status in _statuses(self.folder)]
            total = fetched + sum(size for _, size, _ in tars)
            for _, size, path in sorted(tars):
                if total <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= size


def _statuses(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            yield path, path.stat()


def _bytes_of(part: Path) -> int:
    return int(part.name.split(".")[1])


def _abandoned(part: Path) -> bool:
    """Removes a ``.part`` file that no process holds; True if it did."""
    with suppress(FileNotFoundError), open(part, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        part.unlink(missing_ok=True)
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file locked, which is made if it is not there; of several threads and processes one at a time."""
    while True:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is(file.fileno(), path):
                yield
                return
        # whoever held it renamed or removed it: lock the one that has the name now


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _check(tar: Tar, fetched: Path) -> None:
    digest = xxhash.xxh3_128()
    with open(fetched, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != tar.hash:
        raise ShardError(
            f"{tar.path} has {fetched.stat().st_size} bytes and the hash {digest.hexdigest()}, the manifest says "
            f"{tar.bytes} and {tar.hash}: the tar is damaged; pipelines.verify names what is"
        )


def require_room(cache: TarCache, needed_bytes: int) -> None:
    """DatasetError where the tars that are read together would push each other out."""
    if needed_bytes > cache.limit_bytes:
        raise DatasetError(
            f"data.cache_gb is {cache.limit_bytes / 1e9:g}, the tars that are read together have "
            f"{needed_bytes / 1e9:.3g} GB: set it to more, or data.window_shards to less"
        )
