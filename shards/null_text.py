"""The file of a text column's null text: the embedding of the empty caption, its mask, and a checksum of both."""

import json

import numpy as np
import safetensors
import safetensors.numpy
import xxhash

from shards import storage

_EMBEDDING, _MASK, _CHECKSUM = "embedding", "mask", "xxh3_128"


def null_text_path(root: storage.Place, column: str) -> storage.Place:
    """Where a dataset has the null text of a column."""
    return root / f"null.{column}.safetensors"


def null_text_bytes(embedding: np.ndarray) -> bytes:
    """The file of an embedding, [L, D] float16 with L >= 1. Equal embeddings give equal bytes."""
    if embedding.dtype != np.float16 or embedding.ndim != 2 or not len(embedding):
        raise ValueError(f"found {embedding.dtype} {embedding.shape}, expected float16 [L, D] with L >= 1")
    tensors = {_EMBEDDING: np.ascontiguousarray(embedding), _MASK: np.ones(len(embedding), bool)}
    return safetensors.numpy.save(tensors, {_CHECKSUM: _checksum(tensors)})


def parse_null_text(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The embedding and the mask; ValueError for anything that ``null_text_bytes`` has not made."""
    try:
        tensors = safetensors.numpy.load(data)
        embedding, mask = tensors[_EMBEDDING], tensors[_MASK]
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"is not a null text: {error!r}") from error
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
    if safetensors.numpy.save({_EMBEDDING: embedding, _MASK: mask}, metadata) != data:
        raise ValueError("is not laid out as it was written")
    if embedding.dtype != np.float16 or mask.dtype != bool or mask.shape != embedding.shape[:1] or not mask.all():
        raise ValueError(f"holds {embedding.dtype} {embedding.shape} with a mask {mask.dtype} {mask.shape}")
    if not np.isfinite(embedding).all():
        raise ValueError("holds values that are not finite")
    checksum = _checksum({_EMBEDDING: embedding, _MASK: mask})
    if metadata != {_CHECKSUM: checksum}:
        raise ValueError(f"has the checksum {checksum} where it says {metadata}")
    return embedding, mask


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    return xxhash.xxh3_128_hexdigest(tensors[_EMBEDDING].tobytes() + tensors[_MASK].tobytes())
