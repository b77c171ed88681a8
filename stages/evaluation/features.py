"""What a distance between videos is taken in: the features of a network, or a fixed statistic of latents."""

from pathlib import Path

import numpy as np
import torch

from stages.errors import ConfigError

GRID = 2
"""Rows and columns that a frame is cut into for the statistic's means."""


class FeatureNetwork:
    """A TorchScript file that makes features [B, D] of videos [B, 3, T, H, W].

    One whose ``forward`` takes ``rescale``, ``resize`` and ``return_features``, as StyleGAN-V's i3d_torchscript.pt
    does (github.com/universome/stylegan-v, src/metrics/frechet_video_distance.py), is called with all three true and
    gets values of 0 to 255. Any other gets values of 0 to 1, at the videos' own size, and does the rest itself.
    More axes than [B, D] are averaged away: [B, tokens, D], as a V-JEPA encoder's, over the tokens.
    """

    def __init__(self, path: str, device: torch.device):
        if not Path(path).is_file():
            raise ConfigError(f"no file at {path}: give features= a TorchScript file")
        try:
            self._network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise ConfigError(f"{path} is no TorchScript file ({str(error).splitlines()[0]})") from None
        self.name = Path(path).name
        arguments = {argument.name for argument in self._network.forward.schema.arguments}
        self._as_i3d = {"rescale", "resize", "return_features"} <= arguments
        self._device = device

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Of one clip, uint8 [T, H, W, 3] -> float64 [D]. Raises ConfigError where the network cannot take it."""
        video = torch.from_numpy(frames).to(self._device).permute(3, 0, 1, 2)[None].float()  # [1, 3, T, H, W]
        try:
            if self._as_i3d:
                found = self._network(video, rescale=True, resize=True, return_features=True)
            else:
                found = self._network(video / 255)
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            raise ConfigError(f"{self.name} cannot take videos {list(video.shape)}: {lines[-1]}") from None
        if not isinstance(found, torch.Tensor) or found.ndim < 2 or len(found) != 1:
            shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ConfigError(f"{self.name} gives {shape} of videos {list(video.shape)}, expected features [1, D]")
        return found.double().reshape(-1, found.shape[-1]).mean(0).cpu().numpy()


def latent_moments(latents: np.ndarray) -> np.ndarray:
    """A clip's statistic for a distance without a network: latents [T, C, h, w] -> float64 [7 C].

    Of each channel: its mean in each quarter of the picture, its standard deviation within frames, between neighbouring
    pixels, and from frame to frame. So colour, layout, contrast, detail and motion count, and nothing of what is seen.
    """
    z = latents.astype(np.float64)
    rows = [half for part in np.array_split(z, GRID, axis=2) for half in np.array_split(part, GRID, axis=3)]
    layout = [part.mean((0, 2, 3)) for part in rows]
    contrast = z.std((2, 3)).mean(0)
    detail = np.sqrt(np.square(np.diff(z, axis=3)).mean((0, 2, 3)))
    motion = np.sqrt(np.square(np.diff(z, axis=0)).mean((0, 2, 3))) if len(z) > 1 else np.zeros(z.shape[1])
    return np.concatenate([*layout, contrast, detail, motion])


def in_spreads(samples: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both [n, D] in units of each feature's standard deviation over the real clips."""
    spread = real.std(0)
    spread[spread == 0] = 1
    return samples / spread, real / spread
