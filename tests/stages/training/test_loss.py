"""The training loss of a batch against the objective's formula on numbers drawn anew in the test."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.diffusion import Diffusion, DiffusionConfig
from models.flow import FlowConfig, RectifiedFlow
from models.latents import LatentStats
from models.objective import Objective
from shards.loader import Batch
from shards.schema import Bucket
from stages.training.loss import LatentLoss

SHAPE = (3, 2, 4, 4)  # T, C, h, w
TOKENS = 128
NULL = torch.full((1, 6), 0.5)
OBJECTIVES = {
    "velocity": RectifiedFlow(FlowConfig((1,), (4.0,))),
    "epsilon": Diffusion("epsilon", DiffusionConfig()),
    "v": Diffusion("v", DiffusionConfig(5.0)),
}


class Recorder(torch.nn.Module):
    """A model that keeps what it was given, and whose output depends on all of it."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, latents, timestep, text, mask, *, frame_interval_s, size):
        self.given = (latents, timestep, text, mask, frame_interval_s)
        told = timestep / 1000 + (text if mask is None else text * mask[:, :, None]).mean((1, 2))
        return latents.repeat(1, self.channels // 2, 1, 1, 1) * 0.5 + told[:, None, None, None, None]


def make_batch(count: int = 4, std: bool = True) -> Batch:
    draw = np.random.default_rng(0)
    mask = np.arange(5) < np.array([5, 3, 1, 2])[:count, None]
    return Batch(
        step=0,
        bucket=Bucket(32, 32, 3),
        frame_stride=1,
        keys=[f"key-{place}" for place in range(count)],
        positions=np.arange(count, dtype=np.int64) + 7,
        mean=draw.normal(size=(count, *SHAPE)).astype(np.float16),
        std=draw.random(size=(count, *SHAPE)).astype(np.float16) if std else None,
        text=(draw.normal(size=(count, 5, 6)) * mask[:, :, None]).astype(np.float16),
        text_mask=mask,
    )


def make_loss(objective: Objective, caption_dropout: float = 0.5, seed: int = 3) -> LatentLoss:
    return LatentLoss(
        objective, LatentStats(0.5, 0.1), NULL, frame_interval_s=1 / 8, caption_dropout=caption_dropout, seed=seed,
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_draws_are_functions_of_seed_and_position_in_this_order(prediction: str, posterior: bool) -> None:
    """The order that runs were trained with; a further draw must come after these, or it changes them."""
    batch, objective = make_batch(std=posterior), OBJECTIVES[prediction]
    model = Recorder(objective.out_channels(2))
    losses, noised, dropped = [], [], []
    for place, position in enumerate(batch.positions):
        digest = hashlib.blake2b(f"3/{position}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        shape = (2, 3, 4, 4)  # C, T, h, w
        normal = torch.randn((), generator=generator)
        dropped.append(bool(torch.rand((), generator=generator) < 0.5))
        noise = torch.randn(shape, generator=generator)
        latents = torch.from_numpy(batch.mean[place]).float().transpose(0, 1)
        if posterior:
            std = torch.from_numpy(batch.std[place]).float().transpose(0, 1)
            latents = latents + std * torch.randn(shape, generator=generator)
        data, level = ((latents - 0.1) * 0.5)[None], objective.levels(normal[None], TOKENS)
        noised.append(objective.noised(data, noise[None], level))
        text, mask = torch.from_numpy(batch.text[place]).float(), torch.from_numpy(batch.text_mask[place])
        if dropped[-1]:
            text, mask = torch.cat([NULL, torch.zeros(4, 6)]), torch.arange(5) < 1
        output = model(noised[-1], objective.timestep(level), text[None], mask[None], frame_interval_s=1 / 8, size=None)
        losses.append(objective.loss(output, data, noise[None], level).mean())
    assert len(set(dropped)) == 2, "some captions must be dropped, and some not"
    found = make_loss(objective).training(model, batch, TOKENS)
    torch.testing.assert_close(found, torch.stack(losses).mean())
    torch.testing.assert_close(model.given[0], torch.cat(noised))
    assert model.given[4] == 1 / 8


def test_a_dropped_caption_is_the_null_under_its_own_mask() -> None:
    model = Recorder(2)
    make_loss(OBJECTIVES["velocity"], caption_dropout=1.0).training(model, make_batch(), TOKENS)
    _, _, text, mask, _ = model.given
    assert mask.tolist() == [[True, False, False, False, False]] * 4
    assert torch.equal(text[:, 0], NULL.expand(4, 6)) and (text[:, 1:] == 0).all()


def test_text_without_padding_has_no_mask() -> None:
    """Which PyTorch's fastest kernels do not take."""
    model, batch = Recorder(2), make_batch()
    filled = replace(batch, text_mask=np.ones_like(batch.text_mask))
    for dropout, expected in ((0.0, True), (1.0, False)):
        make_loss(OBJECTIVES["velocity"], dropout).training(model, filled, TOKENS)
        assert (model.given[3] is None) is expected
    make_loss(OBJECTIVES["velocity"]).held_out(model, filled, 0.5)
    assert model.given[3] is None


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_the_held_out_loss_has_fixed_noise_and_every_caption(prediction: str) -> None:
    batch, objective = make_batch(), OBJECTIVES[prediction]
    model = Recorder(objective.out_channels(2))
    first = make_loss(objective, caption_dropout=1.0).held_out(model, batch, 0.25)
    latents, timestep, text, mask, _ = model.given
    again = make_loss(objective, seed=99).held_out(model, batch, 0.25)
    assert torch.equal(first, again) and first.shape == (4,)
    assert torch.equal(text, torch.from_numpy(batch.text).float()) and mask.tolist() == batch.text_mask.tolist()
    assert timestep.tolist() == [250.0 if prediction == "velocity" else 249.0] * 4
    # Without data the model sees the noise alone, scaled.
    empty = Batch(**{**vars(batch), "mean": np.full_like(batch.mean, 0.1)})
    make_loss(objective).held_out(model, empty, 0.25)
    noise = model.given[0] / objective.noised(
        torch.zeros(4, 1, 1, 1, 1), torch.ones(4, 1, 1, 1, 1), torch.full((4,), 0.25)
    )
    assert abs(float(noise.mean())) < 0.1 and float(noise.std()) == pytest.approx(1, abs=0.1)
    flat = noise.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.5, "each sample has noise of its own"
    # One sample alone, in another batch, has the same loss.
    torch.testing.assert_close(make_loss(objective).held_out(model, batch.split(4)[2], 0.25)[0], first[2])
