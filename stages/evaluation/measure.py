"""Measures a checkpoint: its loss, and its samples beside real clips."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models.compute import default_device
from models.identity import vae_identity
from models.vae import FrozenVAE
from shards.dataset import Dataset
from shards.schema import Bucket
from stages.errors import ConfigError
from stages.evaluation.clip_score import ClipNetwork, ClipScore, measure_clip_score
from stages.evaluation.clip_sets import ClipSet, real, sampled
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.features import FeatureNetwork, in_spreads, latent_moments
from stages.evaluation.frechet import FrechetDistance, measure_frechet
from stages.evaluation.held_out_loss import comparable, measure_loss
from stages.evaluation.inputs import read_samples
from stages.evaluation.intervals import estimate_mean
from stages.evaluation.measured import Beside, Measured
from stages.evaluation.motion import MEASURES, measure_clip
from stages.evaluation.nearest import measure_nearest, signature
from stages.evaluation.trained import Execution, Trained
from stages.output import progress_bar
from stages.sampling.checkpoint import require_same
from stages.training.held_out import ValidationConfig, training_filter


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured, and with what: opened and checked before any work is done."""

    trained: Trained
    against: Trained | None
    execution: Execution
    features: FeatureNetwork | None
    clip: ClipNetwork | None

    @classmethod
    def open(cls, config: EvaluateConfig) -> "Subject":
        """Raises ConfigError where something cannot be opened, is not of the checkpoint or does not compare with it."""
        trained = Trained.open(config.checkpoint, config.shards)
        path = config.pretrained_model_path
        require_same("VAE", path, vae_identity(path), trained.info.vae, "the checkpoint")
        against = Trained.open(config.against, config.shards) if config.against else None
        if against:
            comparable(trained, against)
        device = default_device()
        return cls(
            trained,
            against,
            Execution(device, config.precision, config.batch_size, config.weights),
            FeatureNetwork(config.features, device) if config.features else None,
            ClipNetwork(config.clip, device) if config.clip else None,
        )

    def completed(self, config: EvaluateConfig) -> EvaluateConfig:
        """The config with the run and the shards that the checkpoint names."""
        trained = self.trained
        return replace(config, run=config.run or str(trained.run), shards=config.shards or trained.data.shards)


@dataclass(frozen=True, eq=False)
class Numbers:
    """What the clips of a set measure, a row a clip."""

    motion: dict[str, np.ndarray]  # [n] each
    moments: np.ndarray  # [n, 7 C]
    signatures: np.ndarray  # [n, D]
    features: np.ndarray | None  # [n, D], of the network
    directions: np.ndarray | None  # [n, D], of CLIP


def measure(config: EvaluateConfig, subject: Subject) -> Measured:
    """The loss, and the samples in ``config.samples`` beside real clips."""
    loss = measure_loss(config.loss, subject.trained, subject.against, subject.execution)
    return replace(_measure_samples(config, subject), loss=loss)


def _measure_samples(config: EvaluateConfig, subject: Subject) -> Measured:
    """The samples of ``config.samples`` beside as many held-out clips of their size, or of training clips where
    nothing is held out, and among the training clips.

    Raises ConfigError where the samples are of several sizes.
    """
    trained = subject.trained
    vae = FrozenVAE.load(config.pretrained_model_path, subject.execution.device)
    samples = sampled(Path(config.samples), read_samples(config.samples), vae)
    frames, height, width, _ = samples.read(0)[0].shape
    size = Bucket(height, width, frames)
    if size.name not in trained.info.buckets:
        return Measured(notes=[f"the samples are {size}, of which the run has no clips: nothing is compared with them"])
    dataset = trained.open_clips([size.name])
    column = next(iter(trained.data.text_columns()))
    clips = real(dataset, size, column, config.clips.real or len(samples.names), vae)
    own, theirs = _numbers(samples, subject, "samples"), _numbers(clips, subject, "real clips")
    nearest = measure_nearest(
        _training_clips(trained, size),
        size,
        config.clips.training,
        (own.signatures, samples.names, samples.sources),
        (theirs.signatures, clips.sources),
    )
    frechet = _distances(own, theirs, subject)
    return Measured(
        frechet=frechet,
        motion=_beside(own, theirs, samples, clips),
        nearest=nearest,
        clip_score=_clip_score(own, theirs, samples, clips, subject),
        real_clips=trained.clips,
        notes=[] if frechet else ["too few samples or real clips for a Fréchet distance: 4 at least"],
    )


def _training_clips(trained: Trained, size: Bucket) -> Dataset:
    data = trained.data
    chosen = training_filter(data.filter, ValidationConfig(holdout=trained.holdout))
    return Dataset.open(data.shards, buckets=[size.name], text=list(data.text_columns()), filter=chosen)


def _numbers(clips: ClipSet, subject: Subject, what: str) -> Numbers:
    """In one pass. Raises ConfigError where the clips are of several sizes."""
    motion: list[dict[str, float]] = []
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("moments", "signatures", "features", "directions")}
    size = None
    with progress_bar(len(clips.names), what, "clip") as bar:
        for name, (frames, latents) in zip(clips.names, clips, strict=True):
            if size not in (None, frames.shape):
                found = f"{list(frames.shape)}, others {list(size)}"
                raise ConfigError(f"{name} has frames {found}: evaluate samples of one size at a time")
            size = frames.shape
            motion.append(measure_clip(frames, subject.execution.device))
            rows["moments"].append(latent_moments(latents))
            rows["signatures"].append(signature(latents))
            if subject.features:
                rows["features"].append(subject.features(frames))
            if subject.clip:
                rows["directions"].append(subject.clip.of_frames(frames))
            bar.update()
    return Numbers(
        {name: np.array([one[name] for one in motion]) for name in motion[0]},
        np.stack(rows["moments"]),
        np.stack(rows["signatures"]),
        np.stack(rows["features"]) if subject.features else None,
        np.stack(rows["directions"]) if subject.clip else None,
    )


def _distances(own: Numbers, theirs: Numbers, subject: Subject) -> list[FrechetDistance]:
    found = [measure_frechet("VAE latents", *in_spreads(own.moments, theirs.moments), diagnostic=True)]
    if subject.features and own.features is not None and theirs.features is not None:
        found.insert(0, measure_frechet(subject.features.name, own.features, theirs.features, diagnostic=False))
    return [distance for distance in found if distance]


def _beside(own: Numbers, theirs: Numbers, samples: ClipSet, clips: ClipSet) -> list[Beside]:
    return [
        Beside(
            name,
            unit,
            estimate_mean(own.motion[name], samples.sources),
            estimate_mean(theirs.motion[name], clips.sources),
        )
        for name, unit in MEASURES.items()
        if name in own.motion
    ]


def _clip_score(own: Numbers, theirs: Numbers, samples: ClipSet, clips: ClipSet, subject: Subject) -> ClipScore | None:
    if subject.clip is None or own.directions is None or theirs.directions is None:
        return None
    captioned = (theirs.directions, clips.captions, clips.sources)
    return measure_clip_score(subject.clip, (own.directions, samples.captions), captioned)
