"""Where weights come from: the embedded tiny models, a local folder, or the model hub; and their hash."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import huggingface_hub
import xxhash

from models.errors import WeightsError

Part = Literal["vae", "text_encoder", "tokenizer", "transformer"]

TINY_FOLDER = Path(__file__).parent / "tiny"
CONFIG_NAME = "config.json"
TOKENIZER_MODELS = ("spiece.model", "tokenizer.json")
TOKENIZER_FILES = (*TOKENIZER_MODELS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_READ_BYTES = 1 << 24


def resolve_model(name_or_path: str, part: Part) -> Path:
    """Find the folder that holds one part of a pretrained model.

    Args:
        name_or_path: ``tiny`` for the embedded models, a local folder, or a hub id (``owner/name``), which is
            downloaded to the hub's cache. A folder or repository may hold the part itself, or be of diffusers' layout
            with the part in a subfolder of its name.
        part: ``vae``, ``text_encoder``, ``tokenizer`` or ``transformer``.

    Raises:
        WeightsError: there is no such folder, it does not hold the part, or the hub could not deliver it.
    """
    folder = TINY_FOLDER if name_or_path == "tiny" else Path(name_or_path).expanduser()
    if folder.is_dir():
        return _part_of(folder, part)
    if folder.exists() or not is_hub_id(name_or_path):
        raise WeightsError(f"{name_or_path} is not a folder; expected 'tiny', a folder with the {part}, or a hub id")
    return _part_of(_download(name_or_path, part), part)


def is_hub_id(name: str) -> bool:
    """Whether the model hub could know a repository by this name."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def weight_files(folder: Path) -> list[Path]:
    """The files that ``from_pretrained`` reads weights from: safetensors, or else PyTorch's .bin files; sorted."""
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(path for path in folder.glob(pattern) if ".fp16." not in path.name)
        if found:
            return found
    return []


def weights_hash(folder: Path) -> str:
    """xxh3_128 over the names and bytes of a model's config and weight files, 32 hex digits.

    Raises:
        WeightsError: the folder holds no config or no weights.
    """
    weights = weight_files(folder)
    if not weights or not (folder / CONFIG_NAME).is_file():
        raise WeightsError(f"{folder} holds no model; expected {CONFIG_NAME} and .safetensors (or .bin) weights")
    return hash_files([folder / CONFIG_NAME, *weights])


def tokenizer_hash(folder: Path) -> str:
    """xxh3_128 over the names and bytes of a tokenizer's files, 32 hex digits."""
    return hash_files([folder / name for name in TOKENIZER_FILES if (folder / name).is_file()])


def hash_files(paths: Sequence[Path]) -> str:
    """xxh3_128 over each file's name, length and bytes, in the order given."""
    total = xxhash.xxh3_128()
    for path in paths:
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                total.update(block)
    return total.hexdigest()


def _part_of(folder: Path, part: Part) -> Path:
    for candidate in (folder / part, folder):
        if _holds(candidate, part):
            return candidate
    needed = " or ".join(TOKENIZER_MODELS) if part == "tokenizer" else f"{CONFIG_NAME} and weights"
    raise WeightsError(f"{folder} holds no {part}: expected {needed} there or in its subfolder {part}/")


def _holds(folder: Path, part: Part) -> bool:
    if part == "tokenizer":
        return any((folder / name).is_file() for name in TOKENIZER_MODELS)
    return (folder / CONFIG_NAME).is_file() and bool(weight_files(folder))


def _download(hub_id: str, part: Part) -> Path:
    """Fetch the part's subfolder, or else the repository's own top level; .bin weights only where there is no other."""
    tables = ["*.json", "*.model"]
    kinds = [tables] if part == "tokenizer" else [[*tables, "*.safetensors"], [*tables, "*.bin"]]
    for patterns in kinds:
        for allowed, ignored in (([f"{part}/{p}" for p in patterns], []), (patterns, ["*/*"])):
            folder = _snapshot(hub_id, allowed, [*ignored, "*.fp16.*"])
            if _holds(folder / part, part) or _holds(folder, part):
                return folder
    return folder


def _snapshot(hub_id: str, allowed: list[str], ignored: list[str]) -> Path:
    try:
        path = huggingface_hub.snapshot_download(hub_id, allow_patterns=allowed, ignore_patterns=ignored)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(
            f"{hub_id} is no local folder, and the model hub could not deliver it ({reason}); "
            "name a folder that holds it"
        ) from error
    return Path(path)
