"""Comparisons: which arms may be compared, what they share, and runs that are made once and judged by a plain loop."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipelines.command import run
from pipelines.evaluate import main
from shards.schema import LATENTS, text_column
from stages.evaluation.arms import Arm
from stages.evaluation.judge import judge
from stages.training.config import TrainConfig
from tests.running import ROOT
from tests.stages.training.mixed_dataset import COUNTS, FINGERPRINTS, VAE, mixed_dataset

SETTINGS = ["train.steps=2", "train.batch_size=4", "validation.holdout=0.2"]
TRAIN = {"model": {"preset": "tiny", "num_layers": 1}, "objective": {"prediction": "velocity"}}
TRAIN["train"] = {"precision": "fp32"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_dataset(tmp_path_factory.mktemp("compare") / "shards")


def write(folder: Path, shards: Path, arms: dict[str, list[str]], **changes: object) -> Path:
    """A file of a comparison, whose runs are made by plain Python: one rank, no launcher."""
    settings = [*SETTINGS, f"data.shards={shards}"]
    train = folder / "train.yaml"
    train.write_text(yaml.safe_dump(TRAIN))
    content = {
        "train": str(train), "settings": settings, "arms": arms, "seeds": [0, 1],
        "loss": {"samples": 12, "levels": 3}, "launcher": sys.executable, "output": str(folder / "out"),
    }  # fmt: skip
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return file


def told(capsys: pytest.CaptureFixture[str], *arguments: object, status: int) -> str:
    assert run(main, [str(argument) for argument in ("--compare", *arguments)]) == status
    captured = capsys.readouterr()
    return captured.err.splitlines()[-1] if status else captured.out


def test_a_dry_run_tells_what_would_be_made_and_what_arms_share(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arms = {"all": [], "again": ["data.filter=split >= 0"], "half": ["data.filter=split < 0.6"]}
    sizes = ["train.batch_size=null", "train.batch_tokens=256", "train.batch_multiple=1", "train.steps=100"]
    file = write(tmp_path, shards, arms, settings=[*SETTINGS, f"data.shards={shards}", *sizes], output="~/out")
    text = told(capsys, file, "--dry-run", status=0)
    assert f"{tmp_path}/out/all/seed-0: " in text
    assert "3 arms x 2 seeds" in text and "judged on 12 clips" in text and "(split < 0.2), captions t5" in text
    lines = {name: next(line for line in text.splitlines() if line.startswith(f"{name}: ")) for name in arms}
    assert 'passes, in the order of the first; data.filter is "split >= 0", not ""' in lines["again"]
    clips = {name: int(line.split()[1]) for name, line in lines.items()}
    assert clips["all"] == clips["again"] > clips["half"] > 0.3 * clips["all"]
    assert f"{clips['half']} of them the first arm has too" in lines["half"]
    assert f"{sys.executable} {ROOT}/pipelines/train.py --config {tmp_path}/out/half/seed-1.yaml" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.yaml", "train.yaml"]


def test_arms_may_differ_in_captions_or_in_the_dataset(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another dataset those clips are shared that have the same keys; all are judged on the first arm's."""
    short = mixed_dataset(tmp_path / "short", FINGERPRINTS | {text_column("short"): FINGERPRINTS[text_column("t5")]})
    fewer = mixed_dataset(tmp_path / "fewer", counts=COUNTS | {"64x64x1": [60]})
    arms = {"all": [], "short": ["data.text=short"], "mixed": ["data.text={t5: 0.5, short: 0.5}"],
            "fewer": [f"data.shards={fewer}"]}  # fmt: skip
    settings = [*SETTINGS, f"data.shards={short}", "train.batch_size=null", "train.batch_tokens=256",
                "train.batch_multiple=1", "train.steps=200"]  # fmt: skip
    text = told(capsys, write(tmp_path, shards, arms, settings=settings), "--dry-run", status=0)
    assert f"judged on 12 clips of {short} that are in no arm (split < 0.2), captions t5" in text
    lines = {name: next(line for line in text.splitlines() if line.startswith(f"{name}: ")) for name in arms}
    for name in ("short", "mixed"):
        assert "in the order of the first; data.text is " in lines[name], name
    clips = {name: int(line.split()[1]) for name, line in lines.items()}
    assert clips["all"] > clips["fewer"] > 0 and f"{clips['fewer']} of them the first arm has too" in lines["fewer"]
    assert f'data.shards is "{fewer}", not "{short}"' in lines["fewer"] and "in the order" not in lines["fewer"]


def with_fingerprint(column: str, **changes: object) -> dict[str, dict]:
    return {name: {**found, **(changes if name == column else {})} for name, found in FINGERPRINTS.items()}


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (["data.shards=VAE"], "arm other has another VAE than the first arm"),
        (["data.shards=T5"], "arm other has another text encoder than the first arm"),
        (["objective.prediction=epsilon"], "arm other has another objective than the first arm"),
        (["validation.holdout=0"], "validation.holdout: found all 0.2, other 0, expected the same share above 0"),
        (["validation.holdout=0.3"], "validation.holdout: found all 0.2, other 0.3, expected the same share"),
        (["train.batch_size=8"], "give other the setting train.steps=1"),
        (["data.shards="], "arm other: data.shards is not set"),
        (["data.filtr=split < 1"], "arm other: unknown key 'data.filtr', did you mean 'data.filter'?"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(
    arm: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"VAE": with_fingerprint(LATENTS, vae={**VAE, "weights_hash": "cc"}),
              "T5": with_fingerprint(text_column("t5"), text_encoder={"weights_hash": "dd", "dim": 6})}  # fmt: skip
    for name, fingerprints in places.items():
        if f"data.shards={name}" in arm:
            arm = [f"data.shards={mixed_dataset(tmp_path / name, fingerprints)}"]
    assert message in told(capsys, write(tmp_path, shards, {"all": [], "other": arm}), status=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"all": []}}, "arms: found 1, expected two or more"),
        ({"arms": {"all": [], "../x": []}}, "arms: found '../x', expected a name"),
        ({"seeds": [1]}, "seeds: found [1], expected two or more that differ"),
        ({"seeds": [1, 1]}, "seeds: found [1, 1], expected two or more that differ"),
        ({"loss": {"samples": 1}}, "common_ground: 1 clips of 1 source, expected two sources or more"),
        ({"launcher": "no-such-launcher"}, "launcher: cannot run 'no-such-launcher'"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(
    changes: dict, message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, shards, **{"arms": {"all": [], "again": []}, **changes})
    assert message in told(capsys, file, status=2)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (["model.qk_norm=true"], [], "model.qk_norm was true, is absent"),
        (["data.text={t5: 0.7, none: 0.3}"], ["data.text={t5: 0.7}"], "data.text.none was 0.3, is absent"),
        ([], ["optimizer.lr=0.5"], "optimizer.lr was 0.0001, is 0.5"),
    ],
)
def test_a_run_that_was_begun_with_other_settings_is_not_taken_for_this_one(
    before: list[str], now: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def arms(settings: list[str]) -> Path:
        return write(tmp_path, shards, {"all": [], "again": []}, launcher="false", settings=[*common, *settings])

    none = mixed_dataset(tmp_path / "none", FINGERPRINTS | {text_column("none"): FINGERPRINTS[text_column("t5")]})
    common = [*SETTINGS, f"data.shards={none}"]
    assert "all/seed-0 ended with exit status 1" in told(capsys, arms(before), status=1)  # begun, and no more
    assert f"all/seed-0 was begun with other settings ({message}): give" in told(capsys, arms(now), status=2)
    assert "all/seed-0 ended" in told(capsys, arms(before), status=1)


def test_an_arm_is_judged_against_the_first_seed_by_seed_and_clip_by_clip() -> None:
    """Spreads between seeds and clips, far larger than the difference, that pairing takes away."""
    draw = np.random.default_rng(0)
    shared = 10 * draw.normal(size=(3, 1, 1)) + 10 * draw.normal(size=(1, 40, 1))
    own = {name: shared + 0.1 * draw.normal(size=(3, 40, 2)) for name in ("all", "better", "level")}
    own["better"] = own["better"] - 0.3
    own["level"] = own["level"] + np.array([0.0, 0.5])
    arms = [Arm(name, TrainConfig(), 40, 40, True, 1.0, 100, []) for name in own]
    all_of, better, level = judge(arms, own, [str(number) for number in range(40)])
    assert all_of.difference is None and all_of.loss == pytest.approx(own["all"].mean())
    assert better.difference and better.difference.value == pytest.approx((own["better"] - own["all"]).mean())
    assert [one.verdict for one in (all_of, better, level)] == ["compared with", "better", "worse"]
    assert [difference.told for difference in level.level_differences] == [False, True]
    assert level.by_level == pytest.approx(own["level"].mean((0, 1)))
