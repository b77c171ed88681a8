"""Which samples run together, and what is in memory meanwhile."""

import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models.loading import load_transformer
from models.text import TextEncoder
from models.vae import FrozenVAE
from pipelines.command import run
from pipelines.sample import main
from stages.sampling.config import GivenConfig, SampleConfig, TextEncoderConfig
from stages.sampling.denoise import Given, Request
from stages.sampling.generate import fixed_batches, portions
from stages.sampling.models import Models
from stages.sampling.sample import sample
from tests.stages.small_run import small_run


def _request(tokens: int, null_tokens: int = 1, given: bool = False) -> Request:
    frames = Given(torch.zeros(4, 2, 8, 8), torch.tensor([True, False])) if given else None
    return Request(torch.zeros(tokens, 6), torch.zeros(null_tokens, 6), 0, frames)


def test_only_samples_of_the_same_shapes_run_together() -> None:
    requests = [
        _request(16), _request(17), _request(1), _request(3, null_tokens=120), _request(2), _request(32),
        _request(5, given=True),
    ]  # fmt: skip
    assert [request.padded_tokens for request in requests] == [16, 32, 16, 128, 16, 32, 16]
    assert list(fixed_batches(requests, 2)) == [(0, 2), (4,), (1, 5), (3,), (6,)]


def test_portions_are_of_whole_batches_which_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two lengths of text; each rank, of two, has two batches a portion."""
    monkeypatch.setattr("stages.sampling.generate.PORTION_BATCHES", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    requests = [_request(17 if number % 3 else 1) for number in range(23)]
    found = list(portions(requests, SampleConfig(batch_size=2)))
    assert [len(portion) for portion in found] == [8, 8, 7] and all(portion == sorted(portion) for portion in found)
    again = [
        tuple(portion[place] for place in batch)
        for portion in found
        for batch in fixed_batches([requests[number] for number in portion], 2)
    ]
    assert again == list(fixed_batches(requests, 2))
    for formats in (("gif",), ("mp4", "latents")):
        assert list(portions(requests, SampleConfig(batch_size=2, formats=formats))) == [list(range(23))]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(list(portions(requests, SampleConfig(batch_size=2)))) == 6


def test_models_take_turns_and_are_loaded_as_asked(tmp_path: Path) -> None:
    loaded: dict[str, weakref.ref] = {}
    asked: dict[str, Any] = {}

    def recorded(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def loader(*arguments: Any, **named: Any) -> Any:
            assert [other for other, model in loaded.items() if model() is not None] == []
            asked[name] = (*arguments[1:], *named.values())
            model = load(*arguments, **named)
            loaded[name] = weakref.ref(model)
            return model

        return loader

    models = Models(
        torch.device("cpu"), recorded("text", TextEncoder.load), recorded("transformer", load_transformer),
        recorded("vae", FrozenVAE.load),
    )  # fmt: skip
    sample(
        SampleConfig(
            text_prompt="a ball", ckpt=str(small_run(tmp_path / "run")), output=str(tmp_path / "out"), height=32,
            width=32, frames=2, steps=1, batch_size=1, vae_batch_frames=1, vae_band_rows=8, formats=("png",),
            text_encoder=TextEncoderConfig("bf16", "cpu"),
        ),
        models,
    )  # fmt: skip
    assert list(loaded) == ["text", "transformer", "vae"]
    assert asked["text"] == ("cpu", torch.bfloat16, 120) and asked["vae"] == (torch.device("cpu"), 1, 8)


def test_compiled_blocks_make_the_same_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as torch.compile traces it, but run by PyTorch's own kernels: a C++ compiler takes minutes."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    config = SampleConfig(
        text_prompt="a ball", ckpt=str(small_run(tmp_path / "run")), height=32, width=32, frames=2, steps=1,
        batch_size=1, formats=("latents",),
    )  # fmt: skip
    made, graphs = [], []
    for number, compiled in enumerate((False, True, True)):  # the last as a portion that comes later
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        folder = tmp_path / str(number)
        sample(replace(config, output=str(folder), compile=compiled), Models(torch.device("cpu")))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        made.append(load_file(folder / "latents.safetensors")["latents"])
    assert graphs == [0, 2, 0]  # a spatial and a temporal block
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=2**-9)  # two roundings to float16


def test_samples_that_are_not_finite_fail_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three, where guidance overflows; none of them is written."""
    arguments = ["text_prompt=[one, two, three]", f"ckpt={small_run(tmp_path / 'run')}", f"output={tmp_path / 'out'}",
                 "height=32", "width=32", "frames=2", "steps=2", "guidance_scale=1e38", "seed=5"]  # fmt: skip
    assert run(main, arguments) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "3 of 3 samples are not finite (seeds 5, 6, 7): guidance_scale may be too high" in told
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_models_that_are_kept_are_loaded_once_also_for_given_frames(tmp_path: Path) -> None:
    picture, loads = tmp_path / "a.png", []

    def load(*arguments: Any, **named: Any) -> FrozenVAE:
        loads.append(FrozenVAE.load(*arguments, **named))
        return loads[-1]

    Image.new("RGB", (40, 40), "red").save(picture)
    models = replace(Models(torch.device("cpu")), vae=load).kept()
    config = SampleConfig(
        text_prompt="a ball", ckpt=str(small_run(tmp_path / "run", conditioning=("first",))), height=32, width=32,
        frames=2, steps=1, given=GivenConfig(first=str(picture)), vae_batch_frames=2,
    )  # fmt: skip
    for seed in (0, 1):
        sample(replace(config, seed=seed, output=str(tmp_path / "out")), models)
    assert [vae.batch_frames for vae in loads] == [2]


def test_what_changes_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"ckpt={small_run(tmp_path / 'run')}", f"output={tmp_path / 'out'}", "height=32", "width=32",
                "frames=2", "steps=1"]  # fmt: skip
    assert run(main, ["--prompt", "a ball", "negative_prompt=blue", *settings]) == 0
    assert not {"cut", "negative_prompt"} & set(re.split(r"\W+", capsys.readouterr().out))
    assert run(main, ["--prompt", "ball " * 150, "negative_prompt=blue", "guidance_scale=1", *settings]) == 0
    told = capsys.readouterr().out
    assert "1 prompts are cut after 120 tokens, such as 'ball ball" in told
    assert "negative_prompt changes nothing" in told
