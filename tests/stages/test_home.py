"""``~`` is the user's home in a path that no shell has seen, and a folder of that name is never made."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.cache import TarCache
from shards.dataset import create_dataset
from shards.storage import place
from stages.columns import TextConfig, VaeConfig
from stages.encode_config import EncodeConfig, InputConfig, read_rows
from stages.output import output_folder
from stages.sampling.config import GivenConfig
from stages.shapes.render import ShapesConfig


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Not the working folder, in which nothing may be left."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    yield home
    assert not any(here.iterdir())


def test_what_is_written_goes_there(home: Path) -> None:
    assert output_folder("~/run") == home / "run" and (home / "run").is_dir()
    assert create_dataset("~/dataset", "a") == home / "dataset" and (home / "dataset" / "dataset.json").exists()
    assert TarCache("~/cache", 1).folder == home / "cache"
    assert place(place("./~/a")) == Path("./~/a")


def test_the_encode_reads_and_renders_there(home: Path) -> None:
    (home / "vae").mkdir()
    data, text = InputConfig("~/a.jsonl", "~/videos"), TextConfig("~/absent", captions="~/new.jsonl")
    located = EncodeConfig(output="~/dataset", data=data, vae=VaeConfig("~/vae"), text_encoder=text).located()
    assert located.output == f"{home}/dataset" and located.vae.name == f"{home}/vae"
    assert located.data == InputConfig(f"{home}/a.jsonl", f"{home}/videos")
    assert (located.text_encoder.name, located.text_encoder.captions) == ("~/absent", f"{home}/new.jsonl")
    remote = EncodeConfig(output="s3://a/~/b", data=InputConfig("s3://a/~/b.jsonl", "s3://a/~"))
    assert remote.located() == remote
    _, videos = read_rows(EncodeConfig("shapes", "~/dataset", shapes=ShapesConfig(clips=1)).located())
    assert videos == f"{home}/data/videos" and len(list(Path(videos).iterdir())) == 1


def test_files_that_are_given_to_a_sample_are_found_there(home: Path) -> None:
    (home / "a.png").touch()
    assert GivenConfig(first="~/a.png").located().first == f"{home}/a.png"
    assert GivenConfig(first="~/absent.png", last="").located().first == "~/absent.png"
