"""The page about a dataset: it tells what is there, measured independently, and damage costs its piece alone."""

import base64
import html
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from models.source import TINY_FOLDER
from pipelines.browse import main
from pipelines.command import run
from shards.dataset import Dataset
from shards.errors import DatasetError
from shards.schema import Bucket
from stages.browsing.browse import BrowseConfig, browse
from stages.browsing.source_frames import Source, SourceReader
from stages.browsing.survey import survey
from stages.errors import ConfigError, DecodeError
from tests.stages.browsing.small_dataset import BUCKETS, HOSTILE, SmallDataset, small_dataset

SCALE = json.loads((TINY_FOLDER / "vae" / "config.json").read_text())["scaling_factor"]


def look(dataset: SmallDataset, output: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    """The summary and the page."""
    summary = browse(BrowseConfig(shards=str(dataset.path), output=str(output), **settings))
    assert json.loads((output / "summary.json").read_text()) == summary
    return summary, Path(summary["page"]).read_text()


def stored_latents(dataset: SmallDataset) -> dict[str, np.ndarray]:
    """Key -> latents, read with nothing of ours."""
    found = {}
    for tar in dataset.path.glob("*/latents/*.tar"):
        with tarfile.open(tar) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                found[member.name.partition(".")[0]] = np.load(io.BytesIO(file.read()))
    return found


def cards(page: str) -> dict[str, str]:
    """Key -> the HTML of its card."""
    found = re.findall(r"<article.*?</article>", page, re.DOTALL)
    return {re.search(r"<dt>key</dt><dd>(.*?)</dd>", card)[1]: card for card in found}  # type: ignore[index]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    return small_dataset(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def seen_page(dataset: SmallDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return look(dataset, tmp_path_factory.mktemp("page"))


def test_the_page_tells_what_is_there(dataset: SmallDataset, seen_page: tuple[dict[str, Any], str]):
    summary, page = seen_page
    assert summary["clips"] == summary["with_source"] == 6 and summary["faults"] == []
    assert [finding["good"] for finding in summary["findings"]] == [True, False, True, None, True]
    assert "; 1 of them below 20 dB" in page, "a large shape is much for the tiny VAE"
    found = cards(page)
    assert found.keys() == dataset.sources.keys()
    for key, card in found.items():
        number = int(re.search(r"<dt>source</dt><dd>\w+-(\d), from 0.[02]\d0 s", card)[1])  # type: ignore[index]
        assert f"text.t5, {3 + number} tokens" in card and f"<dt>aesthetic</dt><dd>{4.5 + number:g}</dd>" in card
        assert ("another caption" in card) == (number == 1) and "<dt>umt" not in card
        frames, height, width, _ = dataset.sources[key].shape
        assert f"bucket {height}x{width}x{frames}, shard 0" in card
        assert 'data-src="data:video/mp4' in card if frames > 1 else 'src="data:image/jpeg' in card
        assert "<dt>duration</dt><dd>1.25 s</dd>" in card and "<dt>latent motion</dt><dd>0.125</dd>" in card
    assert HOSTILE not in page and "&lt;script&gt;alert" in page
    assert '<th scope="row">rejected: too short</th><td>1</td>' in page and "weights_hash" in page
    assert "://" not in re.sub(r"data:[^\"]*", "", page), "it asks for nothing"


def test_a_large_picture_is_scaled_down(dataset: SmallDataset, seen_page: tuple[dict[str, Any], str]):
    (key,) = [key for key, frames in dataset.sources.items() if len(frames) == 1]
    data = re.search(r'src="data:image/jpeg;base64,(.*?)"', cards(seen_page[1])[key])[1]  # type: ignore[index]
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (768, 48)
    source = np.asarray(Image.fromarray(dataset.sources[key][0]).resize((384, 48)), float)
    assert np.abs(np.asarray(shown, float)[:, :384] - source).mean() < 3, "the source is on the left"


def test_rejects_are_shown_by_reason(seen_page: tuple[dict[str, Any], str]):
    sections = re.findall(r'data-reason="(\w+)">(.*?)</section>', seen_page[1], re.DOTALL)
    shown = dict(sections)
    assert shown.keys() == {"missing_file", "too_short", "undecodable"}
    assert "it came later" not in seen_page[1] and "a first try" not in seen_page[1], "they were tried again"
    assert "data:image/jpeg" in shown["too_short"] and "4 frames need 500 ms" in shown["too_short"]
    assert "no picture: there is no file" in shown["missing_file"] and "<img" not in shown["missing_file"]
    assert "<b>broken</b>" in shown["undecodable"] and "moov atom not found" in shown["undecodable"]
    assert "no picture: Invalid data" in shown["undecodable"]


def test_psnr_is_what_diffusers_and_numpy_say(dataset: SmallDataset, seen_page: tuple[dict[str, Any], str]):
    """Up to 0.15 dB: a batch of another size moves torch's pixels by a fraction of a level."""
    vae = diffusers.AutoencoderKL.from_pretrained(TINY_FOLDER / "vae")
    expected = {}
    for key, latents in stored_latents(dataset).items():
        with torch.no_grad():
            pixels = vae.decode(torch.tensor(latents).float()).sample.permute(0, 2, 3, 1).numpy()
        decoded = np.clip((pixels + 1) * 127.5, 0, 255).round()
        expected[key] = 10 * np.log10(255**2 / np.mean((decoded - dataset.sources[key]) ** 2))
    summary, page = seen_page
    assert summary["psnr_db"]["least"] == pytest.approx(min(expected.values()), abs=0.15)
    assert summary["psnr_db"]["median"] == pytest.approx(np.median(list(expected.values())), abs=0.15)
    for key, card in cards(page).items():
        shown = float(re.search(r"([\d.]+) dB PSNR", card)[1])  # type: ignore[index]
        assert shown == pytest.approx(expected[key], abs=0.15)
        assert ('<b class="bad">✗' in card) == (expected[key] < 20)


def test_channels_are_what_numpy_says(dataset: SmallDataset, seen_page: tuple[dict[str, Any], str]):
    values = np.concatenate([one.transpose(1, 0, 2, 3).reshape(4, -1) for one in stored_latents(dataset).values()], 1)
    channels = seen_page[0]["channels"]
    assert [channel["mean"] for channel in channels] == pytest.approx(values.mean(1, dtype=float), abs=1e-6)
    assert [channel["std"] for channel in channels] == pytest.approx(values.std(1, dtype=float), rel=1e-6)
    assert [channel["spread"] for channel in channels] == pytest.approx(values.std(1, dtype=float) * SCALE, rel=1e-6)


def test_half_precision_is_close_and_bf16_is_told(seen_page: tuple[dict[str, Any], str]):
    summary, page = seen_page
    assert 65 < summary["stored_snr_db"]["least"] < 80, "rounding to 11 bits"
    assert 30 < summary["bf16_snr_db"]["least"] < 60
    least = summary["bf16_snr_db"]["least"]
    verdict = "passes" if least >= 40 else "does not pass"
    assert f"bf16 compute against fp32: SNR {least:.1f} dB least; 40 wanted: {verdict}" in page


def test_noisy_latents_and_a_shifted_channel_are_seen(tmp_path: Path):
    """Noise 30 dB below the latents, and one channel that was not what its VAE says."""

    def worsened(latents: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(0).normal(0, 1, latents.shape) * np.sqrt(np.square(latents).mean() / 1000)
        return latents + noise

    noisy, _ = look(small_dataset(tmp_path / "noisy", worsened), tmp_path / "a", clips=3)
    assert noisy["stored_snr_db"]["median"] == pytest.approx(30, abs=0.5)
    assert [finding["good"] for finding in noisy["findings"] if "stored latents" in finding["text"]] == [False]

    shift = np.array([0, 0, 2 / SCALE, 0])[:, None, None]
    shifted, page = look(small_dataset(tmp_path / "shifted", lambda latents: latents + shift), tmp_path / "b", clips=1)
    assert [channel["far_off"] for channel in shifted["channels"]] == [False, False, True, False]
    assert "latent channels far off from what the VAE states: 2" in page and page.count("✗ far off") == 1


def test_damage_costs_its_piece_alone(dataset: SmallDataset, tmp_path: Path):
    """A flipped bit, a source that is gone and one that was cut: three cards say so, and the others are whole."""
    hurt = SmallDataset(tmp_path / "shards", tmp_path / "videos", dataset.sources)
    shutil.copytree(dataset.path, hurt.path)
    shutil.copytree(dataset.videos, hurt.videos)
    (tar,) = (hurt.path / "64x64x4" / "latents").glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    (hurt.videos / "64x64x8-1.mp4").unlink()
    os.truncate(hurt.videos / "64x64x8-2.mp4", 300)
    (hurt.path / "64x64x8" / "latents" / "000000.parquet").write_bytes(b"PAR1 no more")

    summary, page = look(hurt, tmp_path / "out", videos=str(hurt.videos))
    by_name = {re.search(r"<dd>(\w+-\d), from", card)[1]: card for card in cards(page).values()}  # type: ignore[index]
    assert len(by_name) == 6 and summary["with_source"] == 3
    assert "The source is gone" in by_name["64x64x8-1"] and "data:video/mp4" in by_name["64x64x8-1"]
    assert "cannot be decoded again, undecodable" in by_name["64x64x8-2"]
    (lost,) = [card for name, card in by_name.items() if "data:" not in card]
    assert "the tar is damaged" in lost and tar.name in lost
    assert len(summary["faults"]) == 2 and all(fault in html.unescape(page) for fault in summary["faults"])
    assert summary["findings"][0] == {"good": False, "text": "2 damaged or missing pieces, named below"}


def test_without_plan_and_index_the_rest_is_shown(dataset: SmallDataset, tmp_path: Path):
    hurt = SmallDataset(tmp_path / "shards", dataset.videos, dataset.sources)
    shutil.copytree(dataset.path, hurt.path)
    (plan,) = (hurt.path / "plan").iterdir()
    plan.write_bytes(plan.read_bytes()[:-100])
    (index,) = (hurt.path / "index").glob("64x64x4-*")
    index.unlink()
    summary, page = look(hurt, tmp_path / "out")
    assert len(cards(page)) == sum(BUCKETS.values()) - BUCKETS["64x64x4"] and summary["psnr_db"] is None
    assert page.count("The plan does not say which file") == 4
    assert "bucket 64x64x4: " in summary["faults"][0] and "the plan cannot be read" in summary["faults"][1]


def test_clips_are_picked_by_the_seed_from_every_bucket(dataset: SmallDataset):
    manifest = Dataset.open(dataset.path).manifest

    def picked(clips: int, seed: int = 0) -> list[str]:
        return [clip.key for clip in survey(dataset.path, manifest, clips, 0, seed).picked]

    assert picked(4, seed=1) == picked(4, seed=1) != picked(4, seed=2)
    assert {len(dataset.sources[key]) for key in picked(3)} == {1, 4, 8}
    assert sorted(picked(100)) == sorted(dataset.sources) and picked(0) == []
    assert survey(dataset.path, manifest, 0, 4, 0).sums.clips == 4


def test_another_vae_is_refused(
    dataset: SmallDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "vae"
    shutil.copytree(TINY_FOLDER / "vae", other)
    config = other / "config.json"
    config.write_text(config.read_text().replace("scaling_factor", "scaling_factor_was", 1))
    with pytest.raises(DatasetError, match="weights_hash is .*, expected .*give vae="):
        browse(BrowseConfig(shards=str(dataset.path), output=str(tmp_path / "out"), vae=str(other)))
    (tmp_path / "bare").mkdir()
    assert run(main, [str(tmp_path / "none")]) == run(main, [str(tmp_path / "bare")]) == 2
    assert "expected the output folder of an encode" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(dataset.path))
    for inside in (str(dataset.path / "latents"), "~/latents"):
        with pytest.raises(ConfigError, match="inside the dataset"):
            browse(BrowseConfig(shards=str(dataset.path), output=inside))


def test_by_default_each_dataset_has_a_page_of_its_own(
    dataset: SmallDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "elsewhere" / dataset.path.name
    shutil.copytree(dataset.path, other)
    pages = []
    for folder, path in (
        (tmp_path, str(dataset.path)),
        (dataset.path.parent, dataset.path.name),
        (tmp_path, f"{other}/"),
    ):
        monkeypatch.chdir(folder)
        assert run(main, [path, "--dry-run"]) == 0
        pages.append(capsys.readouterr().out.partition("the page: ")[2])
    assert pages[0] == pages[1] != pages[2]
    assert all(re.fullmatch(r"outputs/browse/shards-[0-9a-f]{8}/browse.html\n", page) for page in pages)


def test_a_dry_run_writes_nothing(dataset: SmallDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(main, [str(dataset.path), "--dry-run", "clips=3", f"output={tmp_path / 'out'}"]) == 0
    assert "clips: 3" in (told := capsys.readouterr().out)
    assert "3 of 6 samples" in told and str(dataset.videos) in told and not list(tmp_path.iterdir())


def test_a_file_that_hangs_its_decoder_costs_itself_alone(dataset: SmallDataset, tmp_path: Path):
    os.mkfifo(tmp_path / "fifo.mp4")  # opening it waits for a writer, inside the decoder
    bucket = Bucket(64, 64, 4)
    with SourceReader(timeout_s=1) as reader:
        with pytest.raises(DecodeError, match="crashed or hung"):
            reader.clip(Source(str(tmp_path / "fifo.mp4"), "video", 0.0), bucket, 8, "pyav")
        good = Source(str(dataset.videos / "64x64x4-0.mp4"), "video", 0.0)
        assert reader.clip(good, bucket, 8, "pyav").shape == (4, 64, 64, 3)
        assert reader.first_frame(good).shape == (320, 320, 3)
