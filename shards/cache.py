"""Whole files of an object store, kept in a local folder of bounded size for all processes of a node.

A file is named by its content, so that it is never stale, and is whole or absent: it is fetched as a ``.part`` file,
which whoever fetches it holds locked, checked, and only then given its name. A lock ends with its process; the
``.part`` file of a killed one is fetched over, or makes room. What was read least recently makes room first, unless
somebody holds it locked. A file that is removed while another process reads it stays readable until that process
closes it.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from upath import UPath

from shards import object_store, storage
from shards.errors import DatasetError, ShardError, StoreError
from shards.tars import Tar


class FileCache:
    """Files in ``folder``, of at most ``limit_bytes`` beside those that are held."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        storage.make_folder(folder)

    @contextmanager
    def copy_of(self, path: UPath) -> Iterator[Path]:
        """A local file with the content of ``path`` as it is now, and its suffix; held for the block.

        Raises FileNotFoundError, and StoreError where the store does not answer or not with all of it.
        """
        version, size = object_store.version(path)
        copy = self.folder / f"{version}{path.suffix}"

        def check(fetched: Path) -> None:
            found = fetched.stat().st_size
            if size is not None and found != size:
                raise StoreError(f"{path}: the store sent {found} of {size} bytes: run it again")

        while not (held := _held(copy)):
            self._fetch(path, copy, size, check)
        with held:
            os.utime(copy)  # read most recently
            yield copy

    def _fetch(self, path: UPath, copy: Path, size: int | None, check: Callable[[Path], None]) -> None:
        part = self.folder / f".{copy.name}.{size or 0}.part"
        with _locked(part):
            try:
                if not copy.exists():  # else another process has fetched it meanwhile
                    self._make_room()
                    object_store.fetch(path, part)
                    check(part)
                    os.replace(part, copy)
            finally:
                part.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Removes what was read least recently until the rest, and all that is being fetched, keeps the limit."""
        with _locked(self.folder / _LOCK):
            total = sum(size for size, part in _parts(self.folder) if not _removed(part))
            copies = sorted(_copies(self.folder))
            total += sum(size for _, size, _ in copies)
            for _, size, path in copies:
                if total <= self.limit_bytes:
                    break
                if _removed(path):
                    total -= size


class TarCache(FileCache):
    """Tars in ``folder`` (default: ``wisesora`` in the user's folder for caches), of at most ``limit_bytes``."""

    def __init__(self, folder: str, limit_bytes: int):
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wisesora"
        super().__init__(storage.local_path(folder) if folder else default, limit_bytes)

    def read_into(self, tar: Tar, offset: int, buffer: memoryview) -> int:
        """``storage.read_into`` from the local copy of a tar, which is fetched if it is not there."""
        copy = self._copy(tar)
        while True:
            with suppress(FileNotFoundError):  # it made room for another tar
                os.utime(copy)  # read most recently
                return storage.read_into(copy, offset, buffer)
            assert isinstance(tar.path, UPath)
            self._fetch(tar.path, copy, tar.bytes, lambda fetched: _check(tar, fetched))

    def damaged(self, tar: Tar) -> str:
        """Removes the local copy, which was whole when it was fetched; says what to do."""
        self._copy(tar).unlink(missing_ok=True)
        return f"its copy in {self.folder} was damaged there and is removed, run again to fetch another"

    def _copy(self, tar: Tar) -> Path:
        return self.folder / f"{tar.hash}.tar"


_LOCK = ".lock"
_COPY = re.compile(r"[0-9a-f]{32}(\.[^.]*)?")
_PART = re.compile(rf"\.{_COPY.pattern}\.([0-9]+)\.part")


def _parts(folder: Path) -> Iterator[tuple[int, Path]]:
    """The bytes that each will have."""
    for path in folder.iterdir():
        if match := _PART.fullmatch(path.name):
            yield int(match[2]), path


def _copies(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """When each was read last, and its bytes."""
    for path in folder.iterdir():
        if _COPY.fullmatch(path.name):
            with suppress(FileNotFoundError):
                yield path.stat().st_mtime_ns, path.stat().st_size, path


def _removed(path: Path) -> bool:
    """Removes a file that no process holds; whether it is gone."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
    return True


def _held(path: Path) -> BinaryIO | None:
    """A file that makes no room until what is returned is closed; None if it is not there."""
    with suppress(FileNotFoundError):
        file = open(path, "rb")
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is(file.fileno(), path):
            return file
        file.close()
    return None


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
    with open(fetched, "rb") as file:
        found = storage.hash_of(file)
    if found != tar.hash:
        raise ShardError(
            f"{tar.path} has {fetched.stat().st_size} bytes and the hash {found}, the manifest says "
            f"{tar.bytes} and {tar.hash}: the tar is damaged; pipelines.verify names what is"
        )


def require_room(cache: TarCache, needed_bytes: int) -> None:
    """DatasetError where the tars that are read together would push each other out."""
    if needed_bytes > cache.limit_bytes:
        raise DatasetError(
            f"data.cache_gb is {cache.limit_bytes / 1e9:g}, the tars that are read together have "
            f"{needed_bytes / 1e9:.3g} GB: set it to more, or data.window_shards to less"
        )
