"""Pictures as clips of one frame, and what is told of them before."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.decoding.picture import decode_image, probe_picture
from stages.errors import DecodeError


def test_a_picture_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:20, :30], picture[20:, 30:] = (250, 20, 20), (20, 20, 250)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be shown, turn 90 degrees clockwise
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    shown = decode_image(str(tmp_path / "a.png"), 60, 40)
    assert shown.shape == (1, 60, 40, 3) and shown.dtype == np.uint8
    assert np.array_equal(shown[0], np.rot90(picture, -1))
    assert decode_image(str(tmp_path / "a.png"), 32, 48).shape == (1, 32, 48, 3)


def test_pictures_of_other_modes(tmp_path: Path) -> None:
    deep = np.full((16, 16), 0x8000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(tmp_path / "gray.png")
    Image.new("RGBA", (16, 16), (10, 200, 10, 0)).save(tmp_path / "clear.png")
    Image.new("CMYK", (16, 16), (0, 0, 0, 255)).save(tmp_path / "print.jpg")
    for name, level in {"deep.png": 128, "gray.png": 77, "clear.png": 255, "print.jpg": 0}.items():
        assert np.abs(decode_image(str(tmp_path / name), 8, 8).astype(int) - level).max() <= 2, name


def test_broken_pictures_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    for name, expected in {"cut.png": "undecodable", "page.jpg": "undecodable", "no.png": "missing_file"}.items():
        with pytest.raises(DecodeError) as caught:
            decode_image(str(tmp_path / name), 8, 8)
        assert caught.value.reason == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_picture_is_as_large_as_it_is_shown(tmp_path: Path, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40)).save(tmp_path / name, exif=exif)
    info = probe_picture(str(tmp_path / name))
    assert (info.height, info.width) == ((40, 60) if orientation < 5 else (60, 40))
    assert info.duration_s == 0 and info.container == {".jpg": "jpeg", ".png": "png"}[Path(name).suffix]


def test_a_picture_that_cannot_be_probed_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:40])
    for name, expected in {"page.jpg": "undecodable", "cut.jpg": "undecodable", "no.jpg": "missing_file"}.items():
        with pytest.raises(DecodeError) as caught:
            probe_picture(str(tmp_path / name))
        assert caught.value.reason == expected
