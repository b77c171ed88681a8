"""Finding a model's folder and hashing what is in it; the hub is a stand-in, since tests have no network."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from models.errors import WeightsError
from models.source import TINY_FOLDER, resolve_model, tokenizer_hash, weights_hash


def make_model(folder: Path, weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / weights).write_bytes(b"weights")
    return folder


def test_tiny_names_the_embedded_models():
    for part in ("vae", "text_encoder", "tokenizer"):
        assert resolve_model("tiny", part) == TINY_FOLDER / part
    assert sum(path.stat().st_size for path in TINY_FOLDER.rglob("*")) < 4_000_000


def test_a_folder_is_the_part_itself_or_holds_it(tmp_path: Path):
    flat = make_model(tmp_path / "flat")
    (flat / "spiece.model").write_bytes(b"pieces")
    assert resolve_model(str(flat), "vae") == resolve_model(str(flat), "tokenizer") == flat
    nested = make_model(tmp_path / "nested" / "text_encoder").parent
    assert resolve_model(str(nested), "text_encoder") == nested / "text_encoder"
    with pytest.raises(WeightsError, match="holds no vae: expected config.json and weights there or in its subfolder"):
        resolve_model(str(nested), "vae")
    with pytest.raises(WeightsError, match="holds no tokenizer: expected spiece.model or tokenizer.json"):
        resolve_model(str(nested), "tokenizer")


def test_what_can_be_no_hub_id_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    file = tmp_path / "file"
    file.write_text("")
    for name in (str(tmp_path / "absent"), "./absent", "a/b/c", "~/absent", str(file), ""):
        with pytest.raises(WeightsError, match="expected 'tiny'"):
            resolve_model(name, "vae") if name else resolve_model("no such", "vae")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub of one repository, ``owner/name``, that delivers what the patterns of the call let through."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    repository.mkdir()
    cache.mkdir()

    def deliver(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        if hub_id != "owner/name":
            raise FileNotFoundError(f"no {hub_id}\nmore lines")
        for path in sorted(p for p in repository.rglob("*") if p.is_file()):
            name = str(path.relative_to(repository))
            ignored = any(fnmatch(name, pattern) for pattern in ignore_patterns)
            if not ignored and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", deliver)
    return repository


def test_of_a_diffusers_repository_only_the_part_is_fetched(hub: Path, tmp_path: Path):
    for part in ("vae", "text_encoder", "transformer"):
        make_model(hub / part)
    make_model(hub, "everything.safetensors")
    (hub / "vae" / "model.fp16.safetensors").write_bytes(b"half")
    (hub / "vae" / "model.bin").write_bytes(b"pickled")
    found = resolve_model("owner/name", "vae")
    assert found == tmp_path / "cache" / "vae"
    fetched = {str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    assert fetched == {"vae/config.json", "vae/model.safetensors"}


def test_a_flat_repository_with_only_bin_weights_is_fetched(hub: Path, tmp_path: Path):
    make_model(hub, "pytorch_model.bin")
    make_model(hub / "onnx")
    (hub / "spiece.model").write_bytes(b"pieces")
    assert resolve_model("owner/name", "text_encoder") == tmp_path / "cache"
    assert resolve_model("owner/name", "tokenizer") == tmp_path / "cache"
    assert not (tmp_path / "cache" / "onnx").exists()


def test_a_hub_that_cannot_deliver_is_one_clear_line(hub: Path):
    with pytest.raises(WeightsError, match="no local folder.*no other/name.*name a folder that holds it") as caught:
        resolve_model("other/name", "vae")
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="holds no vae"):
        resolve_model("owner/name", "vae")


def test_weights_hash_follows_weights_and_config_but_not_the_place(tmp_path: Path):
    one = make_model(tmp_path / "one")
    (one / "README.md").write_text("ignored")
    same, other, otherwise = (make_model(tmp_path / name) for name in ("same", "other", "otherwise"))
    (other / "model.safetensors").write_bytes(b"weightz")
    (otherwise / "config.json").write_text("{ }")
    hashes = [weights_hash(folder) for folder in (one, same, other, otherwise)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3 and all(len(h) == 32 for h in hashes)
    with pytest.raises(WeightsError, match="holds no model"):
        weights_hash(tmp_path)


def test_safetensors_are_hashed_rather_than_bin_files_beside_them(tmp_path: Path):
    folder = make_model(tmp_path)
    before = weights_hash(folder)
    (folder / "pytorch_model.bin").write_bytes(b"more")
    assert weights_hash(folder) == before


def test_tokenizer_hash_follows_its_files(tmp_path: Path):
    (tmp_path / "spiece.model").write_bytes(b"pieces")
    before = tokenizer_hash(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_hash(tmp_path) != before
