"""Prompts as the user gives them, and as names of files."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from stages.errors import ConfigError

SLUG_BYTES = 60


def read_prompts(source: str | Sequence[str]) -> list[str]:
    """The prompts that ``text_prompt`` names. Raises ConfigError when there are none."""
    if isinstance(source, str):
        is_file = os.path.isfile(source)  # False for what no file could be named, unlike Path's
        if source.endswith(".txt") and not is_file:
            raise ConfigError(f"no prompt file at {source}: give text_prompt= a file of prompts, or --prompt a prompt")
        source = _lines(Path(source)) if is_file else [source]
    prompts = [text.strip() for text in source if text.strip()]
    if not prompts:
        raise ConfigError(
            'no prompts: give --prompt "a red ball moves left", text_prompt= a list or a file of them, '
            "or latents= a file of a run's samples folder"
        )
    return prompts


def one_each(name: str, source: str | Sequence[str], count: int) -> list[str]:
    """A setting of each of ``count`` prompts, empty where there is none. Raises ConfigError for another number."""
    texts = [source] * count if isinstance(source, str) else list(source)
    if len(texts) != count:
        raise ConfigError(f"{name}: found {len(texts)} for {count} prompts, expected one or as many")
    return [text.strip() for text in texts]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text ({error}): save it as UTF-8") from None


def slug(prompt: str) -> str:
    """A prompt as a part of a file name: its letters and digits, of any script."""
    name = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return name.encode()[:SLUG_BYTES].decode(errors="ignore").strip("-") or "empty"
