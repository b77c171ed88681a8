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
from collections.abc import Mapping
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
_ALIGNMENT = 64  # of the memory that is read into, bytes
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


def record_members(column: str, shape: tuple[int, ...], length: int) -> list[str]:
    """The members of a record of ``length`` bytes whose arrays have this shape."""
    header, padding = _frame(shape)
    suffixes = [MEAN, STD] if column == LATENTS else [TEXT]
    return suffixes[: length // (_BLOCK + len(header) + 2 * math.prod(shape) + padding)]


def empty_members(shape: tuple[int, ...]) -> np.ndarray:
    """An array to read members into, float16, whose start is a multiple of 64 bytes: a kernel copies there faster."""
    memory = np.empty(2 * math.prod(shape) + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + 2 * math.prod(shape)].view(np.float16).reshape(shape)


class RecordBuffers:
    """What a record is read into: the payloads straight into arrays of the caller's, and the rest beside them.

    ``members`` are C-contiguous float16 arrays. ``buffers``, one after the other, take the record's ``length`` bytes.
    """

    def __init__(self, key: str, members: Mapping[str, np.ndarray]):
        self.key, self.length = key, 0
        self.buffers: list[bytearray | memoryview] = []
        self._headers: list[tuple[bytearray, bytes, bytes]] = []  # as read; as the tar's and the array's have to begin
        for suffix in sorted(members):
            array = members[suffix]
            assert array.dtype == np.float16 and array.flags.c_contiguous
            expected, padding = _frame(array.shape)
            header = bytearray(_BLOCK + len(expected))
            self._headers.append((header, f"{key}.{suffix}\0".encode(), expected))
            self.buffers += [header, array.data.cast("B") if array.size else bytearray(), bytearray(padding)]
            self.length += len(header) + array.nbytes + padding

    def checksum(self) -> int:
        """xxh3_64 of all that was read."""
        digest = xxhash.xxh3_64()
        for buffer in self.buffers:
            digest.update(buffer)
        return digest.intdigest()

    def check(self) -> None:
        """ValueError unless what was read is a record of these members."""
        for header, name, array in self._headers:
            if not header.startswith(name) or header[_BLOCK:] != array:
                raise ValueError(f"found a member {bytes(header[:100])!r}, expected {name.decode()!r} of this shape")


@functools.lru_cache(maxsize=4096)
def _frame(shape: tuple[int, ...]) -> tuple[bytes, int]:
    """The .npy header of a member of this shape, and the length of its padding."""
    buffer = io.BytesIO()
    about = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    header = buffer.getvalue()
    return header, -(len(header) + 2 * math.prod(shape)) % _BLOCK


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
