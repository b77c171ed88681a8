"""The diffusion transformer, its objectives, and the frozen VAE and text encoder."""

from models.loading import load_transformer

__all__ = ["load_transformer"]
