"""The one place where datasets touch a file system. Local folders for now; other stores get in here.

A file is whole or absent: it is written under a temporary name (``.NAME.*.tmp``) in the folder it belongs to,
flushed to the disk, and only then given its name. A kill leaves at most a temporary file, which nobody reads.
"""

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shards.errors import DatasetError

Location = str | os.PathLike[str]


def local_path(location: Location) -> Path:
    """The path of a dataset; DatasetError for what is no local path.

    Stock WebDataset runs what follows ``pipe:`` in a shell. Here a name is a path, never a command.
    """
    text = os.fspath(location)
    if not text:
        raise DatasetError("no dataset given: expected the path of a folder")
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text)
    if scheme:
        raise DatasetError(
            f"{text!r}: {scheme.group()} is not supported, expected the path of a local folder "
            f"(write ./{text} for a folder of that name)"
        )
    return Path(text)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents unless they are there; DatasetError where a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DatasetError(f"{error.filename} is a file, expected a folder: use another path") from error


def list_folder(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if it does not exist."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def exists(path: Path) -> bool:
    return path.exists()


def read(path: Path) -> bytes:
    return path.read_bytes()


def read_range(path: Path, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset``, or fewer where the file ends earlier."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts, position, end = [], offset, offset + length
        while position < end and (part := os.pread(descriptor, end - position, position)):
            parts.append(part)
            position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


@contextmanager
def write_whole(path: Path, final_name: Callable[[], str] | None = None) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name when the block ends and not at all when it raises.

    An existing file is replaced. ``final_name`` is asked at the end, for a name that depends on the content.
    """
    with _temporary(path) as (temporary, file):
        yield file
        _flush(file)
        os.replace(temporary, path.with_name(final_name()) if final_name else path)
    flush(path.parent)


def create_exclusive(path: Path, data: bytes) -> bool:
    """Creates a file, whole, unless there is one; True if it was us. Of several at once exactly one wins."""
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
    """Makes a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
