"""The encode command: what it writes, against the models themselves and stock WebDataset, and what a kill leaves."""

import gc
import json
import os
import shutil
import signal
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import webdataset
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoTokenizer, T5EncoderModel

from models.source import TINY_FOLDER
from models.text import TextEncoder
from shards import storage
from shards.dataset import Dataset
from shards.latent_rgb import to_rgb
from tests.end_to_end.conftest import SMALL, encode, hashes
from tests.running import ROOT, command, environment, run, wait_for


def tars(shards: Path, column: str) -> list[str]:
    return sorted(map(str, (shards / "64x64x8" / column).glob("*.tar")))


def stock_samples(shards: Path, column: str) -> list[dict]:
    """What the stock package reads, without any code of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        found = list(webdataset.WebDataset(tars(shards, column), shardshuffle=False, empty_check=False).decode())
        gc.collect()
    return found


def test_stock_webdataset_reads_both_columns_in_the_same_order(shards: Path) -> None:
    latents, texts = stock_samples(shards, "latents"), stock_samples(shards, "text.t5")
    assert len(latents) == 48
    assert [sample["__key__"] for sample in latents] == [sample["__key__"] for sample in texts]
    assert all(sample["mean.npy"].shape == (8, 4, 8, 8) for sample in latents)


@torch.no_grad()
def test_latents_are_those_of_the_vae_on_the_files_own_frames(shards: Path) -> None:
    vae = AutoencoderKL.from_pretrained(TINY_FOLDER / "vae")
    dataset = Dataset.open(shards)
    row = dataset.index("64x64x8").slice(5, 1).to_pylist()[0]
    (file,) = (shards.parent / "data" / "videos").glob(f"{row['source']}*")
    with av.open(str(file)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    expected = vae.encode(pixels).latent_dist.mean
    stored = next(sample for sample in stock_samples(shards, "latents") if sample["__key__"] == row["key"])
    found = torch.from_numpy(stored["mean.npy"]).float()
    assert (found - expected).norm() < 0.05 * expected.norm()  # two ways of reading colours differ by a few levels
    assert (found - expected.flip(0)).norm() > 0.3 * expected.norm()  # the same frames in another order


def test_the_dataset_knows_the_colours_of_its_latents(shards: Path) -> None:
    dataset = Dataset.open(shards)
    shown, seen = [], []
    for number, row in enumerate(dataset.index("64x64x8").to_pylist()):
        (file,) = (shards.parent / "data" / "videos").glob(f"{row['source']}*")
        with av.open(str(file)) as container:
            frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
        seen.append(np.asarray(Image.fromarray(frame).resize((8, 8), Image.Resampling.BOX), float))
        latents = dataset.read("64x64x8", number, "latents")["mean.npy"]
        shown.append(to_rgb(latents[0], dataset.manifest.latent_rgb))
    error = np.square(np.array(shown) - np.array(seen)).mean()
    assert error < 0.5 * np.array(seen).var(axis=(0, 1, 2)).mean()  # what is left to a decoder that is not linear


@torch.no_grad()
def test_text_is_t5s_own_output_at_its_true_length(shards: Path) -> None:
    encoder = T5EncoderModel.from_pretrained(TINY_FOLDER / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER / "tokenizer")
    captions = {row["key"]: row["caption"] for row in Dataset.open(shards).index("64x64x8").to_pylist()}
    for sample in stock_samples(shards, "text.t5")[:5]:
        tokens = tokenizer(captions[sample["__key__"]], return_tensors="pt")
        expected = encoder(**tokens).last_hidden_state[0]
        torch.testing.assert_close(torch.from_numpy(sample["text.npy"]).float(), expected, rtol=1e-2, atol=1e-2)


def test_the_null_text_is_stored_once(shards: Path) -> None:
    embedding, mask = Dataset.open(shards).null_text("text.t5")
    assert embedding.shape == (1, 64) and mask.all()


def test_everything_is_counted(shards: Path) -> None:
    summary = json.loads((shards / "summary.json").read_text())
    assert (summary["rows"], summary["written"], summary["samples"], summary["shards"]) == (48, 48, 48, 3)
    assert summary["this_run"]["written"] == 48
    assert summary["bytes"] == sum(path.stat().st_size for path in shards.glob("*/*/*.tar"))


def test_the_same_command_again_changes_nothing_and_reads_little(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, reads, read = hashes(shards), Counter[str](), storage.read
    monkeypatch.setattr(storage, "read", lambda path: reads.update([str(path.relative_to(shards))]) or read(path))
    for columns, plan_reads in (([], 6), (["--columns", "text.t5"], 3)):
        reads.clear()
        encode("--input", "shapes", *columns, f"output={shards}", *SMALL)
        assert hashes(shards) == before
        assert reads["plan/000000.parquet"] == plan_reads  # each time some of its columns
        assert reads["64x64x8/latents/000000.parquet"] == 2  # what became of its clips, and the index
    summary = json.loads((shards / "summary.json").read_text())
    assert summary["written"] == 48 and summary["this_run"]["written"] == 0


def test_another_way_of_encoding_is_refused_by_name(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = hashes(shards)
    for setting, named in (
        ("vae.batch_frames=4", "batch_frames is 8, expected 4"),
        ("decoder=decord", 'sampling.decoder is "pyav", expected "decord"'),
        ("clip.fps=4", "sampling.fps is 8.0, expected 4.0"),
    ):
        encode("--input", "shapes", f"output={shards}", *SMALL, setting, status=2)
        (told,) = capsys.readouterr().err.splitlines()
        assert named in told
    assert hashes(shards) == before


def test_kills_at_any_moment_lose_and_double_nothing(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    settings = ["--input", "shapes", f"output={folder}", f"data.videos={shards.parent / 'data'}", *SMALL]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # In the middle of the plan, of the latents, and of the text.
    for made in ("dataset.json", "64x64x8/latents/*.parquet", "64x64x8/text.t5/*.parquet"):
        assert not any(folder.glob(made))
        process = subprocess.Popen([*command("encode"), *settings], cwd=ROOT, env=environment(), **quiet)
        wait_for(process, lambda made=made: any(folder.glob(made)))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run(*command("encode"), *settings)
    assert hashes(folder) == hashes(shards)


def test_a_decoder_that_hangs_costs_one_clip(tmp_path: Path, shards: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, path in enumerate(sorted((shards.parent / "data" / "videos").iterdir())[:3]):
        (videos / f"good{number}.mp4").symlink_to(path)
    row = {"Start_timestamp": "00:00:00.000", "End_timestamp": "00:00:01.000", "Caption": "a clip"}
    names = [f"good{number}" for number in range(3)] + ["hangs"]
    metadata = tmp_path / "clips.jsonl"
    metadata.write_text("".join(json.dumps({"YoutubeID": name, **row}) + "\n" for name in names))
    os.mkfifo(videos / "hangs.mp4")  # opening it waits for a writer that never comes
    encode("--input", "internvid", f"data.metadata={metadata}", f"data.videos={videos}", "vae=tiny",
        "text_encoder=tiny", f"output={tmp_path / 'shards'}", "clip={height: 64, width: 64, frames: 8}",
        "runtime.clip_timeout_s=2", "runtime.attempts=2")  # fmt: skip
    summary = json.loads((tmp_path / "shards" / "summary.json").read_text())
    assert summary["written"] == 3 and summary["rejected"] == {"timeout": 1}


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_folder_of_videos_and_pictures_becomes_clips_of_many_frames_and_of_one(
    decoder: str, tmp_path: Path, shards: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, path in enumerate(sorted((shards.parent / "data" / "videos").iterdir())[:2]):
        (folder / f"clip {number}.mp4").symlink_to(path)
        (folder / f"clip {number}.txt").write_text(f"caption {number}")
    Image.new("RGB", (96, 64), "red").save(folder / "picture.png")
    encode("--input", "folder", f"data.videos={folder}", "vae=tiny", "text_encoder=tiny",
        f"decoder={decoder}", f"output={tmp_path / 'shards'}", "clip={height: 64, width: 64, frames: [4, 8]}",
        )  # fmt: skip
    dataset = Dataset.open(tmp_path / "shards", text="text.t5")
    assert [bucket.name for bucket in dataset.buckets] == ["64x64x1", "64x64x8"]
    assert sorted(dataset.index("64x64x8")["caption"].to_pylist()) == ["caption 0", "caption 1"]
    assert dataset.read("64x64x1", 0, "latents")["mean.npy"].shape == (1, 4, 8, 8)
    assert len(dataset.read("64x64x1", 0, "text.t5")["text.npy"]) == 1  # no caption: the null text


def test_every_line_of_a_real_sample_of_internvid_is_accounted_for(assets: Path, ray: None, tmp_path: Path) -> None:
    mini = assets / "internvid_mini"
    encode("--input", "internvid", f"data.metadata={mini / 'InternVid-mini.jsonl'}", "vae=tiny",
        "text_encoder=tiny", f"data.videos={mini / 'clips'}", f"output={tmp_path}",
        "clip={height: 64, width: 64, frames: 8}")  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"] == summary["clips"] == 48
    assert (summary["written"], summary["duplicates"], summary["filtered"]) == (35, 1, 0)  # 30 good, 5 odd but valid
    assert summary["rejected"] == {
        "bad_metadata": 1, "bad_timestamps": 1, "missing_file": 2, "too_short": 2, "undecodable": 6,
    }  # fmt: skip
    keys = [sample["__key__"] for sample in stock_samples(tmp_path, "latents")]
    assert len(set(keys)) == len(keys) == 35


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--input", "internvid", "output=OUT"], "data.metadata and data.videos not set"),
        (
            ["--input", "internvid", "output=OUT", "data.metadata=no.jsonl", "data.videos=."],
            "no.jsonl' cannot be read",
        ),
        (["--input", "internvid", "output=OUT", "data.metadata=EMPTY", "data.videos=."], "is empty"),
        (["--input", "folder", "output=OUT", "data.videos=no/folder"], "no/folder: set data.videos"),
        (["--input", "folder", "output=OUT", "data.videos=~/no/folder"], f"no folder at {Path.home()}/no/folder"),
        (["--input", "folder", "output=OUT", "data.vidoes=x"], "did you mean 'data.videos'"),
        (["--input", "folder", "--work_dir=x"], "output=VALUE"),
        (["--input", "webvid"], "invalid choice"),
        (["--input", "shapes", "output=OUT", "vae=no/such/vae"], "no/such/vae"),
        (["--input", "shapes", "output=s3://bucket/shards"], "data.videos not set"),
        (["--columns", "text.new", "output=SHARDS"], "expected --input KIND"),
        (["--input", "shapes", "--columns", "latents", "output=SHARDS"], "expected text.NAME"),
        (["--input", "shapes", "--columns", "text.new", "output=OUT"], "does not exist"),
        (["--input", "shapes", "--columns", "text.new", "output=SHARDS", "text_encoder.captions=no"], "no captions at"),
        (["--input", "shapes", "output=OUT", "data.filter=aesthetic >="], "filter: "),
        (["--input", "shapes", "output=OUT", "clip.height=60"], "multiples of the VAE's 8"),
        (["--input", "shapes", "output=OUT", "vae.batch_frames=0"], "batch_frames: found 0, expected at least 1"),
        (["--input", "shapes", "output=OUT", "text_encoder.max_tokens=500"], "max_tokens: found 500"),
        (["--input", "shapes", "output=OUT", "shard_clips=0"], "shard_clips: found 0"),
        (["--input", "shapes", "output=SHARDS", "--retry", "mising_file"], "no clip was rejected for that"),
    ],
)
def test_bad_input_is_one_clear_line(
    settings: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    places = {"OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty.jsonl"), "SHARDS": str(shards)}
    for name, place in places.items():
        settings = [text.replace(name, place) for text in settings]
    tiny = [] if any(text.startswith("vae=") for text in settings) else ["vae=tiny"]
    encode(*SMALL, *tiny, "text_encoder.name=tiny", *settings, status=2)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ") and message in told


def written_captions(path: Path, captions: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"key": key, "caption": caption}) + "\n" for key, caption in captions.items()))
    return path


def test_new_captions_make_a_column_beside_the_old_and_encode_only_what_changed(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    rows = Dataset.open(folder).index("64x64x8").to_pylist()
    changed = {row["key"]: f"another caption of {row['source']}" for row in rows[:5]}
    file = written_captions(tmp_path / "new.jsonl", changed | {rows[7]["key"]: rows[7]["caption"].upper()})
    before = hashes(folder)
    settings = ["--input", "shapes", f"output={folder}", "--columns", "text.new", f"text_encoder.captions={file}"]
    encode(*settings)
    assert {path for path in before if "index" not in path} < hashes(folder)  # nothing else is touched
    summary = json.loads((folder / "summary.json").read_text())
    made = summary["this_run"]["columns"]["text.new"]
    assert made["replaced"] == 6 and made["reused"] > 0
    dataset = Dataset.open(folder)
    assert dataset.columns("64x64x8") == ["latents", "text.new", "text.t5"]
    encoder = TextEncoder.load("tiny")
    for number, row in enumerate(dataset.index("64x64x8").to_pylist()):
        assert row["text.new.caption"] == changed.get(row["key"], None if number != 7 else row["caption"].upper())
        (expected,) = encoder.encode([changed.get(row["key"], row["caption"])])
        np.testing.assert_array_equal(dataset.read("64x64x8", number, "text.new")["text.npy"], expected)

    (folder / "64x64x8" / "text.new" / "000002.parquet").unlink()  # a shard whose captions are all the metadata's
    encode(*settings, "--dry-run")
    assert "16 captions of 1 shards to encode into text.new" in capsys.readouterr().out

    written_captions(file, {key: "yet another" for key in changed})
    encode(*settings, status=2)
    (told,) = capsys.readouterr().err.splitlines()
    assert "captions is" in told


def test_a_text_column_that_did_not_grow_with_its_dataset_is_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(shards, tmp_path / "shards")
    shutil.copytree(folder / "64x64x8" / "text.t5", folder / "64x64x8" / "text.short")
    (folder / "64x64x8" / "text.short" / "000002.parquet").unlink()
    encode("--input", "shapes", "--columns", "text.t5", f"output={folder}")
    told = "text.short lacks 1 shard and cannot be used until encode --columns text.short has made the rest"
    assert capsys.readouterr().out.splitlines()[-1] == told
    assert json.loads((folder / "summary.json").read_text())["incomplete"] == {"text.short": 1}


def test_captions_of_other_keys_are_refused_before_anything_is_made(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, keys = tmp_path / "shards", Dataset.open(shards).index("64x64x8")["key"].to_pylist()
    shutil.copytree(shards, folder)
    captions = f"text_encoder.captions={written_captions(tmp_path / 'new.jsonl', {'a.mp4': 'a', 'b.mp4': 'b'})}"
    column = ["--columns", "text.new"]
    for settings in ([*column, f"output={folder}"], [f"output={tmp_path / 'whole'}", *SMALL]):
        for dry in ([], ["--dry-run"]):
            encode("--input", "shapes", *settings, *dry, captions, status=2)
            told = capsys.readouterr().err.splitlines()[-1]
            assert "new.jsonl has the caption of none of these clips: expected the dataset's keys, such as " in told
            assert told.rpartition(" ")[2] in keys
    assert not (folder / "64x64x8" / "text.new").exists() and not any(tmp_path.glob("whole/*/latents"))
