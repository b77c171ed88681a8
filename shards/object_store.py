"""What ``storage`` does at an fsspec URL. Most functions are the namesakes of those there.

Nothing is cached, since other processes write to the same place. Where a store refuses, this is a DatasetError of one
line, and a StoreError where it is silent or says anything that asking again may mend; that something is absent stays
FileNotFoundError.
"""

import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash
from upath import UPath

from shards.errors import DatasetError, StoreError

_CLIENT_ERRORS = (  # what the stores' libraries raise beside OSError when they get no answer
    ("fsspec.exceptions", "FSTimeoutError"),  # an OSError only from Python 3.11 on
    ("botocore.exceptions", "BotoCoreError"),
    ("aiohttp", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
_REFUSALS = (  # those of them that stay as they are, beside PermissionError
    ("botocore.exceptions", "NoCredentialsError"),
    ("botocore.exceptions", "PartialCredentialsError"),
    ("google.auth.exceptions", "DefaultCredentialsError"),
    ("azure.core.exceptions", "ClientAuthenticationError"),
)


def open_url(url: str) -> UPath:
    """The path of a URL; ValueError for what is none, DatasetError where the package that opens it is missing."""
    if not re.match(r"[^:/]+://[^/]", url) or "::" in url or url.startswith(("file:", "local:")):
        raise ValueError("no URL of an object store")
    path = UPath(url, use_listings_cache=False)
    try:
        _ = path.fs  # made on first use
    except ImportError as error:
        extra = (
            "pip install -e '.[s3]' in the project's folder"
            if path.protocol in ("s3", "s3a")
            else "install it with pip"
        )
        raise DatasetError(f"{url}: {error}: {extra}") from error
    return path


@contextmanager
def _answers(path: UPath) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except _with_loaded(OSError, _CLIENT_ERRORS) as error:
        kind = DatasetError if isinstance(error, _with_loaded(PermissionError, _REFUSALS)) else StoreError
        answer = " ".join(str(error).split()) or type(error).__name__
        raise kind(
            f"{path}: the store answers {answer!r}: check the credentials, the endpoint and "
            "the network, then run it again"
        ) from error


def _with_loaded(error: type[Exception], others: Iterable[tuple[str, str]]) -> tuple[type[Exception], ...]:
    """It and those of the others whose libraries are in use: none is loaded for its errors."""
    loaded = [(sys.modules.get(module), name) for module, name in others]
    return (error, *(getattr(module, name) for module, name in loaded if module))


@contextmanager
def _writes(path: UPath) -> Iterator[None]:
    with _answers(path):
        try:
            yield
        except FileNotFoundError as error:  # a store has no folders: it can only be the bucket
            raise DatasetError(f"{path}: {error}: make the bucket first, or use another location") from error


def list_folder(folder: UPath) -> list[str]:
    with _answers(folder):
        try:
            found = folder.fs.ls(folder.path, detail=False)
        except FileNotFoundError:
            return []
    parts = [name.rstrip("/").rpartition("/") for name in found]
    return sorted(name for parent, _, name in parts if parent == folder.path.rstrip("/"))  # not the folder itself


def walk(folder: UPath) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk``, with the parent relative to the folder."""
    top = folder.path.rstrip("/")
    with _answers(folder):
        for parent, folders, names in folder.fs.walk(top, on_error="raise"):
            names[:] = [name for name in names if name]  # a store may list the folder itself as ""
            yield parent[len(top) + 1 :], folders, names


def is_folder(path: UPath) -> bool:
    with _answers(path):
        return path.fs.isdir(path.path)


def exists(path: UPath) -> bool:
    with _answers(path):
        return path.fs.exists(path.path)


def read(path: UPath) -> bytes:
    with _answers(path):
        return path.fs.cat_file(path.path)


def read_range(path: UPath, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset``, or fewer where the file ends earlier."""
    with _answers(path):
        try:
            return path.fs.cat_file(path.path, start=offset, end=offset + length) if length else b""
        except FileNotFoundError:
            raise
        except OSError:
            if offset < path.fs.size(path.path):
                raise
            return b""  # a store refuses a range that lies behind the end


def open_read(path: UPath) -> BinaryIO:
    with _answers(path):
        file = path.fs.open(path.path, "rb", cache_type="readahead")
    return io.BufferedReader(file)  # reads lines of a limited length, as local files do


def version(path: UPath) -> tuple[str, int | None]:
    """A name of 32 hex digits that the file has while the store holds it unchanged, and its bytes if the store says."""
    with _answers(path):
        info = path.fs.info(path.path)
    tag = info.get("ETag") or info.get("etag") or info
    return xxhash.xxh3_128_hexdigest(f"{path} {tag}".encode()), info["size"]


def fetch(path: UPath, target: Path) -> None:
    with _answers(path):
        path.fs.get_file(path.path, str(target))


@contextmanager
def write_whole(path: UPath, final_name: Callable[[], str] | None) -> Iterator[BinaryIO]:
    with tempfile.TemporaryDirectory(prefix="wisesora-") as folder:
        spool = Path(folder) / path.name
        with open(spool, "xb") as file:
            yield file
        target = path.with_name(final_name()) if final_name else path
        with _writes(target):
            path.fs.put_file(str(spool), target.path)


def create_exclusive(path: UPath, data: bytes) -> bool:
    with _writes(path):
        try:
            path.fs.pipe_file(path.path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            answer = getattr(error.__cause__, "response", {})
            if answer.get("Error", {}).get("Code") != "PreconditionFailed":
                raise
            return False  # the store does not say which condition failed, where there was only one
    return True
