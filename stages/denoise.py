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
) -> torch.Tensor:
    """Normalised latents [B, C, T, h, w] from noise by the objective's steps under classifier-free guidance.

    texts: B of [L, D], any lengths; null_text [L0, D]. Each sample's noise comes from its own seed, and text
    is masked to its own length, so that a sample does not depend on its batch. Guidance acts on all channels.
    """
    device = next(model.parameters()).device
    count = len(texts)
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)
    guided = guidance_scale != 1
    text, mask = pad([*texts, *([null_text] * count if guided else [])], device)
    size = (shape[2] * info.vae["spatial_factor"], shape[3] * info.vae["spatial_factor"])
    objective = make_objective(info.objective)
    levels = objective.schedule(steps, model.config.tokens(*shape[1:])).tolist()
    for level, following in pairwise(levels):
        inputs = torch.cat([x, x]) if guided else x
        timestep = objective.timestep(torch.full((len(inputs),), level, device=device))
        output = model(inputs, timestep, text, mask, frame_interval_s=info.frame_interval_s, size=size).float()
        if guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        x = objective.step(x, output, level, following)
    return x


def pad(texts: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """B texts [L, D] of any lengths -> zero-padded float32 [B, Lmax, D] and mask [B, Lmax], true on real tokens."""
    padded = torch.nn.utils.rnn.pad_sequence([text.float() for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return padded.to(device), (torch.arange(padded.shape[1]) < lengths[:, None]).to(device)
