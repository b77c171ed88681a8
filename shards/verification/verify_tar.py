"""Checking one tar against what its commit says: one pass, one record in memory at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import xxhash

from shards import storage
from shards.schema import (
    CHECKSUM,
    KEY,
    LENGTH,
    OFFSET,
    SHAPE,
    TAR_TRAILER,
    Sample,
    attribute_fields,
    check_sample,
    decode_record,
    encode_record,
    main_shape,
)
from shards.verification.fault import Fault, Tally

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ExpectedTar:
    """What is known of a tar. ``hash_start`` is the start of its hash, as much as is known of that.

    ``rows`` are the written rows of its commit, and ``size_bytes`` its size; None where the commit and the index are
    damaged too. ``redo`` are the files that make the shard anew once they are away.
    """

    path: storage.Place
    column: str
    hash_start: str
    size_bytes: int | None
    rows: Sequence[dict[str, Any]] | None
    redo: tuple[storage.Place, ...]


def verify_tar(tar: ExpectedTar, tally: Tally) -> Iterator[Fault]:
    """Every fault of a tar: each damaged record by its key, then the trailer, the size and the hash."""
    try:
        with storage.open_read(tar.path) as file:
            yield from _Pass(tar, file, tally).faults()
    except FileNotFoundError:
        yield Fault(tar.path, "file", "nothing", "the tar that its commit names", tar.redo)
    except OSError as error:
        yield Fault(tar.path, "file", f"an error on reading ({error})", "a readable file", tar.redo)
    tally.files += 1
    tally.after_tar()


class _Pass:
    """One pass over a tar's bytes."""

    def __init__(self, tar: ExpectedTar, file: BinaryIO, tally: Tally):
        self._tar, self._file, self._tally = tar, file, tally
        self._position = 0
        self._digest = xxhash.xxh3_128()

    def faults(self) -> Iterator[Fault]:
        named = False
        for fault in self._located():
            named = True
            yield fault
        found = self._digest.hexdigest()
        if not named and self._tar.size_bytes not in (None, self._position):
            yield self._fault("size", f"{self._position} bytes", f"{self._tar.size_bytes}")
        elif not named and not found.startswith(self._tar.hash_start):
            yield self._fault("hash", found, self._tar.hash_start)

    def _located(self) -> Iterator[Fault]:
        """The faults of which it is known where in the file they are. Reads to the end of the file."""
        rows = self._tar.rows
        for number, row in enumerate(rows or ()):
            if row[OFFSET] != self._position:
                yield self._fault(row[KEY], f"byte {self._position}", f"byte {row[OFFSET]}, as its commit says")
            record = self._take(row[LENGTH])
            if len(record) < row[LENGTH]:
                cut = (
                    f"{len(record)} of its {row[LENGTH]} bytes, and none of the {len(rows or ()) - number - 1} after it"
                )
                yield self._fault(row[KEY], f"a cut file with {cut}", "the whole record")
                return
            self._tally.records += 1
            yield from self._record_faults(row, record)
        trailer = self._take(len(TAR_TRAILER)) if rows is not None else TAR_TRAILER
        if trailer != TAR_TRAILER:
            found = f"{len(trailer)} bytes, {sum(map(bool, trailer))} of them not zero"
            yield self._fault("trailer", found, f"{len(TAR_TRAILER)} zero bytes")
        end = self._position
        while self._take(_CHUNK_BYTES):
            pass
        if rows is not None and self._position > end:
            yield self._fault("trailer", f"{self._position - end} bytes after it", "the end of the file")

    def _take(self, length: int) -> bytes:
        data = self._file.read(length)
        self._digest.update(data)
        self._position += len(data)
        self._tally.tar_bytes += len(data)
        return data

    def _record_faults(self, row: dict[str, Any], record: bytes) -> Iterator[Fault]:
        checksum = xxhash.xxh3_64_intdigest(record)
        if checksum != row[CHECKSUM]:
            yield self._fault(row[KEY], f"checksum {checksum:016x}", f"{row[CHECKSUM]:016x}")
            return
        try:
            _check_record(self._tar.column, row, record)
        except ValueError as error:
            yield self._fault(row[KEY], f"the bytes that were written, but {error}", "a record of the format")

    def _fault(self, part: str, found: str, expected: str) -> Fault:
        return Fault(self._tar.path, part, found, expected, self._tar.redo)


def _check_record(column: str, row: dict[str, Any], record: bytes) -> None:
    """ValueError unless this is the record that the writer makes of a sample with the row's key and attributes."""
    attributes = {field.name: row[field.name] for field in attribute_fields(column)}
    sample = Sample(row[KEY], decode_record(record), attributes)
    check_sample(column, sample)
    if list(main_shape(sample)) != row[SHAPE]:
        raise ValueError(f"of shape {list(main_shape(sample))} where the commit says {row[SHAPE]}")
    if encode_record(sample) != record:
        raise ValueError("with members of other names, or laid out in another way")
    if not all(np.isfinite(array).all() for array in sample.members.values()):
        raise ValueError("with values that are not finite")
