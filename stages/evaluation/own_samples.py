"""Samples of captions whose embeddings are in the shards: no text encoder is needed."""

from pathlib import Path

import torch

from models.latents import LatentStats
from models.weights import read_null_text
from shards.schema import LATENTS, TEXT
from stages.evaluation.config import ClipsConfig, EvaluateConfig
from stages.evaluation.trained import Execution, Trained
from stages.output import output_folder
from stages.sampling.config import SampleConfig
from stages.sampling.denoise import Request
from stages.sampling.files import LATENTS_FILE
from stages.sampling.generate import denoise_all
from stages.sampling.models import Models
from stages.sampling.sample import sample
from stages.sampling.sampled_latents import SampledLatents
from stages.training.held_out import caption_of, draw_clips, largest_filled


def make_samples(config: EvaluateConfig, trained: Trained, run: Execution, output: Path) -> Path:
    """A samples folder in ``output``, as sample leaves it, with the latents beside the videos."""
    folder = output_folder(str(output / "samples"))
    sample_captions(config.clips, trained, run).save(folder / LATENTS_FILE)
    vae, latents = config.pretrained_model_path, str(folder / LATENTS_FILE)
    sample(SampleConfig(latents=latents, pretrained_model_path=vae, output=str(folder)))
    return folder


def sample_captions(config: ClipsConfig, trained: Trained, run: Execution) -> SampledLatents:
    """Samples of the captions of held-out clips of the largest bucket, or where nothing is held out, of training clips.

    Sample i has the seed i; captions are taken again where they are fewer than the samples.
    """
    info, dataset = trained.info, trained.open_clips(list(trained.info.buckets))
    bucket, column = largest_filled(dataset), next(iter(trained.data.text_columns()))
    rows = [row for _, row in draw_clips(dataset, [bucket], config.samples)]
    texts = [torch.from_numpy(dataset.read(bucket, row, column)[TEXT]) for row in rows]
    captions = [caption_of(dataset, bucket, row, column) for row in rows]
    frames, channels, height, width = dataset.shapes(bucket, LATENTS)[rows[0]].tolist()

    null_text = read_null_text(trained.checkpoint)
    seeds = list(range(config.samples))
    requests = [Request(texts[seed % len(texts)], null_text, seed) for seed in seeds]
    how = SampleConfig(
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        batch_size=run.batch_size,
        weights=run.weights,
        precision=run.precision,
    )
    shape = (channels, frames, height, width)
    latents = denoise_all(how, requests, trained.checkpoint, info, shape, Models.on_this_machine())
    prompts = [captions[seed % len(captions)] for seed in seeds]
    return SampledLatents(
        LatentStats.of(info.vae).denormalise(latents), prompts, seeds, info.step, info.vae, 1 / info.frame_interval_s
    )
