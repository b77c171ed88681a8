"""What diffusers makes of an exported folder, and what it cannot express."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LattePipeline, LatteTransformer3DModel

from models.errors import WeightsError
from models.identity import vae_identity
from models.loading import load_transformer
from models.objective import ObjectiveConfig
from models.text import TextEncoder
from pipelines.command import run
from pipelines.export import main
from stages.errors import ConfigError
from stages.export import ExportConfig, describe, export
from tests.models.networks import assert_close, inputs
from tests.stages.small_run import CONFIG, small_run

PROMPT = "a red ball moves left"


@pytest.mark.parametrize("weights", ["ema", "model"])
@pytest.mark.parametrize(
    "change",
    [{}, {"out_channels": 8}, {"sample_size": 128, "position_scale": 2.0}, {"sample_size": 32, "position_scale": 0.5}],
)
@torch.no_grad()
def test_diffusers_opens_it_with_equal_outputs(weights: Any, change: dict, tmp_path: Path) -> None:
    source = small_run(tmp_path / "run", transformer=replace(CONFIG, **change))
    summary = export(ExportConfig(str(source), str(tmp_path / "out"), weights=weights))
    assert summary["video_length"] == 4 and summary["exported"] == "LatteTransformer3DModel"
    assert summary["bytes"] > 4 * sum(p.numel() for p in load_transformer(source).parameters())
    opened = LatteTransformer3DModel.from_pretrained(tmp_path / "out").eval()
    latents, timestep, text, mask = inputs(CONFIG, shape=(4, 8, 12))
    expected = load_transformer(source, weights)(latents, timestep, text, mask)
    assert_close(opened(latents, timestep, text, return_dict=False)[0], expected)
    assert_close(load_transformer(tmp_path / "out")(latents, timestep, text, mask), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def _latents(pipeline: LattePipeline, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """What the pipeline makes of the noise without guidance, whose null text is not the one of training."""
    return pipeline(
        PROMPT, num_inference_steps=steps, guidance_scale=1.0, video_length=4, height=64, width=64, latents=noise,
        clean_caption=False, output_type="latent",
    ).frames  # fmt: skip


@torch.no_grad()
def test_lattes_pipeline_samples_a_velocity_by_eulers_steps(tmp_path: Path) -> None:
    source = small_run(tmp_path / "run")
    export(ExportConfig(str(source), str(tmp_path / "out"), pretrained_model_path="tiny"))
    pipeline = LattePipeline.from_pretrained(tmp_path / "out")
    x = noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = _latents(pipeline, noise, steps=4)
    text = torch.from_numpy(TextEncoder.load("tiny").encode([PROMPT])[0]).float()[None]
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    model = load_transformer(source)
    unshifted = torch.tensor([0.999, 0.999 * 3 / 4, 0.999 / 2, 0.999 / 4, 0])
    sigmas = 3 * unshifted / (1 + 2 * unshifted)  # the largest bucket has 64 tokens
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        timestep = (sigma * 1000).floor()[None]  # the scheduler's are whole numbers
        x = x + (following - sigma) * model(x, timestep, text, mask)
    assert_close(found, x, share=2e-3)  # our text is stored in half precision


@torch.no_grad()
def test_lattes_pipeline_samples_epsilon_by_ddim(tmp_path: Path) -> None:
    source = small_run(
        tmp_path / "run", transformer=replace(CONFIG, out_channels=8), objective=ObjectiveConfig("epsilon")
    )
    export(ExportConfig(str(source), str(tmp_path / "out"), pretrained_model_path="tiny"))
    pipeline = LattePipeline.from_pretrained(tmp_path / "out")
    x = noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = _latents(pipeline, noise, steps=3)
    text = torch.from_numpy(TextEncoder.load("tiny").encode([PROMPT])[0]).float()[None]
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    model = load_transformer(source)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for now, following in ((999, kept[666]), (666, kept[332]), (332, torch.tensor(1.0))):
        noise_share = model(x, torch.tensor([now]), text, mask)[:, :4]
        data = (x - (1 - kept[now]).sqrt() * noise_share) / kept[now].sqrt()
        x = (following.sqrt() * data + (1 - following).sqrt() * noise_share).float()
    assert_close(found, x, share=2e-3)


def test_lattes_pipeline_makes_pictures_under_guidance(tmp_path: Path) -> None:
    source = small_run(tmp_path / "run")
    assert run(main, ["--checkpoint", str(source), "--output", str(tmp_path / "out"),
                      "pretrained_model_path=tiny"]) == 0  # fmt: skip
    pipeline = LattePipeline.from_pretrained(tmp_path / "out")
    frames = pipeline(
        PROMPT, num_inference_steps=1, guidance_scale=3.0, video_length=4, height=64, width=64, clean_caption=False,
        output_type="np",
    ).frames  # fmt: skip
    assert frames.shape == (1, 4, 64, 64, 3) and np.isfinite(frames).all()


REFUSED_MODELS = [
    ({"temporal_pos": "branch"}, "temporal_pos is 'branch', and Latte knows 'stream' alone"),
    ({"pooled_text": True}, "pooled_text is True, and Latte knows False alone"),
    ({"mlp_ratio": 2}, "mlp_ratio is 2, and Latte knows 4 alone"),
    ({"temporal_pos_per_s": 16.0}, "frames every 0.125 s at temporal_pos_per_s 16 are 2 temporal positions apart"),
    ({"sample_size": 128}, "spatial positions from 0 to 64, for which Latte has no sample_size"),
    ({"position_scale": 0.3}, "spatial positions from 0 to 13.3333, for which Latte has no sample_size"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_MODELS)
def test_what_latte_cannot_express_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    source = small_run(tmp_path / "run", transformer=replace(CONFIG, **change))
    config = ExportConfig(str(source), str(tmp_path / "out"))
    for refused in (export, describe):
        with pytest.raises(WeightsError, match=f"diffusers' Latte cannot express this model: .*{message}"):
            refused(config)
    assert not (tmp_path / "out").exists()


def test_single_frames_have_no_distance_in_time(tmp_path: Path) -> None:
    source = small_run(tmp_path / "run", frame_interval_s=1.0, buckets=("64x64x1",))
    assert export(ExportConfig(str(source), str(tmp_path / "out")))["video_length"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": ObjectiveConfig("epsilon")}, "epsilon without a variance"),
        ({"objective": ObjectiveConfig("v")}, "predicts v, and no scheduler"),
        ({"vae": vae_identity("tiny") | {"shift_factor": 0.1}}, "another VAE"),
    ],
)
def test_what_lattes_pipeline_cannot_sample_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    source = small_run(tmp_path / "run", **change)
    with pytest.raises(ConfigError, match=message):
        export(ExportConfig(str(source), str(tmp_path / "out"), pretrained_model_path="tiny"))
    export(ExportConfig(str(source), str(tmp_path / "out")))


def test_only_an_empty_folder_or_a_former_export_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = small_run(tmp_path / "run"), tmp_path / "out"
    config = ExportConfig(str(source), str(output))
    output.mkdir()
    (output / "summary.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(ConfigError, match="exists and is no former export"):
        export(config)
    (output / "summary.json").unlink()
    export(config)
    (output / "left").write_text("over")
    export(replace(config, weights="model"))
    assert json.loads((output / "summary.json").read_text())["weights"] == "model"
    assert not (output / "left").exists()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("stages.export.write_latte", fail)
    with pytest.raises(OSError, match="no space left"):
        export(config)
    assert json.loads((output / "summary.json").read_text())["weights"] == "model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = small_run(tmp_path / "run"), tmp_path / "out"
    options = ["--checkpoint", str(source), "--format", "diffusers", "--output", str(output)]
    assert run(main, [*options, "--dry-run"]) == 0
    assert f"of 4 latent frames, into {output}" in capsys.readouterr().out and not output.exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(main, ["--checkpoint", "~/run", "--output", "~/out", "--dry-run"]) == 0
    assert f"of 4 latent frames, into {output}" in capsys.readouterr().out
    assert run(main, options) == 0
    assert "LatteTransformer3DModel of" in capsys.readouterr().out
    assert run(main, options[2:]) == 2 and run(main, options[:4]) == 2
    assert run(main, [*options, "weights=best"]) == 2
    assert run(main, ["--checkpoint", str(tmp_path / "absent"), *options[2:]]) == 2
