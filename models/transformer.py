"""The diffusion transformer: PixArt-alpha's spatial blocks, each followed by one of Latte's temporal blocks.

Sources: PixArt-alpha (arXiv:2310.00426) and Latte (arXiv:2401.03048). With the same weights and no
options the results are those of diffusers' `LatteTransformer3DModel` on unpadded text and, for one frame and
`temporal_init: zero`, of `PixArtTransformer2DModel` (with `size_conditioning`, its 1024 px variant). The legend of
shapes is in `layers.py`.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from models.activations import ActivationMemory, keep
from models.layers import (
    AdaptiveNorm,
    Block,
    KeysValues,
    PatchEmbed,
    SpatialBlock,
    TemporalBlock,
    TwoLayers,
    modulated,
    sincos,
    spatial_positions,
)
from models.sequence_parallel import SharedVideo
from models.step_cache import StepCache

TemporalPos = Literal["stream", "branch", "rope"]
TemporalAttention = Literal["axial", "full"]
TemporalInit = Literal["normal", "zero"]
Prediction = Literal["velocity", "epsilon", "v"]

DEFAULT_FRAME_INTERVAL_S = 1 / 8
# Of a kind of blocks: beyond it they would go on uncompiled.
MOST_COMPILATIONS = 64


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of the network; the defaults are XL/2 for 256 px, Stable Diffusion's VAE and T5-XXL.

    sample_size: latent height and width for which spatial positions are 0, 1, 2, ... at `position_scale` 1;
      other sizes span the same range. position_scale: diffusers' `interpolation_scale`; it divides the
      spatial positions. A 256 px model that starts from PixArt's 512 px weights needs sample_size 64, or
      sample_size 32 and position_scale 0.5.
    temporal_pos: "stream" adds the temporal positions once to the tokens, as Latte does; "branch" shows them
      to the temporal attention alone, so that they cannot disturb an image model's spatial blocks; "rope" turns
      that attention's queries and keys by them, so that it sees distances in time only.
    temporal_pos_per_s: temporal positions a second; 8 gives whole numbers at 8 frames a second.
    temporal_attention: "axial" attends from each place to the same place in all frames; "full" to all places of
      all frames, which costs as many times more as a frame has tokens.
    temporal_init: "zero" starts the temporal blocks as the identity, for use on an image model's weights.
    qk_norm: normalise queries and keys in self-attention, spatial and temporal (not in cross-attention).
    pooled_text: add a learned projection (zero at start) of the mean text vector to the timestep embedding.
    size_conditioning: add embedded height, width and aspect ratio to the timestep embedding, as PixArt-alpha's
      1024 px model does; `forward` then needs `size`.
    fps_conditioning: add the embedded frame rate (1 / frame_interval_s) to the timestep embedding.

    Raises ValueError for values that no network can have.
    """

    in_channels: int = 4
    out_channels: int = 4
    patch_size: int = 2
    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    mlp_ratio: int = 4
    text_dim: int = 4096
    sample_size: int = 32
    position_scale: float = 1.0
    temporal_pos: TemporalPos = "stream"
    temporal_pos_per_s: float = 8.0
    temporal_attention: TemporalAttention = "axial"
    temporal_init: TemporalInit = "normal"
    qk_norm: bool = False
    pooled_text: bool = False
    size_conditioning: bool = False
    fps_conditioning: bool = False

    def __post_init__(self) -> None:
        choices = {
            "temporal_pos": TemporalPos,
            "temporal_attention": TemporalAttention,
            "temporal_init": TemporalInit,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                expected = " or ".join(get_args(allowed))
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")
        sizes = (self.in_channels, self.out_channels, self.patch_size, self.num_layers, self.num_heads)
        if min(*sizes, self.head_dim, self.mlp_ratio, self.text_dim, self.sample_size) < 1:
            raise ValueError(f"every size of the transformer must be at least 1; found {self}")
        if self.width % 4:
            raise ValueError(
                f"num_heads * head_dim is {self.width}; expected a multiple of 4, as a quarter of the "
                "channels each goes to the sine and cosine of row and column"
            )
        if self.temporal_pos == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; expected an even number, as rope turns channels in pairs")
        if self.size_conditioning and self.width % 3:
            raise ValueError(
                f"num_heads * head_dim is {self.width}; expected a multiple of 3, as size_conditioning gives "
                "a third of the channels each to height, width and aspect ratio"
            )

    @property
    def width(self) -> int:
        """D, the model's width."""
        return self.num_heads * self.head_dim

    def tokens(self, frames: int, height: int, width: int) -> int:
        """How many tokens latents of this size (frames, latent height, latent width) have."""
        return frames * (height // self.patch_size) * (width // self.patch_size)


@dataclass(frozen=True)
class TextContext:
    """What depends on the text alone, made by `Transformer.read_text`.

    layers: for each spatial block the projected text [B, L, 1, D], or its cross-attention's keys and values of it.
    mask [B, 1, 1, L] bool; None where nothing is padded. pooled [B, 1, D]: what the mean text adds to the timestep
    embedding, where configured.
    """

    layers: tuple[Tensor | KeysValues, ...]
    mask: Tensor | None
    pooled: Tensor | None


class Transformer(nn.Module):
    """Predicts, from noised latents, what `prediction` says: velocity (noise - data), epsilon (the noise) or v.

    `activation_memory`: what is kept for the backward pass, see `models.activations`. It changes memory and time, not
    results.
    """

    def __init__(self, config: TransformerConfig, prediction: Prediction = "velocity") -> None:
        super().__init__()
        self.config = config
        self.prediction = prediction
        self.activation_memory: ActivationMemory = "none"
        self.sequence_group: dist.ProcessGroup | None = None
        width, block = config.width, (config.width, config.num_heads, config.mlp_ratio)
        full = config.temporal_attention == "full"
        self.pos_embed = PatchEmbed(config.in_channels, width, config.patch_size)
        self.adaln_single = AdaptiveNorm(width, size=config.size_conditioning, fps=config.fps_conditioning)
        self.caption_projection = TwoLayers(config.text_dim, width, nn.GELU(approximate="tanh"))
        self.pooled_text = nn.Linear(config.text_dim, width) if config.pooled_text else None
        self.transformer_blocks = nn.ModuleList(
            SpatialBlock(*block, qk_norm=config.qk_norm) for _ in range(config.num_layers)
        )
        self.temporal_transformer_blocks = nn.ModuleList(
            TemporalBlock(*block, qk_norm=config.qk_norm, full=full) for _ in range(config.num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.out_channels)
        _initialise(self)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        text_mask: Tensor | None = None,
        *,
        frame_interval_s: float | Tensor | None = None,
        size: Tensor | tuple[int, int] | None = None,
        cache: StepCache | None = None,
    ) -> Tensor:
        """[B, C, T, h, w] -> [B, C', T, h, w], where C' is `config.out_channels`.

        timestep [B], or [B, T] for frames at different noise levels: 1000 is pure noise, 0 is data.
        text [B, L, D_text]; text_mask [B, L] bool, at least one true a row: rows that are false are padding
        and change nothing; None where nothing is padded. Or, in place of both, what `read_text` made of them.
        frame_interval_s: seconds from one frame to the next, for all or [B]; 1/8 when not given. size: height and
        width in pixels, for all or [B, 2]; networks that are conditioned on it need it, others ignore it. cache: of
        the sampling that this is a step of; the result then is nearly the same.

        Raises ValueError for latents that do not divide into patches, for a size that is needed and missing, and for a
        cache where ranks share the video, as each would decide for itself.
        """
        if cache is not None and self.sequence_group is not None:
            raise ValueError("cache: found one, expected none where the ranks share a video")
        dtype = self.scale_shift_table.dtype
        if not isinstance(text, TextContext):
            text = self._project(text, text_mask)
        grid, frames = self._grid(latents), latents.shape[2]
        video = SharedVideo(self.sequence_group, frames, grid[0] * grid[1])
        x = self.pos_embed(video.own_frames(latents, 2).to(dtype))  # [B, T, N, D]
        x = (x + self._spatial_positions(grid, x.device)).to(dtype)
        interval_s = self._interval(frame_interval_s, x.device)  # [B or 1, 1]
        embedding = self._embed(timestep, text.pooled, size, interval_s)  # [B, F, D]
        vectors = self.adaln_single(embedding)  # [B, F, 6, D]
        times = self._temporal_positions(frames, interval_s)
        pairs = [
            partial(
                keep, self.activation_memory, "pair", self._pair, index, vectors, layer_text, text.mask, times, video
            )
            for index, layer_text in enumerate(text.layers)
        ]
        if cache is not None:
            pairs = [partial(cache.through, pairs)]
        for pair in pairs:
            x = pair(x)
        x = self._last_layer(x, video.own_frames(embedding, 1))
        return self._unpatchify(video.all_frames(x), grid)

    def shard_sequence(self, group: dist.ProcessGroup | None) -> None:
        """From now on the ranks of ``group`` compute each video together (see `models.sequence_parallel`); None: alone.

        Every rank of the group then calls `forward` with the same arguments and gets the same, whole result. Raises
        ValueError where temporal attention is full, which needs all places of all frames at once.
        """
        if group is not None and self.config.temporal_attention == "full":
            raise ValueError("temporal_attention is 'full'; expected 'axial' where the ranks share a video")
        self.sequence_group = group

    def read_text(self, text: Tensor, text_mask: Tensor | None = None) -> TextContext:
        """Text and mask as `forward` takes them -> what all calls with this text share, keys and values included.

        For sampling, where many calls follow. In training each block makes its own keys and values, so that they need
        not be kept where its activations are not.
        """
        context = self._project(text, text_mask)
        layers = []
        for block, layer in zip(self.transformer_blocks, context.layers, strict=True):
            assert isinstance(block, SpatialBlock)
            layers.append(block.attn2.keys_values(layer))
        return replace(context, layers=tuple(layers))

    def _project(self, text: Tensor, text_mask: Tensor | None) -> TextContext:
        text = text.to(self.scale_shift_table.dtype)
        captions = self.caption_projection(text)[:, :, None]  # [B, L, 1, D]
        pooled = None if self.pooled_text is None else self.pooled_text(_mean(text, text_mask))
        mask = None if text_mask is None else text_mask[:, None, None, :]
        return TextContext((captions,) * self.config.num_layers, mask, pooled)

    def chunk_mlp(self, tokens: int | None) -> None:
        """Let the blocks' MLPs take so many tokens at a time; None: all."""
        for block in (*self.transformer_blocks, *self.temporal_transformer_blocks):
            assert isinstance(block, Block)
            block.ff.chunk_tokens = tokens

    def compile_blocks(self, *, any_size: bool) -> None:
        """Compile each block alone, at its first call: blocks of a kind share what was compiled.

        any_size: once for all sizes above 1, as training needs, where almost every batch has another length of text;
        otherwise once for each, so that the last bits of a result do not depend on which sizes came first.

        It changes time, not results beyond rounding; parameters keep their names. `activation_memory` "selective" and
        chunked MLPs do not go with it: what they choose lies within a block.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILATIONS)
        for block in (*self.transformer_blocks, *self.temporal_transformer_blocks):
            block.compile(dynamic=any_size)

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        """Patches along height and along width."""
        patch = self.config.patch_size
        height, width = latents.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"latents are {height}x{width}; expected multiples of the patch size {patch}")
        return height // patch, width // patch

    def _spatial_positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """[N, D]"""
        base = self.config.sample_size // self.config.patch_size
        return spatial_positions(*grid, self.config.width, base=base, scale=self.config.position_scale, device=device)

    def _interval(self, frame_interval_s: float | Tensor | None, device: torch.device) -> Tensor:
        """Seconds between frames, [B or 1, 1] float64."""
        interval_s = DEFAULT_FRAME_INTERVAL_S if frame_interval_s is None else frame_interval_s
        return torch.as_tensor(interval_s, dtype=torch.float64).to(device, non_blocking=True).reshape(-1, 1)

    def _temporal_positions(self, frames: int, interval_s: Tensor) -> Tensor:
        """Time since the first frame, in units of 1 / temporal_pos_per_s: [B or 1, T, 1, D], for rope D/H."""
        numbers = torch.arange(frames, dtype=torch.float64, device=interval_s.device)
        positions = (numbers * interval_s * self.config.temporal_pos_per_s)[:, :, None]
        if self.config.temporal_pos == "rope":
            return sincos(positions, self.config.head_dim)
        return sincos(positions, self.config.width).to(self.scale_shift_table.dtype)

    def _embed(
        self,
        timestep: Tensor,
        pooled_text: Tensor | None,
        size: Tensor | tuple[int, int] | None,
        interval_s: Tensor,
    ) -> Tensor:
        """What conditions all tokens: the timestep, and as configured size, frame rate and mean text, [B, F, D]."""
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        if size is not None:
            size = torch.as_tensor(size, dtype=torch.float32).to(timestep.device, non_blocking=True).reshape(-1, 2)
        embedding = self.adaln_single.emb(timestep, size, 1 / interval_s, self.scale_shift_table.dtype)
        return embedding if pooled_text is None else embedding + pooled_text

    def _pair(
        self,
        index: int,
        vectors: Tensor,
        text: Tensor | KeysValues,
        mask: Tensor | None,
        times: Tensor,
        video: SharedVideo,
        x: Tensor,
    ) -> Tensor:
        """A spatial block and the temporal block after it: [B, T, N, D] -> [B, T, N, D], this rank's frames."""
        spatial = partial(keep, self.activation_memory, "block", self.transformer_blocks[index])
        x = spatial(x, video.own_frames(vectors, 1), text, mask)
        return video.to_frames(self._temporal(index, video.to_tokens(x), vectors, times))

    def _temporal(self, index: int, x: Tensor, vectors: Tensor, times: Tensor) -> Tensor:
        """[B, T, N, D] -> [B, T, N, D], of all frames."""
        block = partial(keep, self.activation_memory, "block", self.temporal_transformer_blocks[index])
        if self.config.temporal_pos == "branch":
            return block(x, vectors, added=times)
        if self.config.temporal_pos == "rope":
            return block(x, vectors, rotation=times)
        # Latte gives a single image no temporal position.
        return block(x + times if index == 0 and x.shape[1] > 1 else x, vectors)

    def _last_layer(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B, T, N, D] -> [B, T, N, p*p*C']"""
        shift, scale = (self.scale_shift_table + embedding[:, :, None]).unsqueeze(2).unbind(3)
        return self.proj_out(modulated(x, shift, scale))

    def _unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, T, N, p*p*C'] -> [B, C', T, h, w]"""
        (rows, columns), patch = grid, self.config.patch_size
        return rearrange(x, "b t (y x) (p q c) -> b c t (y p) (x q)", y=rows, x=columns, p=patch, q=patch)


def _mean(text: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the vectors that are no padding: [B, L, D], [B, L] -> [B, 1, D]."""
    if mask is None:
        return text.mean(1, keepdim=True)
    kept = mask[:, :, None]
    return text.masked_fill(~kept, 0).sum(1, keepdim=True) / kept.sum(1, keepdim=True)


def _initialise(model: Transformer) -> None:
    """PixArt's start: embedders of timestep and caption small, the text's influence and the output zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a patch embedding is a linear layer too
            _zero(module.bias)
    for embedder in (model.adaln_single.emb.timestep_embedder, model.caption_projection):
        nn.init.normal_(embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.linear_2.weight, std=0.02)
    nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
    _zero(*model.proj_out.parameters())
    if model.pooled_text is not None:
        _zero(*model.pooled_text.parameters())
    told = model.adaln_single.emb
    for optional in (told.resolution_embedder, told.aspect_ratio_embedder, told.fps_embedder):
        if optional is not None:
            _zero(*optional.linear_2.parameters())
    for module in model.modules():
        if isinstance(module, SpatialBlock):
            _zero(*module.attn2.to_out.parameters())
        elif isinstance(module, TemporalBlock) and model.config.temporal_init == "zero":
            _zero(*module.attn1.to_out.parameters(), *module.ff.net[2].parameters())


def _zero(*parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)
