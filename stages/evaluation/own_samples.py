"""Samples of captions whose embeddings are in the shards: no text encoder is needed."""

from pathlib import Path

import torch

from models.latents import LatentStats
from models.weights import read_null_text
from shards.schema import LATENTS, TEXT
from stages.evaluation.config import ClipsConfig, EvaluateConfig
from stages.evaluation.trained import Execution, Trained
from stages.output import progress_bar
from stages.sampling.config import DenoiseConfig, SampleConfig
from stages.sampling.denoise import Request, denoise
from stages.sampling.sample import sample
from stages.sampling.sampled_latents import SampledLatents
from stages.training.held_out import caption_of, draw_clips, largest_filled


def make_samples(config: EvaluateConfig, trained: Trained, run: Execution, output: Path) -> Path:
    """A samples folder in ``output``, as sample leaves it, and the latents beside it."""
    file, folder = output / "samples.safetensors", output / "samples"
    sample_captions(config.clips, trained, run).save(file)
    vae = config.pretrained_model_path
    sample(SampleConfig(latents=str(file), pretrained_model_path=vae, output=str(folder)))
    return folder


def sample_captions(config: ClipsConfig, trained: Trained, run: Execution) -> SampledLatents:
    """Samples of the captions of held-out clips of the largest bucket, or where nothing is held out, of training clips.

    Sample i has the seed i; captions are taken again where they are fewer than the samples.
    """
    dataset = trained.open_clips(list(trained.info.buckets))
    bucket, column = largest_filled(dataset), next(iter(trained.data.text_columns()))
    rows = [row for _, row in draw_clips(dataset, [bucket], config.samples)]
    texts = [torch.from_numpy(dataset.read(bucket, row, column)[TEXT]) for row in rows]
    captions = [caption_of(dataset, bucket, row, column) for row in rows]
    frames, channels, height, width = dataset.shapes(bucket, LATENTS)[rows[0]].tolist()

    model, null_text = run.load(trained), read_null_text(trained.checkpoint)[0]
    how = DenoiseConfig(steps=config.steps, guidance_scale=config.guidance_scale)
    made: list[torch.Tensor] = []
    with progress_bar(config.samples, "denoise", "video") as bar:
        for start in range(0, config.samples, run.batch_size):
            seeds = range(start, min(start + run.batch_size, config.samples))
            requests = [Request(texts[seed % len(texts)], null_text, seed) for seed in seeds]
            made.append(denoise(model, trained.info, requests, (channels, frames, height, width), how).cpu())
            bar.update(len(seeds))
    seeds = range(config.samples)
    return SampledLatents(
        LatentStats.of(trained.info.vae).denormalise(torch.cat(made)),
        [captions[seed % len(captions)] for seed in seeds],
        list(seeds),
        trained.info.step,
        trained.info.vae,
        1 / trained.info.frame_interval_s,
    )
