"""The text column: captions through the text encoder.

A text shard is built from its committed latent shard, so that both hold the same keys in the same order. The worker
is a plain object and knows nothing of Ray.
"""

import platform
import time
from collections.abc import Container
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import xxhash

from models.compute import PRECISIONS, default_device
from models.identity import clean_caption
from models.text import TextEncoder
from shards import storage
from shards.dataset import require_equal, write_null_text
from shards.errors import ShardError
from shards.schema import CAPTION, CAPTION_HASH, KEY, LATENTS, TEXT, TOKENS, Bucket, Sample
from shards.writer import commit_path, read_commit, read_samples, write_shard
from stages.captions import Captions
from stages.columns import Decoded, ShardReport, Target, TextConfig, statuses_of
from stages.errors import WorkError
from stages.planning.plan_table import ShardPlan

RECENT_CAPTIONS = 1024
"""Embeddings that a worker keeps, so that captions which come again are encoded once; some 100 MB of T5-XXL's."""


def load_text_encoder(config: TextConfig) -> TextEncoder:
    """The text encoder on this process's device, computing as its settings say."""
    return TextEncoder.load(
        config.name, default_device(), PRECISIONS[config.precision], config.max_tokens, config.batch_tokens
    )


class TextWorker:
    """Builds text shards: the captions of a committed latent shard through the text encoder.

    reuse: text columns of each bucket that the same encoder made; a caption that one of them has is not encoded again.
    """

    def __init__(
        self,
        config: TextConfig,
        identity: dict[str, Any],
        target: Target,
        reuse: dict[Bucket, list[str]],
        threads: int,
    ):
        torch.set_num_threads(threads)
        self._encoder = load_text_encoder(config)
        here = f"{config.name} on {platform.node()}"
        require_equal(self._encoder.identity, identity, f"{here} is another encoder", "put the same there")
        self._target = target
        self._reuse = reuse
        self._recent: dict[str, np.ndarray] = {}
        self._captions = Captions(config.captions) if config.captions else None
        write_null_text(target.dataset, target.column, self._encoder.encode([""])[0])

    def make_shard(self, plan: ShardPlan, decoded: Decoded) -> ShardReport:
        """Encode, write and commit one shard; ``decoded`` is not asked."""
        latents = read_commit(commit_path(self._target.dataset / plan.bucket.name / LATENTS, plan.number)).written
        own = dict(zip(latents[KEY].to_pylist(), latents[CAPTION].to_pylist(), strict=True))
        captions = own | (self._captions.of_keys(own) if self._captions else {})
        wanted = {_caption_hash(caption): caption for caption in sorted(captions.values())}
        reused = self._made_before(plan, wanted) | {name: self._recent[name] for name in wanted if name in self._recent}
        left = [caption for name, caption in wanted.items() if name not in reused]
        started = time.perf_counter()
        encoded = self._encoder.encode(left)
        busy_s = time.perf_counter() - started
        embeddings = reused | {_caption_hash(caption): text for caption, text in zip(left, encoded, strict=True)}
        self._recent = dict([*self._recent.items(), *embeddings.items()][-RECENT_CAPTIONS:])
        commit = write_shard(
            self._target.folder(plan.bucket),
            plan.number,
            (_text_sample(key, captions[key], own[key], embeddings) for key in own),
            fingerprint_hash=self._target.fingerprints[plan.bucket],
        )
        return ShardReport(
            plan.bucket.name,
            plan.number,
            statuses_of(commit),
            replaced=sum(captions[key] != own[key] for key in own),
            reused=len(reused),
            busy_s=busy_s,
        )

    def _made_before(self, plan: ShardPlan, wanted: Container[str]) -> dict[str, np.ndarray]:
        """Caption hash -> [L, D] float16, of those that another column has."""
        found = {}
        for column in self._reuse.get(plan.bucket, []):
            folder = self._target.dataset / plan.bucket.name / column
            if not storage.exists(commit_path(folder, plan.number)):
                continue
            with suppress(ShardError, FileNotFoundError):  # what is damaged there is encoded here
                for row, members in read_samples(folder, read_commit(commit_path(folder, plan.number))):
                    if row[CAPTION_HASH] in wanted:
                        found[row[CAPTION_HASH]] = members[TEXT]
        return found


def _text_sample(key: str, caption: str, own: str, embeddings: dict[str, np.ndarray]) -> Sample:
    text = embeddings[_caption_hash(caption)]
    if not np.isfinite(text).all():
        raise WorkError(f"no finite float16 embedding of {caption!r}: set text_encoder.precision=fp32")
    new = None if caption == own else caption
    return Sample(key, {TEXT: text}, {TOKENS: len(text), CAPTION_HASH: _caption_hash(caption), CAPTION: new})


def _caption_hash(caption: str) -> str:
    """Equal for captions that the text encoder sees as equal."""
    return xxhash.xxh3_64_hexdigest(clean_caption(caption).encode())
