"""Checkpoints and diffusers folders, there and back, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.diffusion import DiffusionConfig
from models.errors import WeightsError
from models.flow import FlowConfig
from models.loading import load_into, load_transformer, open_pretrained
from models.objective import ObjectiveConfig
from models.transformer import Transformer
from models.weights import (
    CheckpointInfo,
    find_checkpoint,
    read_info,
    read_null_text,
    save_checkpoint,
)
from tests.models.networks import SMALL, assert_close, inputs, latte, pixart, random_transformer, randomise

INFO = CheckpointInfo(
    step=40,
    transformer=replace(SMALL, pooled_text=True, temporal_pos="branch"),
    objective=ObjectiveConfig("velocity", FlowConfig(shift_tokens=(128,), shift_values=(4.0,), logit_mean=0.5)),
    vae={"weights_hash": "ab", "latent_channels": 4, "shift_factor": None},
    text_encoder={"weights_hash": "cd", "dim": 20},
    frame_interval_s=0.125,
    conditioning=("first", "loop"),
)
NULL_TEXT = torch.linspace(0, 1, 40).reshape(2, 20).half()


def _save(folder: Path, info: CheckpointInfo = INFO, names: tuple[str, ...] = ("model", "ema")) -> Path:
    """A checkpoint whose weights of each name are drawn from a seed of their own: 0, 1, ..."""
    folder.mkdir(parents=True)
    states = {n: random_transformer(info.transformer, seed).state_dict() for seed, n in enumerate(names)}
    save_checkpoint(folder, info, states, NULL_TEXT)
    return folder


def _save_reference(reference: torch.nn.Module, folder: Path, **options: str) -> Path:
    reference.save_pretrained(folder, **options)
    return folder


def _edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def _edit_objective(folder: Path, **changes: object) -> None:
    path = folder / "model.json"
    _edit_json(path, objective=json.loads(path.read_text())["objective"] | changes)


@pytest.mark.parametrize(("weights", "seed"), [("ema", 1), ("model", 0)])
@torch.no_grad()
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, weights: str, seed: int) -> None:
    folder = _save(tmp_path / "step-40")
    assert read_info(folder) == INFO
    model = load_transformer(folder, weights)
    assert model.config == INFO.transformer and model.prediction == "velocity" and not model.training
    expected = random_transformer(INFO.transformer, seed)
    assert torch.equal(model(*inputs()), expected(*inputs()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_default_weights_are_the_averaged_ones(tmp_path: Path) -> None:
    folder = _save(tmp_path / "step-40")
    averaged = load_transformer(folder, "ema").state_dict()
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in load_transformer(folder).state_dict().items())


def test_the_null_text_comes_back(tmp_path: Path) -> None:
    folder = _save(tmp_path / "step-40")
    null_text = read_null_text(folder)
    assert torch.equal(null_text, NULL_TEXT) and null_text.dtype == torch.float16
    mask = load_file(folder / "null_text.safetensors")["mask"]
    assert mask.tolist() == [True, True]


def test_a_null_text_that_is_padded_in_the_file_is_read_without(tmp_path: Path) -> None:
    folder = _save(tmp_path / "step-40")
    padded = {"embedding": NULL_TEXT, "mask": torch.tensor([True, False])}
    save_file(padded, folder / "null_text.safetensors")
    assert torch.equal(read_null_text(folder), NULL_TEXT[:1])


def test_prediction_is_taken_from_the_checkpoint(tmp_path: Path) -> None:
    objective = ObjectiveConfig("v", diffusion=DiffusionConfig(min_snr_gamma=5))
    folder = _save(tmp_path / "step-40", replace(INFO, objective=objective))
    assert load_transformer(folder).prediction == open_pretrained(folder).prediction == "v"
    assert read_info(folder).objective == objective


def test_a_run_folder_gives_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    _save(checkpoints / "step-9", replace(INFO, step=9))
    _save(checkpoints / "step-100", replace(INFO, step=100))
    _save(checkpoints / "step-200.tmp")
    (_save(checkpoints / "step-300") / "model.json").unlink()
    (_save(checkpoints / "step-400") / "ema.safetensors").unlink()
    (_save(checkpoints / "step-500") / "null_text.safetensors").unlink()
    assert find_checkpoint(str(tmp_path)) == checkpoints / "step-100"
    assert read_info(tmp_path).step == 100
    load_transformer(tmp_path)


def test_a_checkpoint_of_averaged_weights_alone(tmp_path: Path) -> None:
    run = _save(tmp_path / "checkpoints" / "step-000040", names=("ema",)).parents[1]
    assert read_info(run).weights == ("ema",)
    load_transformer(run)
    with pytest.raises(WeightsError, match="has the weights ema; there are no 'model'"):
        load_transformer(run, "model")


@pytest.mark.parametrize("place", [".", "transformer"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "several files"])
@torch.no_grad()
def test_lattes_folder_opens_with_equal_outputs(tmp_path: Path, place: str, options: dict) -> None:
    reference = randomise(latte(SMALL, 3))
    _save_reference(reference, tmp_path / place, **options)
    model = load_transformer(tmp_path)
    assert model.prediction == "epsilon" and not model.training
    latents, timestep, text, mask = inputs()
    expected = reference(latents, timestep, text, return_dict=False)[0]
    assert_close(model(latents, timestep, text, mask), expected)


@torch.no_grad()
def test_lattes_positions_follow_its_sample_size(tmp_path: Path) -> None:
    """From 128 on, diffusers interpolates."""
    config = replace(SMALL, sample_size=128)
    reference = randomise(latte(config, 2))
    model = load_transformer(_save_reference(reference, tmp_path))
    assert model.config == replace(config, position_scale=2)
    latents, timestep, text, mask = inputs(shape=(2, 16, 8))
    expected = reference(latents, timestep, text, return_dict=False)[0]
    assert_close(model(latents, timestep, text, mask), expected)


def test_names_are_lattes_but_for_the_pooled_text() -> None:
    """Weights go from us to diffusers and back by name; only pooled_text is our own."""
    ours = Transformer(replace(SMALL, pooled_text=True))
    reference = latte(SMALL, 5)
    result = reference.load_state_dict(ours.state_dict(), strict=False)
    assert not result.missing_keys
    assert result.unexpected_keys == ["pooled_text.weight", "pooled_text.bias"]
    random_transformer().load_state_dict(reference.state_dict())


@torch.no_grad()
def test_weights_saved_by_us_open_in_diffusers(tmp_path: Path) -> None:
    info = replace(INFO, transformer=SMALL)
    folder = _save(tmp_path / "step-40", info)
    reference = latte(SMALL, 3)
    reference.load_state_dict(load_file(folder / "ema.safetensors"))
    latents, timestep, text, mask = inputs()
    expected = reference(latents, timestep, text, return_dict=False)[0]
    assert_close(load_transformer(folder)(latents, timestep, text, mask), expected)


@torch.no_grad()
def test_a_video_model_starts_from_pixart(tmp_path: Path) -> None:
    config = replace(SMALL, temporal_pos="branch", temporal_init="zero", pooled_text=True)
    reference = randomise(pixart(config))
    model = Transformer(config).eval()
    report = load_into(model, _save_reference(reference, tmp_path))
    assert set(report.matched) == set(reference.state_dict())
    assert set(report.missing) == set(model.state_dict()) - set(report.matched)
    assert report.unexpected == () and report.unexpected_share == 0
    sizes = [sum(p.numel() for p in part.parameters()) for part in (reference, model)]
    assert report.matched_share == sizes[0] / sizes[1]
    latents, timestep, text, mask = inputs(shape=(2, 8, 8))
    expected = reference(latents[:, :, 1], text, timestep, return_dict=False)[0]
    assert_close(model(latents, timestep, text, mask)[:, :, 1], expected)


def test_starting_from_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    folder = _save(tmp_path / "checkpoints" / "step-40")
    saved = {name: load_file(folder / f"{name}.safetensors") for name in ("ema", "model")}
    for path, options, name in ((folder, {}, "ema"), (tmp_path, {"weights": "model"}, "model")):
        model = Transformer(INFO.transformer)
        report = load_into(model, path, **options)
        assert report.matched_share == 1 and not report.missing
        assert all(torch.equal(tensor, saved[name][key]) for key, tensor in model.state_dict().items())


def test_the_report_counts_what_has_no_place(tmp_path: Path) -> None:
    folder = _save(tmp_path / "step-40")
    model = Transformer(replace(INFO.transformer, pooled_text=False))
    report = load_into(model, folder)
    assert report.unexpected == ("pooled_text.bias", "pooled_text.weight")
    total = sum(tensor.numel() for tensor in load_file(folder / "ema.safetensors").values())
    assert report.unexpected_share == (SMALL.width + SMALL.width * SMALL.text_dim) / total
    assert "100.0% of the model" in str(report) and "pooled_text.bias" in str(report)


def test_starting_from_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = _save(tmp_path / "step-40")
    save_file({"proj_out.bias": torch.ones(32), "stem.weight": torch.ones(5)}, folder / "ema.safetensors")
    other = _save(tmp_path / "step-41", replace(INFO, transformer=replace(INFO.transformer, text_dim=24)))
    model = random_transformer(INFO.transformer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"lacks 84 of its .* and has 1 that belong to another model \(stem.weight"):
        load_into(model, folder)
    shapes = r"caption_projection.linear_1.weight is \(24, 24\), not \(24, 20\)"
    with pytest.raises(WeightsError, match=shapes):
        load_into(model, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_folders_that_hold_no_transformer(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    ours = r"expected a checkpoint folder \(with model.json\) or a run folder \(with checkpoints/step-\*\)"
    for path, found in ((tmp_path / "absent", "absent does not exist; "), (tmp_path, "holds notes.txt; ")):
        for opened in (load_transformer, lambda path: load_into(random_transformer(), path)):
            with pytest.raises(WeightsError, match=f"{found}{ours}, a diffusers folder .*, or a .pth"):
                opened(path)
        with pytest.raises(WeightsError, match=f"{found}{ours}$"):  # nothing that it would not open
            read_info(path)
    with pytest.raises(WeightsError, match=f"notes.txt is a file; {ours}$"):
        read_info(tmp_path / "notes.txt")


def test_another_diffusers_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    for opened in (load_transformer, lambda path: load_into(random_transformer(), path)):
        with pytest.raises(WeightsError, match="UNet2DModel; expected a LatteTransformer3DModel or a PixArt"):
            opened(tmp_path)


def test_a_latte_with_other_layers_is_refused(tmp_path: Path) -> None:
    _save_reference(latte(SMALL, 3), tmp_path)
    _edit_json(tmp_path / "config.json", activation_fn="geglu", attention_bias=False)
    with pytest.raises(WeightsError, match="activation_fn is 'geglu', not .*; attention_bias is False, not True"):
        load_transformer(tmp_path)
    _edit_json(tmp_path / "config.json", activation_fn="gelu-approximate", attention_bias=True, num_layers=None)
    with pytest.raises(WeightsError, match="config.json does not describe a Latte model"):
        load_transformer(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    _save_reference(latte(SMALL, 3), tmp_path)
    safe = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(safe), tmp_path / "diffusion_pytorch_model.bin")
    safe.unlink()
    with pytest.raises(WeightsError, match="does not exist; expected weights in the safetensors format"):
        load_transformer(tmp_path)


def _cut(folder: Path) -> None:
    data = (folder / "ema.safetensors").read_bytes()
    (folder / "ema.safetensors").write_bytes(data[: len(data) // 2])


def _change_tensors(folder: Path, **changes: Tensor) -> None:
    save_file(load_file(folder / "ema.safetensors") | changes, folder / "ema.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "ema.safetensors is damaged"),
        (lambda f: _change_tensors(f, extra=torch.ones(2)), "nothing else: .*1 without a place .*extra"),
        (lambda f: _change_tensors(f, **{"proj_out.bias": torch.ones(3)}), r"bias is \(3,\), not \(32,\)"),
        (lambda f: (f / "ema.safetensors").unlink(), "ema.safetensors does not exist"),
        (lambda f: save_file({"proj_out.bias": torch.ones(32)}, f / "ema.safetensors"), "not in the file"),
        (lambda f: (f / "model.json").write_text("{"), "model.json cannot be read as JSON"),
        (lambda f: (f / "model.json").write_text("[]"), "holds a JSON list; expected an object"),
        (lambda f: _edit_json(f / "model.json", format_version=2), "format_version 2; expected 1"),
        (lambda f: _edit_json(f / "model.json", objective=3), "model.json does not describe a checkpoint"),
        (lambda f: _edit_json(f / "model.json", extra=3), "extra"),
        (lambda f: _edit_objective(f, prediction="x0"), "'x0'; expected velocity or epsilon or v"),
        (lambda f: _edit_objective(f, prediction=None), "objective.prediction is not known"),
        (lambda f: _edit_objective(f, diffusion={"min_snr_gamma": 5}), "prediction velocity has no use"),
        (
            lambda f: _edit_json(f / "model.json", transformer={"depth": 2}),
            "unexpected keyword argument 'depth'",
        ),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path: Path, damage, message: str) -> None:
    folder = _save(tmp_path / "step-40")
    damage(folder)
    with pytest.raises(WeightsError, match=message):
        load_transformer(folder)


@torch.no_grad()
def test_weights_with_a_learned_range_start_a_model_without_and_the_other_way(tmp_path: Path) -> None:
    """The outputs that both have are those of the file, channel by channel."""
    reference = randomise(latte(SMALL, 3))  # 4 channels of epsilon, 4 of its range
    folder = _save_reference(reference, tmp_path / "latte")
    assert open_pretrained(folder).prediction == "epsilon"
    latents, timestep, text, mask = inputs()
    expected = reference(latents, timestep, text, return_dict=False)[0]

    velocity = Transformer(replace(SMALL, out_channels=4))
    report = load_into(velocity, folder)
    assert report.matched_share == 1
    assert_close(velocity(latents, timestep, text, mask), expected[:, :4])

    state = {"ema": velocity.state_dict()}
    (tmp_path / "ours").mkdir()
    info = replace(INFO, transformer=velocity.config)
    save_checkpoint(tmp_path / "ours", info, state, NULL_TEXT)
    with_range = Transformer(SMALL)
    load_into(with_range, tmp_path / "ours")
    found = with_range(latents, timestep, text, mask)
    assert_close(found[:, :4], expected[:, :4])
    assert (found[:, 4:] == 0).all()  # as it started


def test_null_text_of_another_layout_is_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path / "step-40")
    save_file({"embedding": NULL_TEXT}, folder / "null_text.safetensors")
    with pytest.raises(WeightsError, match=r"holds \['embedding'\]; expected embedding and mask"):
        read_null_text(folder)
