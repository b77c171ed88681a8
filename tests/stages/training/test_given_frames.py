"""Training with frames that are given: which, what the model sees of them, and what it learns to make of them."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from models.diffusion import Diffusion, DiffusionConfig
from models.flow import FlowConfig, RectifiedFlow
from models.latents import LatentStats
from models.objective import Objective, ObjectiveConfig
from models.presets import preset
from models.transformer import Transformer
from models.weights import CheckpointInfo
from shards.loader import Batch
from shards.schema import Bucket
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Given, Request, denoise
from stages.training.given_frames import TEXT_ALONE, ConditioningConfig
from stages.training.loss import LatentLoss, draw_given

SEED, FRAMES, TOKENS = 3, 8, 128
MIXED = ConditioningConfig(first=0.3, extend=0.2, between=0.1, loop=0.2)
OBJECTIVES = {
    "velocity": RectifiedFlow(FlowConfig((1,), (4.0,))),
    "epsilon": Diffusion("epsilon", DiffusionConfig(5.0)),
    "v": Diffusion("v", DiffusionConfig(5.0)),
}


def patterns(config: ConditioningConfig, count: int, frames: int, seed: int = SEED) -> list[str]:
    """By position, a digit a frame: 1 where it is given."""
    given = draw_given(config, seed, np.arange(count), frames)
    return ["".join(map(str, row)) for row in given.int().tolist()]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("first", ["0", "10", "100", "1000", "10000000"]),
        ("extend", ["0", "00", "000", "1100", "11000000 11100000 11110000"]),
        ("between", ["0", "00", "101", "1001", "10000001"]),
        ("loop", ["0", "00", "000", "1001", "10000001 11000011"]),
    ],
)
def test_each_mask_gives_its_frames_and_leaves_some_to_make(mask: str, expected: list[str]) -> None:
    for frames, drawn in zip((1, 2, 3, 4, 8), expected, strict=True):
        assert set(patterns(ConditioningConfig(**{mask: 1.0}), 60, frames)) == set(drawn.split())


def test_every_mask_has_its_share_and_every_length_is_as_likely() -> None:
    count = 5000
    found = Counter(patterns(MIXED, count, FRAMES))
    expected = {"0" * 8: 0.2, "10000000": 0.3, "10000001": 0.1 + 0.2 / 2, "11000011": 0.2 / 2}
    expected |= dict.fromkeys(("11000000", "11100000", "11110000"), 0.2 / 3)
    assert set(found) == set(expected)
    for pattern, share in expected.items():
        assert found[pattern] == pytest.approx(share * count, abs=4 * (count * share * (1 - share)) ** 0.5)


def test_they_are_functions_of_seed_and_position() -> None:
    """Those that runs were trained with."""
    whole = draw_given(MIXED, SEED, np.arange(12), FRAMES)
    positions = np.array([7, 2, 11])
    assert torch.equal(draw_given(MIXED, SEED, positions, FRAMES), whole[positions])
    assert patterns(MIXED, 12, FRAMES, seed=SEED + 1) != patterns(MIXED, 12, FRAMES)
    assert patterns(MIXED, 4, FRAMES) == ["11100000", "11100000", "10000001", "10000001"]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"first": 0.7, "loop": 0.4}, "add up to 1.1, expected at most 1"),
        ({"extend": -0.1}, "extend: found -0.1, expected at least 0"),
    ],
)
def test_shares_that_cannot_be_are_refused(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditioningConfig(**shares)
    # What rounds to more than 1 in floating point is not refused.
    assert ConditioningConfig(0.2, 0.4, 0.3, 0.1).masks() == ("first", "extend", "between", "loop")
    assert ConditioningConfig(loop=0.4, first=0.3).masks() == ("first", "loop")


class Mixer(torch.nn.Module):
    """Keeps what it was given; each frame of its output depends on all frames, on their timesteps and on the text."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, latents, timestep, text, mask, *, frame_interval_s, size):
        self.latents, self.timestep = latents, timestep
        told = timestep.reshape(len(latents), 1, -1, 1, 1) / 1000
        text = text if mask is None else text * mask[:, :, None]
        told = told + text.sum((1, 2))[:, None, None, None, None]
        seen = latents * (1 + told)
        return torch.tanh(seen + seen.mean(2, keepdim=True)).repeat(1, self.channels // 2, 1, 1, 1)


def make_batch(count: int, frames: int = FRAMES) -> Batch:
    draw, shape = np.random.default_rng(0), (count, frames, 2, 4, 4)
    mean, text = draw.normal(size=shape).astype(np.float16), draw.normal(size=(count, 3, 6)).astype(np.float16)
    keys, mask = [f"key-{place}" for place in range(count)], np.ones((count, 3), bool)
    return Batch(0, Bucket(32, 32, frames), 1, keys, np.arange(count), mean, None, text, mask)


def make_loss(objective: Objective, conditioning: ConditioningConfig = MIXED) -> LatentLoss:
    return LatentLoss(
        objective, LatentStats(0.5, 0.1), torch.zeros(1, 6), frame_interval_s=1 / 8, caption_dropout=0.0, seed=SEED,
        device=torch.device("cpu"), conditioning=conditioning,
    )  # fmt: skip


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_the_loss_is_that_of_the_frames_asked_for_one_by_one(prediction: str) -> None:
    batch, objective = make_batch(12), OBJECTIVES[prediction]
    given = draw_given(MIXED, SEED, batch.positions, FRAMES)
    assert len({int(row.sum()) for row in given}) > 3, "samples must differ in how many frames they are given"
    model = Mixer(objective.out_channels(2))
    found = make_loss(objective).training(model, batch, TOKENS)
    latents, timestep = model.latents, model.timestep
    means = []
    for place, position in enumerate(batch.positions):
        digest = hashlib.blake2b(f"{SEED}/{position}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        normal, _ = torch.randn((), generator=generator), torch.rand((), generator=generator)
        noise = torch.randn((1, 2, FRAMES, 4, 4), generator=generator).double()
        data = (torch.from_numpy(batch.mean[place]).double().transpose(0, 1)[None] - 0.1) * 0.5
        level = objective.levels(normal[None], TOKENS).double()
        mixture = objective.noised(data, noise, level)
        asked = [frame for frame in range(FRAMES) if not given[place, frame]]
        told = torch.zeros(1, FRAMES, dtype=torch.float64)
        for frame in range(FRAMES):
            if frame in asked:
                told[0, frame] = objective.timestep(level)
            else:
                mixture[:, :, frame] = data[:, :, frame]
        torch.testing.assert_close(latents[place : place + 1], mixture.float())
        torch.testing.assert_close(timestep[place : place + 1], told.float())
        text, mask = torch.from_numpy(batch.text[place : place + 1]).double(), torch.ones(1, 3)
        output = model(mixture, told, text, mask, frame_interval_s=None, size=None)
        losses = []
        for frame in asked:
            one = slice(frame, frame + 1)
            if prediction == "velocity":
                losses.append((output[:, :, one] - (noise - data)[:, :, one]).square().mean())
            else:
                losses.append(objective.loss(output[:, :, one], data[:, :, one], noise[:, :, one], level)[0, 0])
        means.append(sum(losses) / len(losses))
    assert float(found) == pytest.approx(float(sum(means) / len(means)), rel=1e-5)


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_a_given_frame_is_seen_without_noise_and_nothing_is_asked_of_it(prediction: str) -> None:
    batch, objective = make_batch(12), OBJECTIVES[prediction]
    given = draw_given(MIXED, SEED, batch.positions, FRAMES)[:, None, :, None, None]

    class Output(Mixer):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named).detach()
            self.output = output.where(~given, self.where_given).requires_grad_()
            return self.output

    model, losses = Output(objective.out_channels(2)), []
    for model.where_given in (torch.tensor(0.0), torch.tensor(7.0)):
        losses.append(make_loss(objective).training(model, batch, TOKENS))
    assert torch.equal(*losses)
    losses[1].backward()
    assert not (model.output.grad * given).any() and (model.output.grad.abs().amax((1, 3, 4)) > 0).any(1).all()
    data = (torch.from_numpy(batch.mean).float().transpose(1, 2) - 0.1) * 0.5
    assert torch.equal(model.latents.where(given, torch.zeros(())), data.where(given, torch.zeros(())))
    assert not model.timestep.where(given[:, 0, :, 0, 0], torch.zeros(())).any()


def test_the_other_frames_have_the_noise_that_they_would_have_without() -> None:
    batch, objective, model = make_batch(12), OBJECTIVES["velocity"], Mixer(2)
    given = draw_given(MIXED, SEED, batch.positions, FRAMES)[:, None, :, None, None].expand(-1, 2, -1, 4, 4)
    make_loss(objective).training(model, batch, TOKENS)
    mixed = model.latents
    make_loss(objective, TEXT_ALONE).training(model, batch, TOKENS)
    assert torch.equal(mixed[~given], model.latents[~given]) and not torch.equal(mixed, model.latents)


def test_without_a_given_frame_there_is_one_timestep_a_sample_and_the_same_loss() -> None:
    images, clips, model = make_batch(4, frames=1), make_batch(4), Mixer(2)
    nowhere = ConditioningConfig(first=1e-9)
    for batch, conditioning in ((images, ConditioningConfig(first=0.5, loop=0.5)), (clips, nowhere)):
        found = make_loss(OBJECTIVES["velocity"], conditioning).training(model, batch, TOKENS)
        assert model.timestep.shape == (4,)
        assert torch.equal(found, make_loss(OBJECTIVES["velocity"], TEXT_ALONE).training(model, batch, TOKENS))


def test_a_model_learns_to_make_of_an_image_a_clip_of_it() -> None:
    """Clips that stand still, each with numbers of its own: all that there is to know is in the first frame."""
    torch.manual_seed(0)
    model = Transformer(preset("tiny", {"num_layers": 1, "text_dim": 6}))
    loss_of = make_loss(OBJECTIVES["velocity"], ConditioningConfig(first=1.0))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    text, mask = np.zeros((16, 1, 6), np.float16), np.ones((16, 1), bool)
    for step in range(100):
        positions = np.arange(16) + 16 * step
        mean = stills(step).transpose(1, 2).half().numpy()
        batch = Batch(step, Bucket(16, 16, 4), 1, [""] * 16, positions, mean, None, text, mask)
        optimizer.zero_grad()
        loss_of.training(model, batch, TOKENS).backward()
        optimizer.step()
    wanted, first, null = loss_of.stats.normalise(stills(1000)), torch.arange(4) == 0, torch.zeros(1, 6)
    requests = [Request(null, null, seed, Given(clip, first)) for seed, clip in enumerate(wanted)]
    info = CheckpointInfo(0, model.config, ObjectiveConfig("velocity"), {"spatial_factor": 8}, {}, 1 / 8)
    made = denoise(model.eval(), info, requests, (4, 4, 2, 2), DenoiseConfig(steps=10, guidance_scale=1.0))
    assert torch.equal(made[:, :, 0], wanted[:, :, 0])
    # Frames that knew nothing of the first would be about 2 away from it.
    assert (made - wanted).square().mean() < 0.3 * wanted.square().mean()


def stills(seed: int) -> torch.Tensor:
    """[16, C, T, h, w]"""
    return torch.randn((16, 4, 1, 1, 1), generator=torch.Generator().manual_seed(seed)).expand(-1, -1, 4, 2, 2)
