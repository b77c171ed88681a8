"""Samples while training, of captions whose embeddings are in the shards: no encoder or decoder is loaded.

What is left are latents, for `stages.sampling` to decode, and what the dataset's map from latents to colours shows of
them. The weights are those being trained. Nothing here draws from torch's own generator, so that a run that samples
trains as one that does not.
"""

from dataclasses import dataclass

import numpy as np
import torch

from models.latents import LatentStats
from models.transformer import Transformer
from models.weights import CheckpointInfo
from shards.latent_rgb import to_rgb
from shards.loader import DataConfig
from shards.node_tables import Share, own_table
from shards.schema import LATENTS, MEAN, TEXT, Bucket
from stages.contact_sheet import contact_sheet, moving_sheet
from stages.engine import stacked_on_main
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Request, denoise
from stages.sampling.sampled_latents import SampledLatents
from stages.training.held_out import ValidationConfig, caption_of, draw_clips, largest_filled, open_clips

PICTURE_PX, VIDEO_PX = 256, 128  # about the longer side of a frame that is shown; of a video all of them are kept


@dataclass(frozen=True, eq=False)
class Prompts:
    """The captions of a few clips, and those clips' own latents to compare with. Sample i has the seed i."""

    bucket: Bucket
    captions: list[str]
    texts: list[torch.Tensor]  # [L, D] each
    clips: np.ndarray  # [N, T, C, h, w], unscaled
    config: ValidationConfig
    rank: int
    world: int

    @classmethod
    def open(
        cls,
        config: ValidationConfig,
        data: DataConfig,
        buckets: list[str],
        rank: int,
        world: int,
        share: Share = own_table,
    ) -> "Prompts | None":
        """Choose the clips, of the largest bucket that has any; None where nothing is sampled.

        They are held-out ones, or where nothing is held out, of those that are trained on. A caption is that of the
        first text column. Raises ConfigError where the share held out holds no clip.
        """
        if config.sample_every is None:
            return None
        column = next(iter(data.text_columns()))
        dataset = open_clips(config, data, buckets, share)
        largest = largest_filled(dataset)
        rows = [row for _, row in draw_clips(dataset, [largest], config.sample_prompts)]
        return cls(
            largest,
            [caption_of(dataset, largest, row, column) for row in rows],
            [torch.from_numpy(dataset.read(largest, row, column)[TEXT]) for row in rows],
            np.stack([dataset.read(largest, row, LATENTS)[MEAN] for row in rows]),
            config,
            rank,
            world,
        )

    @property
    def every(self) -> int:
        assert self.config.sample_every is not None
        return self.config.sample_every

    def __str__(self) -> str:
        which = "held-out" if self.config.holdout else "training"
        return f"samples the captions of {len(self.captions)} {which} clips of {self.bucket} every {self.every} steps"

    def sample(
        self, model: Transformer, info: CheckpointInfo, null_text: torch.Tensor, step: int
    ) -> SampledLatents | None:
        """On rank 0 what the weights at ``step`` make of the captions; every rank must call.

        One at a time, so that a sample is the same on any number of ranks. All ranks make the same calls of the model,
        as ZeRO-3 needs: those that have none left make one again.
        """
        _, frames, channels, height, width = self.clips.shape
        rounds: list[torch.Tensor] = []
        model.eval()
        for start in range(0, len(self.captions), self.world):
            number = (start + self.rank) % len(self.captions)
            latents = denoise(
                model,
                info,
                [Request(self.texts[number], null_text, seed=number)],
                (channels, frames, height, width),
                DenoiseConfig(steps=self.config.sample_steps, guidance_scale=self.config.sample_guidance_scale),
            )
            of_all_ranks = stacked_on_main(latents[0])
            if of_all_ranks is not None:
                rounds.append(of_all_ranks[:: len(of_all_ranks) // self.world])  # one of those that share a video
        model.train()
        if not rounds:
            return None
        latents = LatentStats.of(info.vae).denormalise(torch.cat(rounds)[: len(self.captions)]).cpu()
        seeds = list(range(len(self.captions)))
        return SampledLatents(latents, self.captions, seeds, step, info.vae, 1 / info.frame_interval_s)

    def picture(self, latents: np.ndarray, rgb_map: list[list[float]]) -> np.ndarray:
        """A row a caption, frames from left to right: latents [N, T, C, h, w], unscaled -> uint8 [H, W, 3]."""
        return np.asarray(contact_sheet(_frames(latents, rgb_map, PICTURE_PX), self.captions))

    def video(self, latents: np.ndarray, rgb_map: list[list[float]]) -> np.ndarray:
        """A row a caption: latents [N, T, C, h, w], unscaled -> uint8 [T, H, W, 3]."""
        return moving_sheet(_frames(latents, rgb_map, VIDEO_PX), self.captions)


def _frames(latents: np.ndarray, rgb_map: list[list[float]], longer_side_px: int) -> list[np.ndarray]:
    """What the map shows of latents [N, T, C, h, w], enlarged: N of uint8 [T, H, W, 3]."""
    frames = to_rgb(latents, rgb_map)  # [N, T, h, w, 3]
    times = max(1, longer_side_px // max(frames.shape[2:4]))
    return list(frames.repeat(times, 2).repeat(times, 3))
