"""The diffusion transformer, its objectives, and the frozen VAE and text encoder."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.loading import load_transformer

__all__ = ["load_transformer"]


def __getattr__(name: str) -> Any:
    """Loads torch when a model is asked for: not for the settings and errors of this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from models.loading import load_transformer

    return load_transformer
