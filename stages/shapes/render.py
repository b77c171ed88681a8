"""Moving shapes: a small text-to-video dataset that the project renders itself.

Every clip shows one shape of one colour that moves in one direction, as a real H.264 .mp4 file named and
listed as InternVid names and lists its clips, so that it takes the same road as downloaded videos. Because a
caption says all there is to see, a generated sample can be checked against its prompt (``check.py``).

One combination in five is never rendered. Number the 72 combinations 0..71, colours slowest and directions
fastest; every number divisible by 5 is held out. The number is 12c + 4s + d, which is 2c + 4s + d modulo 5, so
a colour and a shape lose at most one of their 4 directions, a colour and a direction at most one of their 3
shapes, a shape and a direction at most two of their 6 colours: every pair of attributes stays in training.
"""

import base64
import hashlib
import itertools
import json
import os
import shutil
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from stages.errors import ConfigError
from stages.video import write_mp4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "yellow": (225, 225, 35),
    "green": (35, 205, 35),
    "cyan": (35, 215, 225),
    "blue": (45, 65, 235),
    "purple": (215, 35, 215),
}
SHAPES = ("ball", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUND = (24, 24, 28)
"""sRGB of everything that is not the shape."""

METADATA_NAME = "InternVid-shapes.jsonl"
PROMPTS_NAME = "prompts.txt"
VIDEOS_NAME = "videos"
CONFIG_NAME = "shapes.json"

HELD_OUT_EVERY = 5
SEEN_PROMPTS = 1
HELD_OUT_PROMPTS = 8
"""How often prompts.txt names each combination of either kind."""

HALF_SIZE_SHARE = (0.11, 0.17)
TRAVEL_SHARE = (0.28, 0.54)
"""Ranges of a shape's half size, and of its way over the whole clip, as shares of the picture's side."""


@dataclass(frozen=True)
class ShapesConfig:
    """What is rendered; equal configs give equal frames.

    Attributes:
        clips: number of clips; the training combinations take turns, so that each has an equal share.
        size_px: height and width of a clip.
        frames: frames in a clip.
        fps: frames a second.
        seed: of sizes, places and speeds.
        crf: x264's quality, 0 (lossless) to 51.
    """

    clips: int = 1900
    size_px: int = 64
    frames: int = 8
    fps: int = 8
    seed: int = 0
    crf: int = 10

    def __post_init__(self) -> None:
        for name, least in (("clips", 1), ("size_px", 32), ("frames", 2), ("fps", 1), ("crf", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"shapes: {name} is {getattr(self, name)}; it must be at least {least}")
        if self.size_px % 2:
            raise ConfigError(f"shapes: size_px is {self.size_px}; H.264's 4:2:0 needs an even number")

    @property
    def duration_s(self) -> Fraction:
        """Length of every clip in seconds."""
        return Fraction(self.frames, self.fps)


@dataclass(frozen=True, order=True)
class Combination:
    """What a clip shows: keys of COLOURS and DIRECTIONS, and one of SHAPES."""

    colour: str
    shape: str
    direction: str


def combinations() -> list[Combination]:
    """All 72, in the order that numbers them."""
    return [Combination(*names) for names in itertools.product(COLOURS, SHAPES, DIRECTIONS)]


def held_out() -> list[Combination]:
    """The 15 that no clip shows: every fifth, see the head of this file."""
    return combinations()[::HELD_OUT_EVERY]


def seen() -> list[Combination]:
    """The 57 that the clips show."""
    return [c for number, c in enumerate(combinations()) if number % HELD_OUT_EVERY]


def caption(combination: Combination) -> str:
    """The one sentence that describes a combination."""
    return f"a {combination.colour} {combination.shape} moves {combination.direction}"


def parse_caption(text: str) -> Combination:
    """The combination that ``caption`` wrote; ConfigError for any other text."""
    words = text.lower().split()
    if len(words) == 5 and words[0] == "a" and words[3] == "moves":
        colour, shape, direction = words[1], words[2], words[4]
        if colour in COLOURS and shape in SHAPES and direction in DIRECTIONS:
            return Combination(colour, shape, direction)
    raise ConfigError(f"not a caption of the shapes dataset: {text!r}; expected 'a red ball moves left'")


def prompts() -> list[str]:
    """Captions to sample: every seen combination once, every held-out one 8 times in a row."""
    counts = [(c, SEEN_PROMPTS) for c in seen()] + [(c, HELD_OUT_PROMPTS) for c in held_out()]
    return [caption(combination) for combination, count in counts for _ in range(count)]


def shape_coverage(shape: str, centre_px: tuple[float, float], half_size_px: float, size_px: int) -> np.ndarray:
    """How much of each pixel a shape covers: float32 [size, size] in 0..1, antialiased over one pixel.

    ``centre_px`` is (x, y) of the centroid with pixel centres at whole numbers plus a half. A ball has the radius
    ``half_size_px``, a square half the side, a triangle (apex up) the distance from its centroid to its base.
    """
    at = np.arange(size_px, dtype=np.float32) + 0.5
    x, y = at[None, :] - centre_px[0], at[:, None] - centre_px[1]
    if shape == "ball":
        outside_px = np.hypot(x, y) - half_size_px
    elif shape == "square":
        outside_px = np.maximum(np.abs(x), np.abs(y)) - half_size_px
    elif shape == "triangle":
        slanted = 0.5 * np.sqrt(3.0) * np.abs(x) - 0.5 * y
        outside_px = np.maximum(slanted, y) - half_size_px
    else:
        raise ValueError(f"unknown shape {shape!r}; expected one of {SHAPES}")
    return np.clip(0.5 - outside_px, 0.0, 1.0).astype(np.float32)


def half_extents(shape: str, half_size_px: float) -> tuple[float, float, float]:
    """Reach of a shape from its centroid in pixels: to either side, up, down."""
    if shape == "triangle":
        return np.sqrt(3.0) * half_size_px, 2 * half_size_px, half_size_px
    return half_size_px, half_size_px, half_size_px


def render_frames(combination: Combination, config: ShapesConfig, rng: np.random.Generator) -> np.ndarray:
    """One clip, uint8 [frames, size, size, 3]: the shape crosses part of the picture and stays inside it."""
    half_size_px = config.size_px * rng.uniform(*HALF_SIZE_SHARE)
    if combination.shape == "triangle":
        half_size_px *= 0.72  # about the area of a ball of the same half size
    travel_px = config.size_px * rng.uniform(*TRAVEL_SHARE)
    side, up, down = half_extents(combination.shape, half_size_px)
    step = np.array(DIRECTIONS[combination.direction])
    low = np.array([side, up]) + 1 + np.maximum(-step, 0) * travel_px
    high = config.size_px - np.array([side, down]) - 1 - np.maximum(step, 0) * travel_px
    start = rng.uniform(low, high)
    colour = np.array(COLOURS[combination.colour], np.float32)
    background = np.array(BACKGROUND, np.float32)
    frames = np.empty((config.frames, config.size_px, config.size_px, 3), np.uint8)
    for number in range(config.frames):
        x, y = start + step * travel_px * number / (config.frames - 1)
        covered = shape_coverage(combination.shape, (x, y), half_size_px, config.size_px)[..., None]
        frames[number] = np.rint(background + covered * (colour - background)).astype(np.uint8)
    return frames


def clip_row(number: int, combination: Combination, config: ShapesConfig) -> dict[str, str | float]:
    """The clip's line of metadata, with InternVid's keys; the id is a hash, 11 characters of YouTube's alphabet."""
    digest = hashlib.sha256(f"shapes {config.seed} {number}".encode()).digest()
    seconds = float(config.duration_s)
    hours, minutes = int(seconds // 3600), int(seconds // 60) % 60
    return {
        "YoutubeID": base64.urlsafe_b64encode(digest[:8]).decode()[:11],
        "Start_timestamp": "00:00:00.000",
        "End_timestamp": f"{hours:02d}:{minutes:02d}:{seconds % 60:06.3f}",
        "Caption": caption(combination),
        "Aesthetic_Score": 5.0,
        "UMT_Score": 0.5,
    }


def clip_name(row: dict[str, str | float]) -> str:
    """InternVid's own file name of a clip."""
    return f"{row['YoutubeID']}_{row['Start_timestamp']}_{row['End_timestamp']}.mp4"


def render_dataset(folder: Path, config: ShapesConfig) -> tuple[Path, Path]:
    """Render the clips, their metadata and ``prompts.txt`` into ``folder``, or find them there.

    The folder appears whole: it is rendered under another name beside it and renamed. A folder that is complete
    with the same config is left as it is.

    Returns:
        The metadata file and the folder of videos.

    Raises:
        ConfigError: ``folder`` holds something else, or clips of another config.
    """
    paths = folder / METADATA_NAME, folder / VIDEOS_NAME
    if _is_complete(folder, config):
        return paths
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    (partial / VIDEOS_NAME).mkdir(parents=True)
    _render_into(partial, config)
    os.replace(partial, folder)
    return paths


def _is_complete(folder: Path, config: ShapesConfig) -> bool:
    """Whether ``folder`` holds this config's dataset; False when it is absent or empty."""
    written = folder / CONFIG_NAME
    if not written.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} holds no {CONFIG_NAME}, so it is not a shapes dataset; name an empty folder")
        return False
    there, wanted = json.loads(written.read_text()), asdict(config)
    differing = [f"{k} is {there.get(k)} there, {wanted[k]} wanted" for k in wanted if there.get(k) != wanted[k]]
    if differing:
        raise ConfigError(f"{folder} was rendered otherwise: {', '.join(differing)}; name another folder or remove it")
    return True


def _render_into(folder: Path, config: ShapesConfig) -> None:
    shown = seen()
    lines = []
    for number in range(config.clips):
        combination = shown[number % len(shown)]
        row = clip_row(number, combination, config)
        frames = render_frames(combination, config, np.random.default_rng([config.seed, number]))
        write_mp4(folder / VIDEOS_NAME / clip_name(row), frames, config.fps, crf=config.crf)
        lines.append(json.dumps(row))
    (folder / METADATA_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / PROMPTS_NAME).write_text("\n".join(prompts()) + "\n", encoding="utf-8")
    (folder / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")
