"""The format: buckets, columns, keys, records and tables. Nobody else spells a member or a field.

A dataset is folders of plain WebDataset tars. A *bucket* holds the clips of one size; a *column* holds one
kind of data for each of them (``latents``, ``text.NAME``). The *record* of a sample in a column is the run of
tar blocks that holds its members: header, payload and padding of each, in the order of their names.
"""

import functools
import io
import json
import math
import re
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shards.errors import DatasetError

SCHEMA_VERSION = 1

LATENTS = "latents"
TEXT_PREFIX = "text."
MEAN, STD, TEXT = "mean.npy", "std.npy", "text.npy"  # a member is KEY.mean.npy, ...

KEY, STATUS, MESSAGE, SHARD = "key", "status", "message", "shard"
OFFSET, LENGTH, CHECKSUM, SHAPE = "offset", "length", "checksum", "shape"
SPLIT = "split"  # known to filters alone (see ``bucket_index``)
TOKENS, CAPTION, CAPTION_HASH = "tokens", "caption", "caption_hash"
WRITTEN = "written"  # the status of a clip that has a record; any other status is the reason of its reject

_LOCATION = [  # where a record is; null for a reject
    pa.field(OFFSET, pa.int64()),
    pa.field(LENGTH, pa.int64()),
    pa.field(CHECKSUM, pa.uint64()),  # xxh3_64 of the record
    pa.field(SHAPE, pa.list_(pa.int32())),  # of the latents' mean, or of the text
]
_LATENTS_ATTRIBUTES = [
    pa.field("duration_s", pa.float64()),
    pa.field(CAPTION, pa.string()),
    pa.field("source", pa.string()),
    pa.field("start_s", pa.float64()),
    pa.field("aesthetic", pa.float64()),  # null where the metadata has none
    pa.field("umt", pa.float64()),
    pa.field("matching_score", pa.float64()),
    pa.field("desirable_filtering", pa.string()),
    pa.field("latent_motion", pa.float64()),  # mean |z[t+1] - z[t]| over the spatial standard deviation
]
_TEXT_ATTRIBUTES = [
    pa.field(TOKENS, pa.int32()),
    pa.field(CAPTION_HASH, pa.string()),
    pa.field(CAPTION, pa.string()),  # null where it is the clip's own
]

_BLOCK = 512  # of a tar, bytes
_NPY_HEADER = 128  # bytes; numpy pads it so far for any shape of ours
_NPY_VERSION = (1, 0)
TAR_TRAILER = bytes(2 * _BLOCK)


@dataclass(frozen=True, order=True)
class Bucket:
    """The size of a clip's frames (pixels) and their number; one size of tensor in a batch."""

    height: int
    width: int
    frames: int

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        """The bucket of a name such as ``64x64x8``; DatasetError for any other text."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", name, re.ASCII)
        if not match:
            raise DatasetError(f"{name!r} is not a bucket: expected HEIGHTxWIDTHxFRAMES, such as 256x256x56")
        return cls(*map(int, match.groups()))


@dataclass(frozen=True)
class Sample:
    """What one column stores of one clip.

    ``members`` maps a suffix to a float16 array: MEAN and optionally STD, [T, C, h, w], in ``latents``; TEXT,
    [L, D] with L the true number of tokens, in a text column. ``attributes`` are those of the column's table.
    """

    key: str
    members: dict[str, np.ndarray]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Reject:
    """A planned clip that got no record: a short name to count by, and the story for a person."""

    key: str
    reason: str
    message: str


def text_column(name: str) -> str:
    """The column of the text embeddings called ``name``: ``t5`` -> ``text.t5``."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise DatasetError(f"{name!r} cannot name a text column: use letters, digits, '_' and '-' only")
    return TEXT_PREFIX + name


def make_key(prefix: str, *identity: str | int) -> str:
    """A key that WebDataset cannot split: the readable start of ``prefix`` and a hash of everything given.

    Stock WebDataset ends a key at its first dot, so that InternVid's ``ID_00:00:01.500_00:00:03.000`` would
    merge all clips that start in one second into one sample. Keys are [A-Za-z0-9_-]+, at most 49 characters.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", prefix)[:32]
    return f"{readable}_{xxhash.xxh3_64_hexdigest(json.dumps([prefix, *identity]).encode())}"


def attribute_fields(column: str) -> list[pa.Field]:
    """What a column knows of a clip beside its record."""
    return _LATENTS_ATTRIBUTES if column == LATENTS else _TEXT_ATTRIBUTES


def commit_schema(column: str) -> pa.Schema:
    """The table of a commit: one row a planned clip, sorted by key."""
    row = [pa.field(KEY, pa.string()), pa.field(STATUS, pa.string()), pa.field(MESSAGE, pa.string())]
    return pa.schema(row + _LOCATION + attribute_fields(column))


def index_field(column: str, field: str) -> str:
    """The name in the index of a column's field: the clip's own attributes are plain, the others prefixed."""
    plain = column == LATENTS and any(field == attribute.name for attribute in _LATENTS_ATTRIBUTES)
    return field if plain else f"{column}.{field}"


def index_schema(columns: list[str]) -> pa.Schema:
    """The table of a bucket's index: one row a sample, ordered by shard and key."""
    fields = [pa.field(KEY, pa.string()), pa.field(SHARD, pa.int32())]
    for column in columns:
        own = _LOCATION + attribute_fields(column)
        fields += [field.with_name(index_field(column, field.name)) for field in own]
    return pa.schema(fields)


def main_shape(sample: Sample) -> tuple[int, ...]:
    """The shape that the tables show for a sample: of its latents' mean, or of its text."""
    return sample.members[MEAN if MEAN in sample.members else TEXT].shape


def check_sample(column: str, sample: Sample) -> None:
    """Refuses, with a ValueError, a sample that the column cannot hold."""
    allowed, needed, axes = ({MEAN, STD}, MEAN, 4) if column == LATENTS else ({TEXT}, TEXT, 2)
    found = set(sample.members)
    if needed not in found or not found <= allowed:
        raise ValueError(f"{sample.key}: found members {sorted(found)}, {column} holds {sorted(allowed)}")
    for suffix, array in sample.members.items():
        if array.dtype != np.float16 or array.shape != main_shape(sample) or array.ndim != axes:
            raise ValueError(
                f"{sample.key}.{suffix}: found {array.dtype} {array.shape}, expected float16 with {axes} axes"
            )
    names = {field.name for field in attribute_fields(column)}
    if sample.attributes.keys() != names:
        raise ValueError(f"{sample.key}: found attributes {sorted(sample.attributes)}, not {sorted(names)}")
    if TOKENS in names and sample.attributes[TOKENS] != main_shape(sample)[0]:
        raise ValueError(f"{sample.key}: {sample.attributes[TOKENS]} tokens, text of {main_shape(sample)}")


def encode_record(sample: Sample) -> bytes:
    """The tar blocks of one sample. Equal samples give equal bytes: no time, owner or order gets in."""
    parts = []
    for suffix in sorted(sample.members):
        buffer = io.BytesIO()
        array = np.ascontiguousarray(sample.members[suffix], dtype="<f2")
        np.lib.format.write_array(buffer, array, version=_NPY_VERSION, allow_pickle=False)
        info = tarfile.TarInfo(f"{sample.key}.{suffix}")  # mtime 0, mode 0644, no owner
        info.size = buffer.tell()
        parts += [info.tobuf(tarfile.USTAR_FORMAT), buffer.getvalue(), bytes(-info.size % _BLOCK)]
    return b"".join(parts)


@dataclass(frozen=True)
class RecordLayout:
    """Where the members are in the bytes of a record; one for all records whose arrays have this shape."""

    suffixes: tuple[str, ...]
    shape: tuple[int, ...]

    @functools.cached_property
    def length(self) -> int:
        """The bytes of the whole record."""
        return len(self.suffixes) * self._member_length

    def members(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Suffix -> [b, *shape] float16, views of records in the rows of an array [b, at least length] uint8."""
        starts = [number * self._member_length + _BLOCK + _NPY_HEADER for number in range(len(self.suffixes))]
        payloads = [records[:, start : start + 2 * math.prod(self.shape)] for start in starts]
        return {
            suffix: payload.view("<f2").reshape(len(records), *self.shape)
            for suffix, payload in zip(self.suffixes, payloads, strict=True)
        }

    def check(self, key: str, record: memoryview) -> None:
        """ValueError unless these bytes are the record of a key."""
        for number, suffix in enumerate(self.suffixes):
            start = number * self._member_length
            headers = bytes(record[start : start + _BLOCK + _NPY_HEADER])
            name = f"{key}.{suffix}"
            if not headers.startswith(f"{name}\0".encode()) or not headers.endswith(self._npy_header):
                raise ValueError(f"found a member {headers[:100]!r}, expected {name!r} of this shape")

    @functools.cached_property
    def _npy_header(self) -> bytes:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": self.shape})
        assert buffer.tell() == _NPY_HEADER
        return buffer.getvalue()

    @functools.cached_property
    def _member_length(self) -> int:
        """Of the tar's header, the .npy file and the padding after it."""
        return _BLOCK + math.ceil((_NPY_HEADER + 2 * math.prod(self.shape)) / _BLOCK) * _BLOCK


@functools.lru_cache(maxsize=4096)
def record_layout(column: str, shape: tuple[int, ...], length: int = 0) -> RecordLayout:
    """The layout of a column's records whose arrays have this shape; of ``length`` bytes if that can be."""
    if column != LATENTS:
        return RecordLayout((TEXT,), shape)
    with_std = RecordLayout((MEAN, STD), shape)
    return with_std if with_std.length == length else RecordLayout((MEAN,), shape)


def decode_record(record: bytes) -> dict[str, np.ndarray]:
    """Member suffix -> read-only array over ``record``, not copied; ValueError if it is no record of ours."""
    members: dict[str, np.ndarray] = {}
    stream, position = io.BytesIO(record), 0
    while position < len(record):
        try:
            info = tarfile.TarInfo.frombuf(record[position : position + _BLOCK], "ascii", "strict")
        except tarfile.HeaderError as error:
            raise ValueError(f"not a tar header at byte {position}: {error}") from error
        stream.seek(position + _BLOCK)
        if np.lib.format.read_magic(stream) != _NPY_VERSION:
            raise ValueError(f"{info.name} is not an .npy file of version 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        array = np.frombuffer(record, dtype, math.prod(shape), stream.tell())  # refuses pickled objects
        members[info.name.partition(".")[2]] = array.reshape(shape)
        position += _BLOCK + info.size + -info.size % _BLOCK
    return members
