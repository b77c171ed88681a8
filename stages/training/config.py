"""The settings of a run, and what follows from them."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from models.activations import ActivationMemory
from models.attention_kernels import AttentionKernel
from models.objective import ObjectiveConfig
from models.presets import preset
from models.transformer import TransformerConfig
from shards.loader import DataConfig
from stages.engine import check_settings
from stages.errors import ConfigError, at_least
from stages.training.checkpoint import settings_of
from stages.training.given_frames import ConditioningConfig
from stages.training.held_out import ValidationConfig
from stages.training.memory import zero_of
from stages.training.optimizer import OptimizerConfig
from stages.training.start import model_settings, objective_settings


@dataclass(frozen=True)
class StepConfig:
    """The ``train`` section.

    A step takes samples of one bucket. How many, of all ranks together, is either ``batch_size``, the same for every
    bucket, or follows from ``batch_tokens``: each bucket's batch is then the largest multiple of ``batch_multiple``
    samples that has at most so many tokens (of whole clips, see data.subclip_frames), and at least that many samples.
    Neither depends on the number of ranks, so that a run may go on with another number; ranks x gradient_accumulation
    must divide the batches. ``batch_size`` auto is settled when a run begins, as the ``batch_tokens`` that fit (see
    `stages.training.batches`), and stays what it was when the run goes on.

    sequence_parallel: so many ranks, which must divide their number, share each video (see
    `models.sequence_parallel`): for videos that are too long or too large for one, or to be sooner done with each. They
    count as one rank where batches are divided.
    activation_memory: what is kept for the backward pass, see `models.activations`; mlp_chunk_tokens: the MLPs take so
    many tokens at a time, which lowers what a pair of blocks needs while it goes backward. Neither changes a result.
    attention: the kernel for it, wherever it can. On GPUs auto is settled when a run begins, as the one measured to be
    the fastest (see `models.attention_kernels`), and stays when the run goes on; elsewhere it is PyTorch's choice.
    compile: torch.compile for the transformer's blocks, one by one (see `models.transformer`). It changes time and, by
    what the compiler computes again, memory.
    max_hours: save and leave when the command has run this long; the same command goes on.
    milestone_every: of these checkpoints, multiples of save_every, the weights are kept for ever.
    max_skipped: the run fails when so many steps in a row had a loss or gradient that is not finite.
    """

    steps: int = 1000
    max_hours: float | None = None
    max_skipped: int = 10
    batch_size: int | Literal["auto"] | None = None
    batch_tokens: int | None = None
    batch_multiple: int = 8
    gradient_accumulation: int = 1
    sequence_parallel: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_memory: ActivationMemory = "none"
    mlp_chunk_tokens: int | None = None
    attention: AttentionKernel | Literal["auto"] = "auto"
    compile: bool = False
    caption_dropout: float = 0.1
    init_from: str | None = None
    save_every: int = 1000
    keep_last: int = 2
    milestone_every: int | None = None
    log_every: int = 10
    log_sample_ids: bool = False

    def __post_init__(self) -> None:
        counts = ("batch_size", "batch_tokens", "batch_multiple", "gradient_accumulation", "sequence_parallel")
        at_least(self, 1, *counts, "mlp_chunk_tokens", "steps", "save_every", "keep_last", "log_every", "max_skipped")
        at_least(self, 1, "milestone_every")
        at_least(self, 0, "max_hours")
        if self.milestone_every and self.milestone_every % self.save_every:
            raise ValueError(f"milestone_every: found {self.milestone_every}, expected a multiple of {self.save_every}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout: found {self.caption_dropout}, expected 0 to 1")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run is made from.

    model: ``preset`` (see `models.presets`) and the fields of TransformerConfig that differ from it.
    deepspeed: any DeepSpeed setting that does not follow from the others, such as ``zero_optimization``.
    """

    output: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=lambda: {"preset": "XL/2"})
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: StepConfig = field(default_factory=StepConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: dict[str, Any] = field(default_factory=lambda: {"zero_optimization": zero_of({})})


def settled(config: TrainConfig, resumed: Path | None) -> TrainConfig:
    """The config with what follows from the weights that the run starts from, or from where it goes on."""
    init_from = config.train.init_from
    return replace(
        config,
        model=model_settings(config.model, init_from, resumed),
        objective=objective_settings(config.objective, init_from, resumed),
        train=_settled_as(resumed, config.train) if resumed else config.train,
    )


def _settled_as(resumed: Path, given: StepConfig) -> StepConfig:
    """What is left to ``auto`` is what it was."""
    before = settings_of(resumed)["train"]
    if given.batch_size == "auto":
        given = replace(given, **{name: before[name] for name in ("batch_size", "batch_tokens", "batch_multiple")})
    return replace(given, attention=before.get("attention", "auto")) if given.attention == "auto" else given


def check(config: TrainConfig, world: int) -> None:
    """Raises ConfigError for settings that no run can have on this many ranks."""
    transformer_config(config)
    check_settings(config.deepspeed)
    settings = config.train
    if settings.compile:
        _check_compiled(config)
    if (settings.batch_size is None) == (settings.batch_tokens is None):
        raise ConfigError(
            f"found train.batch_size {settings.batch_size} and train.batch_tokens {settings.batch_tokens}, "
            "expected one of them: set the other to null"
        )
    if world % settings.sequence_parallel:
        raise ConfigError(
            f"train.sequence_parallel: found {settings.sequence_parallel}, expected a divisor of the {world} ranks"
        )
    readers = world // settings.sequence_parallel
    share = readers * settings.gradient_accumulation
    name = "batch_size" if settings.batch_size else "batch_multiple"
    size = getattr(settings, name)
    if size != "auto" and size % share:
        raise ConfigError(
            f"train.{name}: found {size}, expected a multiple of {share} "
            f"({world} ranks / train.sequence_parallel {settings.sequence_parallel} "
            f"x train.gradient_accumulation {settings.gradient_accumulation})"
        )


def _check_compiled(config: TrainConfig) -> None:
    settings = config.train
    if zero_of(config.deepspeed)["stage"] == 3:
        raise ConfigError(
            "train.compile: found true, expected false with deepspeed.zero_optimization.stage 3: it fetches weights "
            "within the blocks, which a compiled block has no place for; take stage 1 or 2"
        )
    if settings.activation_memory == "selective" or settings.mlp_chunk_tokens:
        raise ConfigError(
            f"train.compile: found true with train.activation_memory={settings.activation_memory} and "
            f"train.mlp_chunk_tokens={settings.mlp_chunk_tokens or 'null'}, expected another than selective and null: "
            "what they choose lies within a block, where the compiler chooses itself"
        )


def transformer_config(config: TrainConfig, **data: int) -> TransformerConfig:
    """The network that the ``model`` section names, with the sizes that the data set."""
    settings = dict(config.model)
    try:
        transformer = preset(settings.pop("preset", "XL/2"), settings | data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from None
    if config.train.sequence_parallel > 1 and transformer.temporal_attention == "full":
        raise ConfigError(
            f"train.sequence_parallel: found {config.train.sequence_parallel}, expected 1 with "
            "model.temporal_attention=full: it needs all places of all frames at once"
        )
    return transformer
