"""README's commands run, its paths exist, and the Chinese README has the same commands."""

import json
import re
import runpy
import shlex
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from models.weights import find_checkpoint, read_info, read_null_text, read_weights, save_checkpoint
from pipelines.config import load_config
from shards.dataset import Dataset
from stages.encode_config import EncodeConfig
from stages.evaluation.compare_config import CompareConfig
from stages.evaluation.config import EvaluateConfig
from stages.sampling.config import SampleConfig
from stages.training.config import TrainConfig, transformer_config
from tests.end_to_end.conftest import Road
from tests.resident import ResidentRanks
from tests.running import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "docs" / "zh" / "README.md").read_text(encoding="utf-8")
CONFIGS = {"encode": EncodeConfig, "train": TrainConfig, "sample": SampleConfig, "evaluate": EvaluateConfig}
CONFIGS["compare"] = CompareConfig
STARTS = ("python -m pipelines", "deepspeed ", "make ", "pip ", "conda ")


def commands(text: str) -> list[str]:
    """The commands in code blocks, then those in tables and sentences."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in (*lines, *inline) if line.startswith(STARTS) and " " in line.strip()]


def test_both_readmes_have_the_same_commands() -> None:
    assert len(commands(README)) > 8
    assert commands(CHINESE) == commands(README)


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"TABLE|TODO", README + CHINESE)


def test_the_file_tree_and_the_configs_that_readme_names_exist() -> None:
    named = re.findall(r"(?:configs|docs|models|pipelines|stages|shards|tests|benchmarks)/[\w./-]*", README)
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_starts_with_its_command(path: Path) -> None:
    name = "compare" if path.stem.endswith("_compare") else path.parent.name
    config = load_config(CONFIGS[name], path, [])
    if isinstance(config, TrainConfig):
        transformer_config(config)
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ") and path.parent.name in first and second.startswith("# ")


def test_the_commands_that_train_on_many_gpus_have_settings_that_exist() -> None:
    lines = [line for line in commands(README) if "--config" in line and "pipelines/train.py" in line]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line)
        option, file, *settings = words[words.index("pipelines/train.py") + 1 :]
        assert option == "--config" and load_config(TrainConfig, ROOT / file, settings).output == "RUN"


def pipeline_commands() -> list[str]:
    others = ("encode.md", "clusters.md", "sample.md", "evaluate.md", "compare.md")
    pages = (README, *((ROOT / "docs" / name).read_text(encoding="utf-8") for name in others))
    found = [line for page in pages for line in commands(page) if "KIND" not in line]
    return [line for line in found if line.startswith(("python -m pipelines", "deepspeed pipelines"))]


@pytest.mark.parametrize("line", sorted(set(pipeline_commands())))
def test_a_command_of_readme_runs(
    line: str, road: Road, resident_ranks: ResidentRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As it stands but for its folders, on the tiny models; what takes long stops at --dry-run."""
    data = road.shards.parent / "data"
    captions = tmp_path / "short.jsonl"
    key = Dataset.open(road.shards).index("64x64x8")["key"][0].as_py()
    captions.write_text(json.dumps({"key": key, "caption": "c"}))
    (tmp_path / "prompts.txt").write_text("a red ball moves left\n")
    launched, name = re.match(r"(deepspeed pipelines/|python -m pipelines\.)(\w+)", line).groups()
    places = {
        "data.metadata=…": f"data.metadata={data / 'InternVid-shapes.jsonl'}",
        "data.videos=…": f"data.videos={data / 'videos'}",
        "data.videos=my_videos": f"data.videos={data / 'videos'}",
        "data.shards=DATASET": f"data.shards={road.shards}",
        "ckpt=RUN": f"ckpt={road.run}",
        "pretrained_model_path=…": "pretrained_model_path=tiny",
        "output=RUN": f"output={tmp_path / 'run'}",
        "output=DATASET": f"output={tmp_path / 'shards'}",
        "output=datasets/mine": f"output={tmp_path / 'shards'}",
        "text_encoder.captions=short.jsonl": f"text_encoder.captions={captions}",
        "DATASET": str(road.shards),
        "pretrained_model_path=MODELS": "pretrained_model_path=tiny",
        "text_prompt=prompts.txt": f"text_prompt={tmp_path / 'prompts.txt'}",
        "text_prompt=all_dimension.txt": f"text_prompt={tmp_path / 'prompts.txt'}",
        "outputs/samples/0001-a-blue-square-moves-up.mp4": str(road.samples / "0001-a-blue-square-moves-up.mp4"),
    }
    if name == "evaluate":
        places |= {
            "RUN": str(road.run),
            "against=RUN2": f"against={road.run}",
            "samples=SAMPLES": f"samples={road.samples}",
        }
    if name == "export":
        places |= {"RUN": str(exportable(road.run, tmp_path / "latte")), "DIR": str(tmp_path / "exported")}
    if "--columns" in line:
        places["output=DATASET"] = f"output={road.shards}"
    if "--compare" in line:
        name = "compare"
        (file,) = (word for word in line.split() if word.startswith("configs/"))
        places[file] = str(tmp_path / "compare.yaml")
        (tmp_path / "compare.yaml").write_text(
            (ROOT / file).read_text().replace("outputs/demo/shards", str(road.shards))
        )
    words = [places.get(word, word) for word in shlex.split(line)]
    tiny = ["vae=tiny", "text_encoder=tiny", "clip={height: 64, width: 64, frames: 8}", "--dry-run"]
    small = [] if "--from-file" in line else ["pretrained_model_path=tiny", f"ckpt={road.run}", "steps=1"]
    if not re.search("--from-file|--prompt|text_prompt=", line):
        small.append("text_prompt=a red ball moves left")
    samples = 5 if "samples_per_prompt=5" in line else 1
    ours = {
        "encode": tiny,
        "train": ["model={preset: tiny}", "train.init_from=null", "validation.holdout=0.2", "--dry-run"],
        "sample": [*small, "precision=fp32", f"output={tmp_path}"],
        "evaluate": [f"output={tmp_path}", "loss={samples: 8, levels: 2}", "clips={samples: 2, steps: 2}"],
        "compare": ["--dry-run", f"output={tmp_path}"],
        "browse": ["--dry-run", f"output={tmp_path}"],
        "verify": ["--dry-run"],
        "export": [],
        "app": ["--dry-run", f"output={tmp_path}"],
    }
    if name == "app" and find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install -e '.[app]' to run this test")
    if launched.startswith("deepspeed"):
        told = resident_ranks.run(2, *words[1:], *ours[name]).stdout
    else:
        _, _, module, *arguments = words
        assert run_as_main(module, [*arguments, *ours[name]], monkeypatch) == 0
        told = capsys.readouterr().out
    expected = {
        "encode": "48 c",  # clips, or captions
        "train": "passes over them",
        "sample": f"{samples} videos",
        "evaluate": "report",
        "compare": "2 arms x 3 seeds",
        "browse": "clips",
        "verify": "shards of",
        "export": "LatteTransformer3DModel of",
        "app": "trained for 4 steps on",
    }
    assert (expected[name] if "--tune" not in line else "for a new dataset: vae.batch_frames=") in told
    if name == "sample":
        assert len(json.loads((tmp_path / "summary.json").read_text())["samples"]) == samples


def run_as_main(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """What ``python -m module`` exits with, in this process."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)  # which runpy would warn of
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return ended.value.code


def exportable(run_folder: Path, copy: Path) -> Path:
    """The run's checkpoint without pooled_text, which Latte cannot express."""
    source = find_checkpoint(run_folder)
    info = read_info(source)
    info = replace(info, transformer=replace(info.transformer, pooled_text=False))
    weights = {
        name: {key: tensor for key, tensor in read_weights(source, name).items() if not key.startswith("pooled_text")}
        for name in info.weights
    }
    copy.mkdir()
    save_checkpoint(copy, info, weights, read_null_text(source))
    return copy
