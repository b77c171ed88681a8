"""Small transformers with every parameter drawn at random, and the diffusers models they are held against."""

from typing import Any

import torch
from diffusers import DDIMScheduler, LatteTransformer3DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from models.transformer import Transformer, TransformerConfig

SMALL = TransformerConfig(
    in_channels=4, out_channels=8, num_layers=2, num_heads=2, head_dim=12, text_dim=20, sample_size=16
)
# Frames, height and width of latents.
SHAPES = [
    (1, 16, 16),
    (1, 8, 12),
    (2, 16, 16),
    (2, 6, 10),
    (3, 8, 8),
    (4, 12, 4),
    (5, 16, 16),
    (5, 32, 8),
    (8, 4, 6),
    (16, 8, 8),
    (17, 2, 2),
    (40, 2, 8),
    (4, 24, 24),
]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter, those that start at zero too, large enough for each to show in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def random_transformer(config: TransformerConfig = SMALL, seed: int = 0) -> Transformer:
    model = Transformer(config)
    randomise(model, seed)
    return model


def silence_temporal_attention(model: Transformer, *, but: int) -> None:
    """In all temporal blocks but one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn1.to_out." in name and name.startswith("temporal_transformer_blocks."):
                if not name.startswith(f"temporal_transformer_blocks.{but}."):
                    parameter.zero_()


def ddim(prediction: str, steps: int) -> DDIMScheduler:
    """Our objectives of 1000 steps in the words of diffusers."""
    v = prediction == "v"
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type="v_prediction" if v else "epsilon",
        rescale_betas_zero_snr=v, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    return scheduler


def diffusers_arguments(config: TransformerConfig) -> dict[str, Any]:
    """Our config in the words of the diffusers classes."""
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.num_layers,
        "cross_attention_dim": config.width,
        "attention_bias": True,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": config.text_dim,
    }


def latte(config: TransformerConfig, frames: int) -> LatteTransformer3DModel:
    """The reference video model; its temporal positions are made for one number of frames."""
    return LatteTransformer3DModel(**diffusers_arguments(config), video_length=frames).eval()


def pixart(config: TransformerConfig) -> PixArtTransformer2DModel:
    """The reference image model."""
    arguments = diffusers_arguments(config) | {"interpolation_scale": config.position_scale}
    return PixArtTransformer2DModel(**arguments, use_additional_conditions=config.size_conditioning).eval()


def image_model(config: TransformerConfig) -> tuple[Transformer, PixArtTransformer2DModel]:
    """A fresh video model on the random weights of the reference image model, and that model."""
    reference = pixart(config)
    randomise(reference)
    model = Transformer(config).eval()
    result = model.load_state_dict(reference.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("temporal_transformer_blocks.") for name in result.missing_keys)
    return model, reference


def inputs(
    config: TransformerConfig = SMALL,
    shape: tuple[int, int, int] = (3, 8, 8),
    lengths: tuple[int, ...] = (5, 5),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents of (frames, height, width), timesteps, text padded with garbage, and its mask."""
    generator = torch.Generator().manual_seed(sum(shape))
    batch, longest = len(lengths), max(lengths)
    latents = torch.randn(batch, config.in_channels, *shape, generator=generator)
    timestep = torch.linspace(37.5, 950, batch)
    text = torch.randn(batch, longest, config.text_dim, generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return latents, timestep, text, mask


def assert_close(found: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    """The largest difference is at most this share of the expected values' scale."""
    assert found.shape == expected.shape
    scale = expected.abs().max()
    assert scale > 0.1, "the reference's output is too small to compare anything with"
    assert (found - expected).abs().max() <= share * scale
