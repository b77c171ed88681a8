"""A source file, at a path or URL, as the local file that decoders read."""

from collections.abc import Iterator
from contextlib import contextmanager

from shards import storage
from shards.errors import DatasetError
from stages.errors import DecodeError


@contextmanager
def source_file(path: str) -> Iterator[str]:
    """The path of a local file: itself, or a copy of what is at a URL, for the block.

    Raises DecodeError: missing_file, or io_error for a store that does not answer.
    """
    try:
        with storage.local_copy(storage.place(path)) as local:
            yield str(local)
    except FileNotFoundError:
        raise DecodeError("missing_file", "there is no such file") from None
    except DatasetError as error:
        raise DecodeError("io_error", str(error)) from None
