"""New captions for clips that are encoded: a JSON-lines file of ``{"key": …, "caption": …}``."""

from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.json
import xxhash

from shards import storage
from stages.errors import ConfigError

SCHEMA = pa.schema([("key", pa.large_string()), ("caption", pa.large_string())])


class Captions:
    """The caption of each key; of several lines with one key the last one counts.

    Some 200 bytes a line stay in memory. Raises ConfigError for a file that is absent or not of this form.
    """

    def __init__(self, path: str):
        self._path = path
        options = pyarrow.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore")
        try:
            with _open(path) as file:
                table = pyarrow.json.read_json(file, parse_options=options)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{path} is not JSON lines of key and caption: {error}") from None
        if table["key"].null_count or table["caption"].null_count:
            raise ConfigError(f'{path}: a line lacks one: expected {{"key": ..., "caption": ...}} on every line')
        self._keys, self._captions = table["key"].combine_chunks(), table["caption"].combine_chunks()
        hashes = np.fromiter((_hash(key.as_py()) for key in self._keys), np.uint64, len(table))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def require_any(self, keys: Iterable[str]) -> None:
        """Raises ConfigError where there are keys and the file has none of them: it calls its clips by other names."""
        key = None
        for key in keys:
            if self._row(key) is not None:
                return
        if key is not None:
            raise ConfigError(
                f"{self._path} has the caption of none of these clips: expected the dataset's keys, such as {key}"
            )

    def of_keys(self, keys: Iterable[str]) -> dict[str, str]:
        """The captions of those keys that the file has."""
        found = ((key, self._row(key)) for key in keys)
        return {key: self._captions[row].as_py() for key, row in found if row is not None}

    def _row(self, key: str) -> int | None:
        place = int(np.searchsorted(self._hashes, np.uint64(_hash(key)), side="right")) - 1
        row = int(self._order[place])
        return row if place >= 0 and self._keys[row].as_py() == key else None


def captions_hash(path: str) -> str:
    """xxh3_128 of the file."""
    with _open(path) as file:
        return storage.hash_of(file)


def _open(path: str) -> BinaryIO:
    try:
        return storage.open_read(path)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigError(f"no captions at {path!r} ({why}): set text_encoder.captions to a JSON-lines file") from None


def _hash(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode())
