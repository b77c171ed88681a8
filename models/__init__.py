"""The diffusion transformer, its objectives, and the frozen VAE and text encoder."""

from models.weights import load_transformer

__all__ = ["load_transformer"]
