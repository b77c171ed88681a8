"""From noise to latents, for the sampler and for the trainer, which loads no encoder: nothing here does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from models.samplers import make_sampler
from models.step_cache import StepCache
from models.text_lengths import padded_length
from models.transformer import Transformer
from models.weights import CheckpointInfo
from stages.sampling.config import DenoiseConfig


@dataclass(frozen=True, eq=False)
class Given:
    """Frames that are not made: normalised latents [C, T, h, w], and [T] bool, true on those that stay as they are."""

    latents: Tensor
    frames: Tensor


@dataclass(frozen=True, eq=False)
class Request:
    """One sample to make.

    text [L, D], null_text [L0, D]: what guidance leads to and away from. seed: of its noise. given: for a checkpoint
    that was trained so (`CheckpointInfo.conditioning`).
    """

    text: Tensor
    null_text: Tensor
    seed: int
    given: Given | None = None

    @property
    def padded_tokens(self) -> int:
        """The length at which its texts run."""
        return padded_length(max(len(self.text), len(self.null_text)))


@torch.no_grad()
def denoise(
    model: Transformer,
    info: CheckpointInfo,
    requests: Sequence[Request],
    shape: tuple[int, int, int, int],
    config: DenoiseConfig,
    *,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Normalised latents [B, C, T, h, w] of B requests, from noise and under classifier-free guidance.

    Each sample's noise comes from its own seed, and text is masked to its own length, so that a sample does not
    depend on its batch: to the bit among batches of one size, one `Request.padded_tokens`, and given frames in all or
    none. Guidance acts on all latent channels; a variance beside them is that of the conditional branch. ``on_step`` is
    called after each step.

    Raises ValueError for a sampler that the model has not.
    """
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    x = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    given, made = _given(requests, x)
    sampler = make_sampler(config.sampler, info.objective, config.steps, model.config.tokens(*shape[1:]))
    branches = [2 if _guides(config, timestep) else 1 for timestep in sampler.timesteps.tolist()]
    texts, mask = _padded_texts(requests, device)  # of the conditional branch, then of the null branch
    text = {
        count: model.read_text(*(_even(each[: count * len(x)]) for each in (texts, mask))) for count in set(branches)
    }
    size = (shape[2] * info.vae["spatial_factor"], shape[3] * info.vae["spatial_factor"])
    cache = None if config.step_cache is None else StepCache(config.step_cache)
    predict = partial(model, frame_interval_s=info.frame_interval_s, size=size, cache=cache)
    for index, (timestep, count) in enumerate(zip(sampler.timesteps.tolist(), branches, strict=True)):
        x = torch.where(_over(made), x, given)
        inputs, timesteps = torch.cat([x] * count), torch.cat([timestep * made] * count)
        output = predict(_even(inputs), _even(timesteps), text[count])[: len(inputs)].float()
        if count == 2:
            conditional, unconditional = output.chunk(2)
            output = guided(conditional, unconditional, config, channels=shape[0])
        x = sampler.step(index, x, output, generators)
        on_step()
    return torch.where(_over(made), x, given)


def guided(conditional: Tensor, unconditional: Tensor, config: DenoiseConfig, channels: int) -> Tensor:
    """One prediction of two [B, C', ...]; of the channels beyond those of the latents, the conditional's."""
    wanted = conditional[:, :channels]
    output = unconditional[:, :channels] + config.guidance_scale * (wanted - unconditional[:, :channels])
    if config.guidance_rescale:
        spread = [x.flatten(1).std(1).reshape(-1, 1, 1, 1, 1) for x in (wanted, output)]
        output = output * torch.lerp(torch.ones_like(spread[0]), spread[0] / spread[1], config.guidance_rescale)
    return torch.cat([output, conditional[:, channels:]], dim=1)


def _even(rows: Tensor) -> Tensor:
    """With the last row once more where there are several and an odd number of them: there some CPU kernels round a
    row by its place."""
    return torch.cat([rows, rows[-1:]]) if len(rows) > 1 and len(rows) % 2 else rows


def _guides(config: DenoiseConfig, timestep: float) -> bool:
    low, high = config.guidance_interval
    return config.guidance_scale != 1 and low <= timestep / 1000 <= high


def _given(requests: Sequence[Request], x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents like x of which frames are given, and what is made: [B] bool, or [B, T] where frames are given."""
    if all(request.given is None for request in requests):
        return x, torch.ones(len(x), dtype=torch.bool, device=x.device)
    given, made = torch.zeros_like(x), torch.ones(len(x), x.shape[2], dtype=torch.bool, device=x.device)
    for row, request in enumerate(requests):
        if request.given is not None:
            given[row], made[row] = request.given.latents.to(x), ~request.given.frames.to(x.device)
    return given, made


def _over(made: Tensor) -> Tensor:
    """[B] or [B, T] as [B, 1, 1 or T, 1, 1]."""
    return made.reshape(len(made), 1, -1, 1, 1)


def _padded_texts(requests: Sequence[Request], device: torch.device) -> tuple[Tensor, Tensor]:
    """The texts, then the null texts, zero-padded float32 [2B, L, D], and mask [2B, L], true on real tokens."""
    texts = [*(request.text for request in requests), *(request.null_text for request in requests)]
    length = max(request.padded_tokens for request in requests)
    padded = torch.zeros(len(texts), length, texts[0].shape[1])
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    lengths = torch.tensor([len(text) for text in texts])
    return padded.to(device), (torch.arange(length) < lengths[:, None]).to(device)
