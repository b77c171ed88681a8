"""The verify command: what it prints, its exit status, and a repair that gives the same bytes back."""

import os
import shutil
from pathlib import Path

import pytest

from pipelines.command import run as run_command
from pipelines.verify import main
from shards import storage
from shards.dataset import Dataset, create_dataset
from shards.manifest import read_json

BUCKET = "64x64x8"


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def content(root: Path) -> dict[str, bytes]:
    """Every file of the data, by its name: a tar's and an index's hold their hash."""
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    told = ("summary.json", "config.yaml", "set_aside/")
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(told)}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def test_a_repair_gives_the_same_bytes_back_and_deletes_nothing(
    copy: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = [sorted((copy / BUCKET / column).glob("*.tar")) for column in ("latents", "text.t5")]
    flip(tars[0][1], 700)
    os.truncate(tars[1][2], 512)
    flip(copy / BUCKET / "text.t5" / "000000.parquet", 40)
    flip(copy / "manifest.json", 300)
    flip(next((copy / "index").iterdir()), 300)
    damaged = content(copy)
    earlier = copy / "set_aside" / "001" / tars[0][1].relative_to(copy)  # and 000 was removed
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"what an earlier repair found")
    capsys.readouterr()
    assert run_command(main, [str(copy), "--repair", f"data.videos={shards.parent / 'data'}"]) == 0
    told = capsys.readouterr().out
    assert content(copy) == content(shards)
    assert earlier.read_bytes() == b"what an earlier repair found"
    aside = copy / "set_aside" / "002"
    assert content(aside).items() <= damaged.items() and str(tars[0][1].relative_to(copy)) in content(aside)
    assert f"fault: {tars[0][1]}: " in told and f"fault: {tars[1][2]}: " in told
    assert "nothing is wrong" in told.splitlines()[-1]


def test_a_whole_dataset_and_a_damaged_one(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(copy)
    assert run_command(main, [str(copy)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("nothing is wrong") and "96 records" in told.out and "note" not in told.out
    tar = sorted((copy / BUCKET / "latents").glob("*.tar"))[1]
    flip(tar, tar.stat().st_size - 1)
    flip(tar, 700)
    assert run_command(main, [str(copy)]) == 1
    told = capsys.readouterr()
    key = Dataset.open(copy).index(BUCKET)["key"][16].as_py()
    assert [line.split(": ")[:3] for line in told.out.splitlines()] == [
        ["fault", str(tar), key],
        ["fault", str(tar), "trailer"],
    ]
    assert "failed: 2 faults: " in told.err
    assert {name for name, data in content(copy).items() if before[name] != data} == {str(tar.relative_to(copy))}


def test_what_the_encode_refuses_leaves_everything_where_it_was(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(sorted((copy / BUCKET / "latents").glob("*.tar"))[1], 700)
    flip(copy / "manifest.json", 300)
    before = content(copy)
    settings = ["input=folder", f"data.videos={copy / 'no'}"]
    assert run_command(main, [str(copy), "--repair", *settings]) == 2
    assert "no folder at" in capsys.readouterr().err
    assert content(copy) == before


def test_what_another_repair_sets_aside_meanwhile_is_not_replaced(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = sorted((copy / BUCKET / "latents").glob("*.tar"))[1]
    flip(tar, 700)
    other = copy / "set_aside" / "000" / tar.relative_to(copy)
    other.parent.mkdir(parents=True)
    other.write_bytes(b"the other's")
    before, list_folder = content(copy), storage.list_folder
    monkeypatch.setattr(storage, "list_folder", lambda at: [] if at.name == "set_aside" else list_folder(at))
    assert run_command(main, [str(copy), "--repair"]) == 1
    assert f"failed: {other} is there already and is not replaced" in capsys.readouterr().err
    assert content(copy) == before and other.read_bytes() == b"the other's"


def test_a_dry_run_reads_no_shard(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = sum(path.stat().st_size for path in (copy / BUCKET / "latents").glob("*.tar"))
    for tar in copy.rglob("*.tar"):
        tar.unlink()
    assert run_command(main, [str(copy), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "6 shards" in told and f"{BUCKET}/latents: 3 shards, {size / 1e6:.1f} MB" in told
    assert read_json(copy / "manifest.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no dataset given"),
        (["no/such/folder"], "does not exist"),
        (["COPY", "vae=tiny"], "for --repair alone"),
        (["COPY", "--repair", "--config", "no.yaml"], "no config file at no.yaml"),
        (["COPY", "--repair", "vae.nmae=tiny"], "did you mean 'vae.name'"),
        (["COPY", "--repair", "--dry-run", "vae.nmae=tiny"], "did you mean 'vae.name'"),
        (["NEW", "--repair"], "new/config.yaml: give --config"),
        (["STORE", "--repair"], "a repair works on a local folder"),
        (["COPY", "--reapir"], "unknown option '--reapir'"),
    ],
)
def test_mistakes_are_one_clear_line_before_anything_is_read(
    arguments: list[str], message: str, copy: Path, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "manifest.json").write_text("{")
    places = {"COPY": copy, "NEW": create_dataset(tmp_path / "new", "a"), "STORE": create_dataset(bucket, "a")}
    capsys.readouterr()
    assert run_command(main, [str(places.get(text, text)) for text in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
    assert told.err.startswith("error: ") and message in told.err
