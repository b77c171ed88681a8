"""A source file, at a path or URL, as the local file that decoders read."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from shards import storage
from shards.cache import FileCache
from shards.errors import DatasetError, StoreError
from stages.errors import DecodeError

CACHE_BYTES = 4_000_000_000
"""Of the copies that all processes of a node share, in its folder for temporary files: of a long video several clips
are taken, and several processes take them.
"""


@contextmanager
def source_file(path: str) -> Iterator[str]:
    """The path of a local file: itself, or a copy of what is at a URL, for the block.

    Raises DecodeError: missing_file, or io_error for a store that does not answer.
    """
    try:
        with _local(storage.place(path)) as local:
            yield str(local)
    except FileNotFoundError:
        raise DecodeError("missing_file", "there is no such file") from None
    except (DatasetError, StoreError) as error:
        raise DecodeError("io_error", str(error)) from None


def _local(path: storage.Place) -> AbstractContextManager[Path]:
    if isinstance(path, Path):
        return nullcontext(path)
    return FileCache(Path(tempfile.gettempdir()) / f"wisesora-{os.getuid()}", CACHE_BYTES).copy_of(path)
