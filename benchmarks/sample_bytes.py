"""How many bytes a clip takes on the disk, against PixArt-α's layout.

    python -m benchmarks.sample_bytes TOKENIZER CAPTIONS [CAPTIONS ...]

TOKENIZER is a folder or hub id of T5's tokenizer. CAPTIONS are real captions: InternVid's JSON lines, or a text file
with one caption a line. Prints a table, writes outputs/benchmarks/sample_bytes.json; about 1 minute.

Shards are written by the project's own writer (headers, padding, commits and all), with T5-XXL's width and each
caption's own number of tokens; the values are random, which no byte depends on. PixArt-α saves T5's output in
float32 padded to 120 tokens, and the VAE's mean and deviation in float32; only their payload is counted.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.table import Row, report
from models.identity import clean_caption
from shards.schema import MEAN, TEXT, Sample, attribute_fields
from shards.writer import write_shard

WIDTH, MAX_TOKENS = 4096, 120  # of T5-XXL; PixArt-α's limit
LATENTS_SHAPE = (56, 4, 32, 32)  # [T, C, h, w] of a 256x256x56 clip
SHARD_CLIPS = 256

PIXART_TEXT = MAX_TOKENS * WIDTH * 4
PIXART_LATENTS = 2 * int(np.prod(LATENTS_SHAPE)) * 4


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        latents = _shard_bytes(Path(folder) / "latents", ({MEAN: _random(*LATENTS_SHAPE)} for _ in range(SHARD_CLIPS)))
        rows = [Row("latents of a 256x256x56 clip", latents / 1e3, "kB", "PixArt-α", latents / PIXART_LATENTS)]
        for path in map(Path, sys.argv[2:]):
            lengths = [_tokens(tokenizer, caption) for caption in _captions(path)]
            chosen = np.random.default_rng(0).choice(lengths, SHARD_CLIPS)
            scale = np.mean(lengths) / np.mean(chosen)  # of all captions, from a shard's worth of them
            text = scale * _shard_bytes(Path(folder) / f"text.{path.stem}", ({TEXT: _random(n, WIDTH)} for n in chosen))
            rows += _rows(f"{path.name}, {len(lengths)} captions", float(np.mean(lengths)), text, latents)
    report("sample_bytes", rows, ("transformers", "numpy"))


def _rows(name: str, tokens: float, text: float, latents: float) -> list[Row]:
    whole = PIXART_TEXT + PIXART_LATENTS
    return [
        Row(f"{name}: mean tokens", tokens, ""),
        Row(f"{name}: text", text / 1e3, "kB", "PixArt-α", text / PIXART_TEXT, "<= 1/9", bool(text <= PIXART_TEXT / 9)),
        Row(
            f"{name}: text and latents", (text + latents) / 1e3, "kB", "PixArt-α", (text + latents) / whole,
            "<= 1/5.5", bool(text + latents <= whole / 5.5),
        ),
    ]  # fmt: skip


def _captions(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if path.suffix == ".jsonl":
            try:
                yield json.loads(line)["Caption"] or ""
            except (ValueError, KeyError):
                continue  # InternVid's files have broken lines
        else:
            yield line


def _tokens(tokenizer: Any, caption: str) -> int:
    return len(tokenizer(clean_caption(caption), truncation=True, max_length=MAX_TOKENS)["input_ids"])


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def _shard_bytes(folder: Path, members: Iterator[dict[str, np.ndarray]]) -> float:
    """Mean bytes a clip of a whole shard: the tar and its commit."""
    attributes: dict[str, Any] = dict.fromkeys((field.name for field in attribute_fields(folder.name)), None)
    samples = []
    for number, arrays in enumerate(members):
        own = attributes | ({"tokens": len(arrays[TEXT])} if TEXT in arrays else {})
        samples.append(Sample(f"clip_{number:016x}", arrays, own))
    write_shard(folder, 0, samples, fingerprint_hash="")
    return sum(path.stat().st_size for path in folder.iterdir()) / len(samples)


if __name__ == "__main__":
    main()
