"""Frames given by files: which stay as they are, at the right place, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.identity import vae_identity
from models.latents import LatentStats
from models.vae import FrozenVAE
from models.weights import CheckpointInfo, read_info
from pipelines.command import run
from pipelines.sample import main
from stages.decoding.decode import decode_clip
from stages.decoding.picture import decode_image
from stages.sampling.config import GivenToOne
from stages.sampling.given import given_frames
from stages.sampling.sampled_latents import SampledLatents
from stages.video import write_mp4
from tests.stages.small_run import small_run

ALL = ("first", "extend", "between", "loop")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows given frames, two pictures, and a video of 8 frames whose brightness rises."""
    folder = tmp_path_factory.mktemp("given")
    small_run(folder / "run", conditioning=ALL)
    for name, colour in (("a", "red"), ("b", "navy")):
        Image.new("RGB", (100, 60), colour).save(folder / f"{name}.png")
    steps = np.arange(8, dtype=np.uint8)[:, None, None, None] * 30
    write_mp4(folder / "clip.mp4", np.broadcast_to(steps, (8, 48, 48, 3)).copy(), 8)
    return folder


def _sample(files: Path, output: Path, *settings: str) -> SampledLatents:
    arguments = ["text_prompt=[a ball, a cube]", f"ckpt={files / 'run'}", f"output={output}", "height=32", "width=48",
                 "frames=8", "steps=2", "formats=[latents]", *settings]  # fmt: skip
    assert run(main, arguments) == 0
    return SampledLatents.read(output / "latents.safetensors")


def _latents(pixels: np.ndarray) -> np.ndarray:
    return FrozenVAE.load("tiny").encode(pixels).transpose(1, 0, 2, 3)  # [C, T, h, w]


def _assert_frames(found: SampledLatents, sample: int, places: list[int], pixels: np.ndarray) -> None:
    scale = LatentStats.of(vae_identity("tiny")).scaling_factor
    latents = found.latents[sample].numpy()
    assert np.abs(latents[:, places] - _latents(pixels)).max() < 0.02 / scale  # latents are stored in half precision
    others = [place for place in range(latents.shape[1]) if place not in places]
    assert all(np.abs(latents[:, [place]] - _latents(pixels)).max() > 0.2 / scale for place in others)


def test_pictures_to_begin_and_end_with(files: Path, tmp_path: Path) -> None:
    a, b = (decode_image(str(files / f"{name}.png"), 32, 48) for name in "ab")
    first = _sample(files, tmp_path / "first", f"given.first=[{files / 'a.png'}, {files / 'b.png'}]")
    _assert_frames(first, 0, [0], a)
    _assert_frames(first, 1, [0], b)
    both = _sample(files, tmp_path / "both", f"given.first={files / 'a.png'}", f"given.last={files / 'b.png'}")
    _assert_frames(both, 1, [0, 7], np.concatenate([a, b]))
    loop = _sample(files, tmp_path / "loop", f"given.first={files / 'a.png'}", "given.loop=true")
    _assert_frames(loop, 0, [0, 7], np.concatenate([a, a]))


def test_a_video_goes_on_from_its_last_frames(files: Path, tmp_path: Path) -> None:
    size = {"fps": 8.0, "height": 32, "width": 48, "timeout_s": 60.0}
    last = decode_clip(str(files / "clip.mp4"), start_s=5 / 8, frames=3, **size)
    assert [round(float(frame.mean())) for frame in last] == pytest.approx([150, 180, 210], abs=3)
    clip = f"given.video={files / 'clip.mp4'}"
    _assert_frames(_sample(files, tmp_path / "on", clip, "given.video_frames=3"), 0, [0, 1, 2], last)
    begin = decode_clip(str(files / "clip.mp4"), start_s=0.0, frames=2, **size)
    loop = _sample(files, tmp_path / "loop", clip, "given.loop=true")
    _assert_frames(loop, 1, [0, 1, 6, 7], np.concatenate([last[1:], begin]))


def test_some_samples_of_several_and_again_from_the_file(files: Path, tmp_path: Path) -> None:
    made = _sample(files, tmp_path / "made", f"given.first=['', {files / 'a.png'}]", "samples_per_prompt=2",
                   "formats=[latents,mp4]")  # fmt: skip
    a = decode_image(str(files / "a.png"), 32, 48)
    for number in (2, 3):
        _assert_frames(made, number, [0], a)
        with pytest.raises(AssertionError):
            _assert_frames(made, number - 2, [0], a)
    rows = json.loads((tmp_path / "made/summary.json").read_text())["samples"]
    assert run(main, ["--from-file", str(tmp_path / "made" / rows[3]["file"]), f"output={tmp_path / 'again'}"]) == 0
    again = SampledLatents.read(tmp_path / "again/latents.safetensors")
    assert (again.latents[0] == made.latents[3]).all()


def test_a_sample_that_begins_with_nothing_ends_with_nothing(files: Path, tmp_path: Path) -> None:
    """Though others of the list loop, or have a last frame."""
    a, b = (decode_image(str(files / f"{name}.png"), 32, 48) for name in "ab")
    first = f"given.first=['', {files / 'a.png'}]"
    loop = _sample(files, tmp_path / "loop", first, "given.loop=true")
    _assert_frames(loop, 1, [0, 7], np.concatenate([a, a]))
    last = _sample(files, tmp_path / "last", first, f"given.last={files / 'b.png'}")
    _assert_frames(last, 1, [0, 7], np.concatenate([a, b]))
    for made, picture in ((loop, a), (last, b)):
        with pytest.raises(AssertionError):
            _assert_frames(made, 0, [7], picture)


def test_a_file_holds_from_any_folder_and_a_changed_one_is_refused(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    Image.open(files / "a.png").save(picture)
    monkeypatch.chdir(tmp_path)
    _sample(files, Path("out"), "text_prompt=a ball", "given.first=picture.png", "formats=[mp4, latents]")
    again = ["--from-file", str(tmp_path / "out/0000-a-ball.mp4"), f"output={tmp_path / 'again'}"]
    monkeypatch.chdir("/")
    assert run(main, again) == 0
    latents = [SampledLatents.read(tmp_path / name / "latents.safetensors").latents for name in ("out", "again")]
    assert (latents[0] == latents[1]).all()
    Image.open(files / "b.png").save(picture)
    capsys.readouterr()
    assert run(main, [*again, "--dry-run"]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert f"given: {picture} has the hash" in told and "given.files_hash= (empty)" in told
    assert run(main, [*again, "given.files_hash="]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["given.last=a.png"], "last: expected first beside it"),
        (["given.loop=true"], "loop: expected first or video beside it"),
        (["given.first=a.png", "given.video=a.mp4"], "video: found beside first or last"),
        (["given.first=[a.png, b.png]"], "given.first: found 2 for 1 prompts"),
        (["given.first=no.png"], "given: found no.png, which cannot be read"),
        (["given.video=CLIP", "given.video_frames=4", "frames=9"], "does not give 4 frames at 8 fps"),
        (
            ["given.video=CLIP", "given.video_frames=5", "frames=8"],
            "found 5 frames at the start and 0 at the end, of 8",
        ),
    ],
)
def test_what_cannot_be_given(
    settings: list[str], message: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.mp4"
    write_mp4(short, np.zeros((3, 48, 48, 3), np.uint8), 8)
    settings = [text.replace("CLIP", str(short)) for text in settings]
    arguments = ["text_prompt=a ball", f"ckpt={files / 'run'}", f"output={tmp_path / 'out'}", "height=32", "width=32"]
    assert run(main, [*arguments, *settings]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("conditioning", "known"), [((), []), (("first",), [0]), (("extend", "between"), [1, 2]), (("loop",), [1, 3])]
)
def test_only_what_the_checkpoint_was_trained_with(
    conditioning: tuple[str, ...], known: list[int], files: Path
) -> None:
    info = CheckpointInfo(**{**vars(read_info(files / "run")), "conditioning": conditioning})
    asked = [
        GivenToOne(first="a"), GivenToOne(first="a", last="b"), GivenToOne(video="v"),
        GivenToOne(video="v", loop=True),
    ]  # fmt: skip
    for number, given in enumerate(asked):
        if number in known:
            assert given_frames(given, 8, info)
        else:
            with pytest.raises(Exception, match="the checkpoint was trained with the masks"):
                given_frames(given, 8, info)
