"""Three layers of settings, and mistakes that are found, named and reported together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pipelines.config import load_config
from stages.errors import ConfigError


@dataclass(frozen=True)
class Clip:
    height: int = 256
    frames: int | list[int] = 56
    fps: float = 8.0


@dataclass(frozen=True)
class Model:
    name: str = "tiny"
    batch: int = 8


@dataclass(frozen=True)
class Train:
    init_from: str | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    log: bool = False


@dataclass(frozen=True)
class Settings:
    output: str = ""
    prompts: str | list[str] = ""
    betas: tuple[float, float] = (0.9, 0.999)
    steps: tuple[int, ...] = ()
    clip: Clip = field(default_factory=Clip)
    vae: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    free: dict[str, Any] = field(default_factory=dict)


def load(*overrides: str, yaml: str = "", tmp_path: Path | None = None) -> Settings:
    file = None
    if tmp_path:
        file = tmp_path / "settings.yaml"
        file.write_text(yaml)
    return load_config(Settings, file, overrides)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    settings = load("clip.height=64", yaml="clip: {height: 128, fps: 4}\noutput: here", tmp_path=tmp_path)
    assert (settings.clip.height, settings.clip.fps, settings.clip.frames) == (64, 4.0, 56)
    assert settings.output == "here"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("clip.frames=[8, 16]", lambda s: s.clip.frames, [8, 16]),
        ("clip={height: 3, fps: 2}", lambda s: (s.clip.height, s.clip.frames), (3, 56)),
        ("clip.frames=8", lambda s: s.clip.frames, 8),
        ("clip.fps=1e-4", lambda s: s.clip.fps, 1e-4),  # text to YAML 1.1
        ("betas=[0.5, 1]", lambda s: s.betas, (0.5, 1.0)),
        ("steps=[1, 2, 3]", lambda s: s.steps, (1, 2, 3)),
        ("train.init_from=null", lambda s: s.train.init_from, None),
        ("train.log=true", lambda s: s.train.log, True),
        ("output=a red ball: moves", lambda s: s.output, "a red ball: moves"),  # no YAML
        ("output=1984", lambda s: s.output, "1984"),
        ("output=a=b", lambda s: s.output, "a=b"),
        ("output=[a, b]", lambda s: s.output, "[a, b]"),
        ("prompts=[a, 'b, c', '']", lambda s: s.prompts, ["a", "b, c", ""]),
        ("prompts=[2001, 1.50, yes, null, a cat]", lambda s: s.prompts, ["2001", "1.50", "yes", "null", "a cat"]),
        ("prompts=a cat: it runs", lambda s: s.prompts, "a cat: it runs"),
        ("prompts=[a] and b", lambda s: s.prompts, "[a] and b"),  # no YAML
        ("vae=/models/vae", lambda s: (s.vae.name, s.vae.batch), ("/models/vae", 8)),
        ("vae.batch=2", lambda s: (s.vae.name, s.vae.batch), ("tiny", 2)),
        ("free.zero.stage=2", lambda s: s.free, {"zero": {"stage": 2}}),
    ],
)
def test_values_are_read_as_their_type(override: str, read: Any, value: object) -> None:
    assert read(load(override)) == value


def test_a_name_and_the_rest_of_a_section_merge_whatever_their_order(tmp_path: Path) -> None:
    assert load("vae=x", yaml="vae: {batch: 2}", tmp_path=tmp_path).vae == Model("x", 2)
    assert load("vae.batch=2", yaml="vae: x", tmp_path=tmp_path).vae == Model("x", 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clip.hieght=64", "unknown key 'clip.hieght', did you mean 'clip.height'"),
        ("height=64", "unknown key 'height', did you mean 'clip.height'"),
        ("work_dir=x", "did you mean 'output'"),
        ("load_from=x", "did you mean 'train.init_from'"),
        ("clip.height", "settings are written key.path=value"),
        ("clip.height=tall", "clip.height: found 'tall', expected a whole number"),
        ("clip.height=64.5", "clip.height: found 64.5, expected a whole number"),
        ("betas=[0.9]", "betas: found [0.9], expected a list of 2 values"),
        ("train.log=1", "expected true or false"),
        ("train.precision=fp16", "expected one of 'bf16', 'fp32'"),
        ("clip=8", "clip: found 8, expected keys such as clip.fps"),
        ("prompts=[a cat: running, b]", "found [{'a cat': 'running'}, 'b'], expected a text or a list of a text"),
        ("clip.frames=many", "expected a whole number or a list of a whole number"),
    ],
)
def test_a_mistake_says_what_was_found_and_what_was_expected(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(override)
    assert message in str(error.value)


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load("outptu=x", "train.log=7", yaml="clip: {hight: 3}", tmp_path=tmp_path)
    assert all(name in str(error.value) for name in ("outptu", "train.log", "clip.hight"))


@pytest.mark.parametrize("yaml", ["- a list", "a: [unclosed", "clip: {height: 64}\nclip: {width: 64}"])
def test_a_file_that_is_no_settings_is_refused(yaml: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="settings.yaml"):
        load(yaml=yaml, tmp_path=tmp_path)


def test_a_key_that_comes_twice_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found height twice .*line 3"):
        load(yaml="clip:\n  height: 64\n  height: 32\n", tmp_path=tmp_path)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="no config file at nowhere.yaml"):
        load_config(Settings, "nowhere.yaml", [])
