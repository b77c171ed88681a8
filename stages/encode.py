"""Videos and captions to latent shards: plan, then each column in turn on Ray, then the index.

A column is built by workers that hold one frozen model. A text shard is built from its committed latent shard,
so that both hold the same keys in the same order.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from models.text import TextEncoder
from models.vae import FrozenVAE
from shards.dataset import compact, create_dataset, ensure_fingerprint, write_null_text
from shards.schema import CAPTION_HASH, KEY, LATENTS, MEAN, SCHEMA_VERSION, STD, TEXT, TOKENS, Bucket, Reject, Sample, text_column
from shards.writer import Commit, commit_path, committed_numbers, read_commit, write_shard
from stages.errors import DecodeError, WorkError
from stages.execute import Decode, RuntimeConfig, ShardReport, Worker, run_shards
from stages.plan import PlannedClip, ShardPlan


@dataclass(frozen=True)
class VaeConfig:
    """How latents are made. batch_frames is part of every latent's fingerprint: see `models.vae`."""

    batch_frames: int = 8
    store_std: bool = False
