"""The frozen text encoder: captions to T5 embeddings, through transformers.

Shapes: B captions in a batch, L tokens, D width of the encoder.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from models.errors import WeightsError
from models.identity import clean_caption, text_encoder_identity
from models.source import resolve_model
from models.text_lengths import LENGTHS, padded_length


class TextEncoder:
    """A T5 encoder that never learns and whose answer for a caption depends on that caption alone.

    Captions run sorted by length: padded to one of LENGTHS, with the real attention mask, in batches of exactly as
    many as make ``batch_tokens`` there, so that short ones come in larger batches. A batch that is not full is filled
    up with empty captions, whose results are dropped. The empty caption is the null text: its embedding is that of
    the end-of-sequence token alone.

    ``identity`` is what a dataset records of it: see `models.identity`.
    """

    def __init__(
        self,
        model: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        identity: dict[str, Any],
        batch_tokens: int,
    ):
        if batch_tokens < LENGTHS[-1]:
            raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least {LENGTHS[-1]}, the longest caption")
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self.max_tokens: int = identity["max_tokens"]
        self.batch_tokens = batch_tokens
        self.identity = identity

    @classmethod
    def load(
        cls,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_tokens: int = 120,
        batch_tokens: int = LENGTHS[-1],
    ) -> "TextEncoder":
        """Load ``tiny``, a folder or a hub id; WeightsError when encoder or tokenizer is absent or not T5's."""
        folder, tokenizer_folder = resolve_model(name, "text_encoder"), resolve_model(name, "tokenizer")
        tokenizer = _load_tokenizer(tokenizer_folder)
        model = _load_model(folder, dtype).to(device)
        if len(tokenizer) > model.config.vocab_size:
            raise WeightsError(
                f"the tokenizer in {tokenizer_folder} has {len(tokenizer)} pieces; "
                f"the encoder in {folder} has {model.config.vocab_size}: they do not belong together"
            )
        return cls(model, tokenizer, text_encoder_identity(name, max_tokens), batch_tokens)

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """Embed each caption, cleaned, at its true length.

        Returns:
            One float16 [L, D] a caption; L counts the end-of-sequence token and is at most ``max_tokens``. An overflow
            of float16 stays infinite, so that the caller can find and reject it.
        """
        tokens = self._tokenize(captions)
        embeddings: list[np.ndarray] = [np.empty(0)] * len(captions)
        for length in LENGTHS:
            members = [i for i, ids in enumerate(tokens) if padded_length(len(ids)) == length]
            batch_captions = self.batch_tokens // length
            for start in range(0, len(members), batch_captions):
                batch = members[start : start + batch_captions]
                for i, embedding in zip(batch, self._run([tokens[i] for i in batch], length), strict=True):
                    embeddings[i] = embedding
        return embeddings

    def too_long(self, captions: list[str]) -> list[str]:
        """Those of which ``encode`` leaves out the end."""
        tokens = self._tokenizer([clean_caption(caption) for caption in captions], verbose=False)["input_ids"]
        return [caption for caption, ids in zip(captions, tokens, strict=True) if len(ids) > self.max_tokens]

    def _tokenize(self, captions: list[str]) -> list[list[int]]:
        """Token ids of cleaned captions, the last of each the end of sequence, also when the caption is cut."""
        cleaned = [clean_caption(caption) for caption in captions]
        return self._tokenizer(cleaned, truncation=True, max_length=self.max_tokens)["input_ids"] if cleaned else []

    @torch.inference_mode()
    def _run(self, tokens: list[list[int]], length: int) -> list[np.ndarray]:
        """Embeddings of one batch of token ids, at one of LENGTHS."""
        rows = [*tokens, *self._tokenize([""]) * (self.batch_tokens // length - len(tokens))]
        ids = torch.full((len(rows), length), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, row_tokens in enumerate(rows):
            ids[row, : len(row_tokens)] = torch.tensor(row_tokens)
            mask[row, : len(row_tokens)] = 1
        device = self._model.device
        hidden = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state  # [B, L, D]
        halves = hidden.to("cpu", torch.float16).numpy()
        return [halves[row, : len(row_tokens)].copy() for row, row_tokens in enumerate(tokens)]


def text_encoder_parameters(name: str) -> int:
    """How many numbers its weights are, found without loading them."""
    config = AutoConfig.from_pretrained(resolve_model(name, "text_encoder"), local_files_only=True)
    with torch.device("meta"):
        return T5EncoderModel(config).num_parameters()


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} could not be loaded as a tokenizer: {error}") from error
    if (
        tokenizer.pad_token_id is None
        or tokenizer.eos_token_id is None
        or tokenizer("")["input_ids"] != [tokenizer.eos_token_id]
    ):
        raise WeightsError(f"{folder} holds a {type(tokenizer).__name__}; expected T5's, which ends texts with </s>")
    return tokenizer


def _load_model(folder: Path, dtype: torch.dtype) -> T5EncoderModel:
    try:
        model, report = T5EncoderModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{folder} could not be loaded as a T5EncoderModel: {error}") from error
    if report["missing_keys"]:
        raise WeightsError(f"{folder}: weights of the encoder are missing: {sorted(report['missing_keys'])[:3]}")
    return model
