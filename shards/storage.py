"""The one place where datasets touch a file system: a local folder, or an object store at any fsspec URL.

A file is whole or absent. Locally it is written under a temporary name (``.NAME.*.tmp``) in the folder it belongs
to, flushed to the disk, and only then given its name; a kill leaves at most a temporary file, which nobody reads.
On a store it is written to a local temporary file and uploaded under its final name, in one PUT or in a multipart
upload, whose completion is what makes it visible. The parts of an upload that a kill cut short are seen by nobody;
a lifecycle rule of the bucket (abort incomplete multipart uploads) removes them.
"""

import functools
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import xxhash
from upath import UPath

from shards import object_store
from shards.errors import DatasetError

Place = Path | UPath  # a plain pathlib path where it is local
Location = str | os.PathLike[str] | UPath


def place(location: Location) -> Place:
    """The path of a location, local or a URL such as ``s3://bucket/dataset``; both are used as pathlib paths.

    Stock WebDataset runs what follows ``pipe:`` in a shell. Here a name is a path or a URL, never a command.
    Raises DatasetError for what is neither, and where the package that opens such URLs is not installed.
    """
    if isinstance(location, UPath):
        return location
    text = os.fspath(location)
    if not text:
        raise DatasetError("no dataset given: expected the path of a folder, or a URL such as s3://bucket/dataset")
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text)
    if not scheme:
        return local_path(location) if isinstance(location, str) else Path(text)
    try:
        return object_store.open_url(text)
    except ValueError as error:
        raise DatasetError(
            f"{text!r}: {scheme.group()} is not supported, expected the path of a local folder (write ./{text} for a "
            "folder of that name) or a URL such as s3://bucket/dataset"
        ) from error


def local_path(text: str) -> Path:
    """A local path as it was typed: ``~`` is the user's home, as a shell has it. In a Path it is a plain name."""
    return Path(os.path.expanduser(text))


def make_folder(folder: Place) -> None:
    """Makes a folder and its parents unless they are there; DatasetError where a file is in the way."""
    if isinstance(folder, UPath):
        return  # names alone make a store's folders
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DatasetError(f"{error.filename} is a file, expected a folder: use another path") from error


def list_folder(folder: Place) -> list[str]:
    """The names in a folder, sorted, as they are now; none if it does not exist."""
    if isinstance(folder, UPath):
        return object_store.list_folder(folder)
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def walk(folder: Place) -> Iterator[str]:
    """The paths, relative to a folder, of all visible files below it, sorted within each folder.

    Local links are followed, loops are not. Raises DatasetError, at once, if there is no such folder.
    """
    is_folder = folder.is_dir() if isinstance(folder, Path) else object_store.is_folder(folder)
    if not is_folder:
        raise DatasetError(f"no folder at {folder}")
    return _visible_files(_walk_local(folder) if isinstance(folder, Path) else object_store.walk(folder))


def _walk_local(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    entered = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        inside = os.path.relpath(parent, folder)
        yield "" if inside == "." else inside, folders, names


def _visible_files(walked: Iterator[tuple[str, list[str], list[str]]]) -> Iterator[str]:
    for inside, folders, names in walked:
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # those that are entered
        yield from (os.path.join(inside, name) for name in sorted(names) if not name.startswith("."))


def exists(path: Place) -> bool:
    return path.exists() if isinstance(path, Path) else object_store.exists(path)


def read(path: Place) -> bytes:
    """A whole file; FileNotFoundError if it is not there."""
    return path.read_bytes() if isinstance(path, Path) else object_store.read(path)


def read_into(path: Place, offset: int, buffer: memoryview) -> int:
    """Fills the buffer with the bytes from ``offset``; how many there were, fewer at the file's end."""
    if isinstance(path, UPath):
        data = object_store.read_range(path, offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _fill(descriptor, offset, buffer)
    finally:
        os.close(descriptor)


class OpenFiles:
    """Local files that are read in many places, the last ``limit`` of them kept open. Threads may share it."""

    def __init__(self, limit: int):
        self._open = functools.lru_cache(maxsize=limit)(_Descriptor)

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> int:
        """As the function of that name."""
        file = self._open(path)  # held until it was read, should it leave the cache meanwhile
        return _fill(file.descriptor, offset, buffer)


class _Descriptor:
    def __init__(self, path: Path):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _fill(descriptor: int, offset: int, buffer: memoryview) -> int:
    count = 0
    while count < len(buffer) and (part := os.preadv(descriptor, [buffer[count:]], offset + count)):
        count += part
    return count


def open_read(location: Location) -> BinaryIO:
    """A file to read from front to back, fetched as it is read; FileNotFoundError if it is not there."""
    path = place(location)
    return open(path, "rb") if isinstance(path, Path) else object_store.open_read(path)


def hash_of(file: BinaryIO) -> str:
    """xxh3_128 of the rest of an open file."""
    digest = xxhash.xxh3_128()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def write_whole(path: Place, final_name: Callable[[], str] | None = None) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name when the block ends and not at all when it raises.

    An existing file is replaced. ``final_name`` is asked at the end, for a name that depends on the content.
    """
    if isinstance(path, UPath):
        with object_store.write_whole(path, final_name) as file:
            yield file
        return
    with _temporary(path) as (temporary, file):
        yield file
        _flush(file)
        os.replace(temporary, path.with_name(final_name()) if final_name else path)
    flush(path.parent)


def create_exclusive(path: Place, data: bytes) -> bool:
    """Creates a file, whole, unless there is one; True if it was us. Of several at once exactly one wins.

    On a store this is one conditional PUT (If-None-Match on S3), which Amazon's, Google's and Azure's stores and
    MinIO keep. Where a store ignores the condition, the last of several writers wins; each file is whole still.
    """
    if isinstance(path, UPath):
        return object_store.create_exclusive(path, data)
    with _temporary(path) as (temporary, file):
        file.write(data)
        _flush(file)
        try:
            os.link(temporary, path)  # unlike a rename, fails where the name is taken
        except FileExistsError:
            return False
    flush(path.parent)
    return True


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield temporary, file
    finally:
        with suppress(FileNotFoundError):  # it has its name by now
            os.unlink(temporary)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Makes a local file, or the names in a local folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
