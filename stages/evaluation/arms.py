"""The arms of a comparison: what each trains on, what they share, and whether they can be compared at all."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shards import storage
from shards.dataset import Dataset
from shards.loader import DataConfig
from shards.manifest import differences
from shards.schema import KEY, LATENTS
from stages.errors import ConfigError
from stages.evaluation.compare_config import CompareConfig
from stages.training.config import TrainConfig, settled
from stages.training.held_out import ValidationConfig, draw_clips, open_clips
from stages.training.source import Source, open_source

TOKENS_TOLERANCE = 0.01
"""Arms whose runs differ by a larger share of tokens are no equal ones."""


@dataclass(frozen=True)
class Arm:
    """One arm; its runs differ from ``config`` in seed and output.

    clips: that it trains on; shared: of them, those that the first arm has too. same_order: whether its steps take the
    clips of the first arm's steps. tokens: of one run. changed: the settings that the first arm has otherwise.
    """

    name: str
    config: TrainConfig
    clips: int
    shared: int
    same_order: bool
    passes: float
    tokens: int
    changed: list[str]


@dataclass(frozen=True)
class Comparison:
    """Arms that can be compared, the first being what the others are compared with, and their common ground.

    clips: how many of ``held_out`` are looked at.
    """

    config: CompareConfig
    arms: list[Arm]
    ground: DataConfig
    holdout: float
    held_out: Dataset
    clips: int

    def run_config(self, arm: Arm, seed: int) -> TrainConfig:
        """The settings of one run."""
        folder = storage.local_path(self.config.output) / arm.name
        return replace(arm.config, seed=seed, output=str(folder / f"seed-{seed}"))


def open_comparison(config: CompareConfig, arms: Mapping[str, TrainConfig]) -> Comparison:
    """Look at every arm's data before anything is trained. Raises ConfigError for arms that cannot be compared."""
    holdout = _holdout(arms)
    first_name, first = next(iter(arms.items()))
    reference = _open(first_name, first)
    opened: list[Arm] = []
    for name, arm in arms.items():
        source = reference if name == first_name else _open(name, arm)
        _check_judged_alike(name, settled(arm, None), source, settled(first, None), reference)
        opened.append(_arm(name, arm, source, first, reference))
    _check_tokens(opened)
    ground = _ground(config, first)
    held_out = open_clips(ValidationConfig(holdout=holdout), ground, _buckets(ground.shards))
    _check_ground(held_out, ground, reference)
    return Comparison(config, opened, ground, holdout, held_out, _clips(held_out, config.loss.samples))


def _holdout(arms: Mapping[str, TrainConfig]) -> float:
    """The share of sources that no arm sees: a source has the same ``split`` in every dataset."""
    found = {name: arm.validation.holdout for name, arm in arms.items()}
    if len(set(found.values())) > 1 or 0 in found.values():
        told = ", ".join(f"{name} {share:g}" for name, share in found.items())
        raise ConfigError(
            f"validation.holdout: found {told}, expected the same share above 0 in every arm, so that none trains on "
            "the clips it is judged on: put validation.holdout=0.05 into settings"
        )
    return next(iter(found.values()))


def _open(name: str, arm: TrainConfig) -> Source:
    try:
        return open_source(settled(arm, None))
    except ConfigError as error:
        raise ConfigError(f"arm {name}: {error}") from None


def _check_judged_alike(name: str, arm: TrainConfig, source: Source, first: TrainConfig, reference: Source) -> None:
    """Losses are compared in latents: one VAE, one prediction; and one text encoder reads the common captions."""
    judged: list[tuple[str, Any, Any, str]] = [
        ("VAE", source.vae, reference.vae, "distances in the latents of two VAEs have no common unit"),
        ("text encoder", source.text_encoder, reference.text_encoder, "they cannot read the same embeddings"),
        ("objective", _unit_of_loss(arm), _unit_of_loss(first), "their losses have two units"),
    ]
    for what, found, expected, why in judged:
        if found != expected:
            raise ConfigError(
                f"arm {name} has another {what} than the first arm ({found}, not {expected}): {why}, so that this "
                "comparison cannot judge between them. Compare arms that share it"
            )


def _unit_of_loss(arm: TrainConfig) -> tuple[Any, Any]:
    return arm.objective.prediction, arm.objective.diffusion.min_snr_gamma


def _arm(name: str, config: TrainConfig, source: Source, first: TrainConfig, reference: Source) -> Arm:
    keys, reference_keys = _keys(source), _keys(reference)
    taken = source.order.samples_before(config.train.steps)
    differing = differences(asdict(first), asdict(config))
    changed = [f"{setting} is {ours}, not {theirs}" for setting, theirs, ours in differing if setting != "output"]
    return Arm(
        name,
        config,
        clips=len(keys),
        shared=pc.sum(pc.is_in(keys, reference_keys)).as_py(),
        same_order=keys.equals(reference_keys)
        and source.order.batch_size == reference.order.batch_size
        and config.data.window_shards == first.data.window_shards
        and _counts(source) == _counts(reference),
        passes=sum(taken.values()) / len(keys),
        tokens=sum(count * source.sample_tokens[bucket] for bucket, count in taken.items()),
        changed=changed,
    )


def _keys(source: Source) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for b in source.dataset.buckets for chunk in source.dataset.index(b)[KEY].chunks])


def _counts(source: Source) -> list[list[int]]:
    return [source.dataset.counts_per_shard(bucket) for bucket in source.dataset.buckets]


def _check_tokens(arms: list[Arm]) -> None:
    first = arms[0]
    for arm in arms[1:]:
        if abs(arm.tokens - first.tokens) > TOKENS_TOLERANCE * first.tokens:
            steps = round(arm.config.train.steps * first.tokens / arm.tokens)
            raise ConfigError(
                f"a run of {arm.name} takes {arm.tokens:,} tokens, one of {first.name} {first.tokens:,}, expected as "
                f"many: give {arm.name} the setting train.steps={steps}, or set train.batch_tokens for all arms"
            )


def _ground(config: CompareConfig, first: TrainConfig) -> DataConfig:
    asked = config.common_ground
    own = first.data.text if isinstance(first.data.text, str) else next(iter(first.data.text))
    whole = replace(first.data, strides=(1,), subclip_frames=())
    return replace(whole, shards=asked.shards or whole.shards, text=asked.text or own, filter=asked.filter)


def _clips(held_out: Dataset, samples: int) -> int:
    """How many are looked at. Raises ConfigError where they are of one source, which tells of no other."""
    drawn = draw_clips(held_out, held_out.buckets, samples)
    sources = {held_out.index(bucket)["source"][row].as_py() for bucket, row in drawn}
    if len(sources) < 2:
        raise ConfigError(
            f"common_ground: {len(drawn)} clips of {len(sources)} source, expected two sources or more: "
            "hold out more with validation.holdout, or raise loss.samples"
        )
    return len(drawn)


def _buckets(shards: str) -> list[str]:
    return list(Dataset.open(shards, buckets=()).manifest.buckets)


def _check_ground(held_out: Dataset, ground: DataConfig, reference: Source) -> None:
    (column,) = ground.text_columns()
    found = (held_out.shared(LATENTS, "vae"), held_out.shared(column, "text_encoder"))
    if found != (reference.vae, reference.text_encoder):
        raise ConfigError(
            f"common_ground: {ground.shards}, {column}, was made with another VAE or text encoder than the arms' "
            f"data ({found}, not {(reference.vae, reference.text_encoder)}): choose a dataset and column of theirs"
        )
