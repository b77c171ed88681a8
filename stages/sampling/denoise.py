"""From noise to latents, for the sampler and for the trainer, which loads no encoder: nothing here does."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from models.objective import make_objective
from models.transformer import Transformer
from models.weights import CheckpointInfo


@torch.no_grad()
def denoise(
    model: Transformer,
    info: CheckpointInfo,
    texts: Sequence[torch.Tensor],
    null_text: torch.Tensor,
    seeds: Sequence[int],
    shape: tuple[int, int, int, int],
    *,
    steps: int,
    guidance_scale: float,
    given: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Normalised latents [B, C, T, h, w] from noise by the objective's steps under classifier-free guidance.

    texts: B of [L, D], any lengths; null_text [L0, D]. Each sample's noise comes from its own seed, and text
    is masked to its own length, so that a sample does not depend on its batch. Guidance acts on all channels.
    given: normalised latents [B, C, T, h, w] and a mask [B, T], true on the frames that are not made but stay as
    they are there, at level 0 throughout; for a checkpoint that was trained so (`CheckpointInfo.conditioning`).
    """
    device = next(model.parameters()).device
    count = len(texts)
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)
    made = torch.ones(count, dtype=torch.bool, device=device)  # [B], or [B, T] where frames are given
    if given is not None:
        made = ~given[1].to(device)
        x = torch.where(_over(made), x, given[0].to(x))
    guided = guidance_scale != 1
    text = model.read_text(*pad([*texts, *([null_text] * count if guided else [])], device))
    size = (shape[2] * info.vae["spatial_factor"], shape[3] * info.vae["spatial_factor"])
    objective = make_objective(info.objective)
    levels = objective.schedule(steps, model.config.tokens(*shape[1:])).tolist()
    for level, following in pairwise(levels):
        inputs = torch.cat([x, x]) if guided else x
        timestep = objective.timestep(level * (torch.cat([made, made]) if guided else made))
        output = model(inputs, timestep, text, frame_interval_s=info.frame_interval_s, size=size).float()
        if guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        x = torch.where(_over(made), objective.step(x, output, level, following), x)
    return x


def _over(made: torch.Tensor) -> torch.Tensor:
    """[B] or [B, T] as [B, 1, 1 or T, 1, 1]."""
    return made.reshape(len(made), 1, -1, 1, 1)


def pad(texts: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """B texts [L, D] of any lengths -> zero-padded float32 [B, Lmax, D] and mask [B, Lmax], true on real tokens."""
    padded = torch.nn.utils.rnn.pad_sequence([text.float() for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return padded.to(device), (torch.arange(padded.shape[1]) < lengths[:, None]).to(device)
