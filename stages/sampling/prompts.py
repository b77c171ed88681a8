"""Prompts as the user gives them, and as names of files."""

import re
from collections.abc import Sequence
from pathlib import Path

from stages.errors import ConfigError


def read_prompts(source: str | Sequence[str]) -> list[str]:
    """The prompts that ``text_prompt`` names. Raises ConfigError when there are none."""
    if isinstance(source, str):
        file = Path(source)
        is_file = source.endswith(".txt") or (len(source) < 256 and file.is_file())
        if is_file and not file.is_file():
            raise ConfigError(f"no prompt file at {file}: give text_prompt= a file of prompts or a prompt")
        source = _lines(file) if is_file else [source]
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
    """A prompt as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
