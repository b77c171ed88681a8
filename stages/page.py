"""Pages for a person: one HTML file each that asks for no other. ``page.html`` holds the look they share."""

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from stages.video import write_mp4

PIXELATED_BELOW_PX = 128
"""Videos of fewer pixels than this are enlarged without smoothing."""
CRF, JPEG_QUALITY = 17, 88
"""Of pictures that are made for a page: losses that nobody sees."""


def render_page(template: str, **values: Any) -> str:
    """A page as text. ``template`` is the name of one in this folder; what it names must be in ``values``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": lambda value: f"{value:,}"}
    return environment.get_template(template).render(values, pixelated_below_px=PIXELATED_BELOW_PX)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def data_uri(kind: str, content: bytes) -> str:
    """A file inside a page. kind: its media type, such as ``video/mp4``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def mp4_uri(frames: np.ndarray, fps: float) -> str:
    """A video for a page. frames: uint8 [T, H, W, 3], H and W even."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames, fps, crf=CRF)
        return data_uri("video/mp4", path.read_bytes())


def jpeg_uri(picture: np.ndarray) -> str:
    """A picture for a page. picture: uint8 [H, W, 3]."""
    target = io.BytesIO()
    Image.fromarray(picture).save(target, "JPEG", quality=JPEG_QUALITY)
    return data_uri("image/jpeg", target.getvalue())
