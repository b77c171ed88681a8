"""Which samples run together, and what is in memory meanwhile."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.loading import load_transformer
from models.text import TextEncoder
from models.vae import FrozenVAE
from stages.sampling.config import SampleConfig, TextEncoderConfig
from stages.sampling.denoise import Given, Request
from stages.sampling.generate import fixed_batches
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
