"""The parts of the diffusion transformer.

Shapes in this file:
  B batch    T latent frames    C latent channels    h w latent height and width
  N tokens of a frame (h/p * w/p for patches of p x p)    L text tokens    D model width    H heads
  F is T where every frame has a timestep of its own, else 1.

Module and parameter names are those of diffusers' `LatteTransformer3DModel`, so that weights load by name.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.activations import in_chunks, through

NORM_EPS = 1e-6
SCALAR_CHANNELS = 256
MAX_PERIOD = 10_000.0
# CUDA bounds the grid dimension on which its attention kernels lay out the heads.
MAX_HEADS_PER_CALL = 65_535

KeysValues = tuple[Tensor, Tensor]  # [B, K, G, H, D/H] each, as `Attention.keys_values` makes them


def sincos(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of positions at geometrically spaced frequencies (arXiv:1706.03762, section 3.5).

    positions [...] -> [..., width] float32; width is even. Computed in float64, as thousands of positions
    times a frequency near 1 lose digits in float32.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    angles = positions.double()[..., None] * MAX_PERIOD**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def spatial_positions(rows: int, columns: int, width: int, *, base: int, scale: float, device: torch.device) -> Tensor:
    """Position embedding of a grid of patches, [rows * columns, width] float32; width is a multiple of 4.

    Along either side the coordinates span [0, base / scale), however many patches there are, so that any
    size and aspect ratio keeps the range that the weights know (PixArt-alpha, appendix). The first half of
    the channels encodes the column, the second the row.
    """
    across = sincos(torch.arange(columns, device=device) / (columns / base) / scale, width // 2)
    down = sincos(torch.arange(rows, device=device) / (rows / base) / scale, width // 2)
    grid = torch.cat(
        [across.expand(rows, columns, -1), down[:, None].expand(rows, columns, -1)], dim=-1
    )  # [rows, columns, D]
    return grid.flatten(0, 1)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions (RoFormer, arXiv:2104.09864, equation 34): queries or keys [B, K, G, H, D/H], turned.

    rotation [B or 1, K, 1, D/H] is `sincos` of the positions; channel i turns together with channel i + D/2H.
    """
    sine, cosine = rotation[:, :, :, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1).to(x.dtype)


def scalar_features(values: Tensor) -> Tensor:
    """Cosines, then sines, of what conditions the network (DiT, arXiv:2212.09748): [...] -> [..., 256] float32."""
    half = SCALAR_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[..., None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: x [B, T, N, D]; shift and scale [B, F, 1, D]."""
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


class PatchEmbed(nn.Module):
    """Latents [B, C, T, h, w] to tokens [B, T, N, D], each frame cut into patches of its own."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        batch = latents.shape[0]
        frames = self.proj(latents.transpose(1, 2).flatten(0, 1))  # [B*T, D, h/p, w/p]
        return frames.flatten(2).transpose(1, 2).unflatten(0, (batch, -1)).contiguous()  # [B, T, N, D]


class TwoLayers(nn.Module):
    """Linear, activation, linear: the embedder of timesteps (SiLU) and of captions (GELU)."""

    def __init__(self, in_features: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, width)
        self.activation = activation
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """The timestep (0 to 1000, fractions allowed), and size and frame rate where asked for, as one vector.

    Size is what PixArt-alpha's 1024 px model is told: height and width, embedded alike, and their ratio, in a third
    of the channels each. Size and rate start without influence.
    """

    def __init__(self, width: int, *, size: bool, fps: bool) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(SCALAR_CHANNELS, width, nn.SiLU())
        self.resolution_embedder = TwoLayers(SCALAR_CHANNELS, width // 3, nn.SiLU()) if size else None
        self.aspect_ratio_embedder = TwoLayers(SCALAR_CHANNELS, width // 3, nn.SiLU()) if size else None
        self.fps_embedder = TwoLayers(SCALAR_CHANNELS, width, nn.SiLU()) if fps else None

    def forward(self, timestep: Tensor, size: Tensor | None, fps: Tensor, dtype: torch.dtype) -> Tensor:
        """timestep [B, F], size (height, width in pixels) [B or 1, 2], fps [B or 1, 1] -> [B, F, D]."""
        embedding = self.timestep_embedder(scalar_features(timestep).to(dtype))
        if self.resolution_embedder is not None and self.aspect_ratio_embedder is not None:
            if size is None:
                raise ValueError("this network is conditioned on size; expected size= height and width in pixels")
            sides = self.resolution_embedder(scalar_features(size).to(dtype))  # [B or 1, 2, D/3]
            ratio = self.aspect_ratio_embedder(scalar_features(size[:, :1] / size[:, 1:]).to(dtype))
            embedding = embedding + torch.cat([sides, ratio], dim=1).flatten(1)[:, None]
        if self.fps_embedder is not None:
            embedding = embedding + self.fps_embedder(scalar_features(fps).to(dtype))
        return embedding


class AdaptiveNorm(nn.Module):
    """adaLN-single (PixArt-alpha, arXiv:2310.00426, 2.3): one projection of the timestep for all blocks.

    `emb` embeds the timestep and what else conditions all tokens; calling the module turns an embedding
    [B, F, D] into the six vectors [B, F, 6, D] to which every block adds a table of its own.
    """

    def __init__(self, width: int, *, size: bool, fps: bool) -> None:
        super().__init__()
        self.emb = ConditionEmbedder(width, size=size, fps=fps)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear(functional.silu(embedding)).unflatten(-1, (6, -1))


class Attention(nn.Module):
    """Multi-head attention of queries over keys: [B, Q, G, D], [B, K, G, D] -> [B, Q, G, D].

    The G groups are independent of each other (the tokens of a frame, in temporal attention). A group and
    a head lie side by side in memory, so together they serve as the kernel's heads, and neither transposes
    nor copies are needed to attend along an axis that is not the last but one.

    qk_norm: queries and keys of each head are scaled to a root mean square of 1, times a learned weight, so that
    their products stay bounded in half precision (arXiv:2302.05442, 2.1; RMS as in Stable Diffusion 3).
    """

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.norm_q = nn.RMSNorm(self.head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(self.head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, queries: Tensor, keys: Tensor | KeysValues, mask: Tensor | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        """keys may be projected already, see `keys_values`; mask [B, 1, 1, K] bool: those that may be looked at, at
        least one a row; None: all. rotation: rotary positions of queries and keys alike, see `rotated`.
        """
        query = self.norm_q(self._heads(self.to_q(queries)))
        key, value = self.keys_values(keys)
        if rotation is not None:
            query, key = rotated(query, rotation), rotated(key, rotation)
        query, key, value = (x.flatten(2, 3).transpose(1, 2) for x in (query, key, value))  # [B, G*H, K, D/H], views
        attended = _attend(query, key, value, mask)  # [B, G*H, Q, D/H]
        merged = attended.transpose(1, 2).reshape(queries.shape)
        return self.to_out[0](merged)

    def keys_values(self, keys: Tensor | KeysValues) -> KeysValues:
        """What `forward` makes of its keys, if it is not made yet: a caller with the same keys many times may."""
        if not isinstance(keys, Tensor):
            return keys
        return self.norm_k(self._heads(self.to_k(keys))), self._heads(self.to_v(keys))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, K, G, D] -> [B, K, G, H, D/H], a view."""
        return x.unflatten(-1, (-1, self.head_dim))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, in as many calls as the device's bound on heads asks for."""
    attend = partial(functional.scaled_dot_product_attention, attn_mask=mask)
    if query.shape[1] <= MAX_HEADS_PER_CALL:  # not split into one: the backward of a split copies
        return attend(query, key, value)
    parts = zip(*(x.split(MAX_HEADS_PER_CALL, dim=1) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*part) for part in parts], dim=1)


class Widening(nn.Module):
    """The first layer of the feed-forward; it keeps the reference's name, net.0.proj."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class FeedForward(nn.Module):
    """Token-wise MLP: [..., D] -> [..., D]; of ``chunk_tokens`` at a time, where set."""

    def __init__(self, width: int, mlp_ratio: int) -> None:
        super().__init__()
        hidden = width * mlp_ratio
        # The identity stands where the reference has a dropout: it keeps the second linear's name, net.2.
        self.net = nn.ModuleList([Widening(width, hidden), nn.Identity(), nn.Linear(hidden, width)])
        self.chunk_tokens: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        return in_chunks(self._layers, x, self.chunk_tokens) if self.chunk_tokens else self._layers(x)

    def _layers(self, x: Tensor) -> Tensor:
        return through(self.net[2], _gelu, self.net[0](x))


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


class Block(nn.Module):
    """What spatial and temporal blocks share: self-attention, feed-forward, and their modulation."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = Attention(width, num_heads, qk_norm=qk_norm)
        self.ff = FeedForward(width, mlp_ratio)

    def modulation(self, timestep: Tensor) -> tuple[Tensor, ...]:
        """timestep [B, F, 6, D] -> shift, scale, gate of the attention, then of the feed-forward."""
        return (self.scale_shift_table + timestep).unsqueeze(2).unbind(3)  # six of [B, F, 1, D]


class SpatialBlock(Block):
    """PixArt's block: every frame attends to itself, then every token to the text, then the MLP."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int, *, qk_norm: bool) -> None:
        super().__init__(width, num_heads, mlp_ratio, qk_norm=qk_norm)
        self.attn2 = Attention(width, num_heads)  # no norm: its keys are the text's, bounded by their projection

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor | KeysValues, mask: Tensor | None) -> Tensor:
        """x [B, T, N, D], timestep [B, F, 6, D] -> [B, T, N, D].

        text [B, L, 1, D], or the cross-attention's keys and values of it; mask [B, 1, 1, L] bool, see `Attention`.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(timestep)
        x = torch.addcmul(x, gate, through(self._attend_frames, modulated, x, shift, scale))
        # All frames are queries of one call: keys and values of the text are projected once a sample.
        tokens = x.flatten(1, 2)[:, :, None]  # [B, T*N, 1, D]
        x = x + self.attn2(tokens, text, mask).view_as(x)
        return torch.addcmul(x, gate_mlp, through(self.ff, modulated, x, shift_mlp, scale_mlp))

    def _attend_frames(self, x: Tensor) -> Tensor:
        frames = x.flatten(0, 1)[:, :, None]  # [B*T, N, 1, D]
        return self.attn1(frames, frames).view_as(x)


class TemporalBlock(Block):
    """Latte's temporal block: every token attends to the same place in all frames, then the MLP.

    full: it attends to all places of all frames instead.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: int, *, qk_norm: bool, full: bool) -> None:
        super().__init__(width, num_heads, mlp_ratio, qk_norm=qk_norm)
        self.full = full

    def forward(
        self, x: Tensor, timestep: Tensor, *, added: Tensor | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        """x [B, T, N, D], timestep [B, F, 6, D] -> [B, T, N, D].

        Both kinds of temporal positions are seen by the attention alone: `added` [B or 1, T, 1, D] to what it is
        given, and `rotation` [B or 1, T, 1, D/H] of its queries and keys.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(timestep)
        shift = shift if added is None else shift + added
        attend = partial(self._attend_times, rotation=rotation)
        x = torch.addcmul(x, gate, through(attend, modulated, x, shift, scale))
        return torch.addcmul(x, gate_mlp, through(self.ff, modulated, x, shift_mlp, scale_mlp))

    def _attend_times(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        if not self.full:
            return self.attn1(x, x, rotation=rotation)
        tokens = x.flatten(1, 2)[:, :, None]  # [B, T*N, 1, D]
        rotation = None if rotation is None else rotation.repeat_interleave(x.shape[2], dim=1)
        return self.attn1(tokens, tokens, rotation=rotation).view_as(x)
