"""DeepSpeed ZeRO behind a small interface; the only file that imports deepspeed."""

import atexit
import difflib
import functools
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from pydantic import ValidationError

from stages.errors import ConfigError
from stages.training.memory import zero_of
from stages.training.optimizer import EmaAdamW, OptimizerConfig, parameter_groups

# What a training state is made of, each a full fp32 tensor by parameter name, whatever the number of ranks.
WEIGHTS = "weights"
OPTIMIZER_STATES = ("ema", "exp_avg", "exp_avg_sq")

# DeepSpeed makes buckets of gradients at each step anew, in full: of its default, 500 million, 1 GB of bf16 each.
BUCKET_NUMBERS = 50_000_000

# Derived from the training settings in one place, below.
DERIVED_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "fp16", "data_types", "optimizer", "scheduler", "activation_checkpointing",
)  # fmt: skip
# What the ``deepspeed`` section may hold: DeepSpeed itself ignores a key that it does not know.
KNOWN_KEYS = (
    "zero_optimization", "comms_logger", "communication_data_type", "flops_profiler", "gradient_predivide_factor",
    "memory_breakdown", "prescale_gradients", "steps_per_print", "wall_clock_breakdown",
)  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the run, and its device."""

    rank: int
    world: int
    device: torch.device
    node_rank: int = 0  # of this process among those of its node

    @property
    def main(self) -> bool:
        return self.rank == 0

    def print(self, text: object) -> None:
        """Print once a run."""
        if self.main:
            print(text, flush=True)


def start_ranks() -> Ranks:
    """Join the ranks that the launcher started, over NCCL on GPUs and gloo on CPUs; alone without a launcher."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # any free one: nobody else has to find it
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # the ranks of a machine share its cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", 1))))
    if not dist.is_initialized():
        # Without this DeepSpeed compiles a shared-memory reduction for CPUs at its first start; gloo does the work.
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
        if device.type == "cpu":
            # A gloo thread that lets go of the last tensors asks for Python, and would be ended, and the process with
            # it, were Python ending. NCCL has no such thread, and may wait for a rank that has failed.
            atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, int(os.environ["LOCAL_RANK"]))


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of ``values`` over the ranks, on every rank."""
    dist.all_reduce(values)
    return values / dist.get_world_size()


def largest_over_ranks(values: Sequence[int]) -> list[int]:
    """The largest of each value over the ranks, on every rank; from host to host, without waiting for the devices."""
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_host_group())
    return tensor.tolist()


def sum_on_hosts(tensor: torch.Tensor) -> None:
    """Make of a tensor on the CPU the sum over the ranks, on every rank, without waiting for the devices."""
    dist.all_reduce(tensor, group=_host_group())


@functools.cache
def _host_group() -> dist.ProcessGroup | None:
    """All ranks, over gloo; None: as the default group is."""
    if dist.get_backend() == "gloo":
        return None
    group = dist.new_group(backend="gloo")
    atexit.register(dist.destroy_process_group, group)
    return group


def stacked_on_main(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor of each rank, [world, ...], on rank 0 alone; all have one shape."""
    tensor = tensor.contiguous()
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(tensor, tensors)
    return torch.stack(tensors) if tensors else None


def sequence_group(ranks_a_video: int) -> dist.ProcessGroup | None:
    """The neighbouring ranks, so many with this one, that share a video; None where each rank has its own."""
    return dist.new_subgroups(ranks_a_video)[0] if ranks_a_video > 1 else None


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all(value: Any) -> list[Any]:
    """The value of each rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    dist.barrier()


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raises ConfigError, on every rank, unless all ranks see the folder that rank 0 writes to."""
    probe = folder / ".probe"
    if ranks.main:
        probe.touch()
    barrier()
    seen = mean_over_ranks(torch.tensor(float(probe.exists()), device=ranks.device))
    if ranks.main:
        probe.unlink()
    if seen < 1:
        raise ConfigError(f"{folder} is not seen by all {ranks.world} ranks: give output= on a shared file system")


class Engine:
    """A model under ZeRO: ``backward`` for each micro-batch of a step, then ``step``.

    ``trained`` and ``frozen`` count its parameters' numbers.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: OptimizerConfig,
        *,
        precision: str,
        accumulation: int,
        deepspeed_settings: Mapping[str, Any],
    ):
        config = _deepspeed_config(optimizer, precision, accumulation, deepspeed_settings)
        groups = parameter_groups(model, optimizer)
        parameters = [parameter for group in groups for parameter in group["params"]]
        frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.trained, self.frozen = (sum(part.numel() for part in parts) for parts in (parameters, frozen.values()))
        # DeepSpeed keeps no fp32 copy of these, and casts or partitions the model's own.
        self._frozen = {name: part.detach().clone() for name, part in frozen.items() if dist.get_rank() == 0}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=EmaAdamW(groups, optimizer), model_parameters=parameters, config=config
        )
        self._init_optimizer_state()

    def _init_optimizer_state(self) -> None:
        zero = self.optimizer
        stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
        partitions = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
        self._inner: EmaAdamW = zero.optimizer
        self._norm: float | None = None
        self._inner.register_step_pre_hook(self._read_norm)
        self._inner.init_state(partitions)
        if not stage3:  # ZeRO-1 and -2 map parameters to state at the first step; a resume needs it before
            zero._lazy_init_hp_params_optimizer_state()
            zero._hp_optimizer_states_linked = True

    @property
    def module(self) -> torch.nn.Module:
        """The model, to be called for the forward pass."""
        return self.engine

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Add the gradient of a micro-batch; returns the mean loss over the ranks, still on the device.

        A mean that is not finite makes the whole gradient NaN, on every rank, so that `step` skips the step.
        """
        mean = mean_over_ranks(loss.detach().clone())
        self.engine.backward(loss * (1 + (mean - mean)))  # times 1, or NaN, without waiting for the device
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch; moves no weights
        return mean

    def step(self, lr_share: float, clip_norm: float) -> float | None:
        """Move the weights after the step's last ``backward``; returns the gradient norm before clipping.

        Where that norm is not finite nothing moves, and the result is None. Each rate is ``lr_share`` of its peak;
        ``clip_norm`` may be infinite.
        """
        for group in self._inner.param_groups:
            group["lr"] = lr_share * group["peak_lr"]
        self.optimizer.clip_grad = clip_norm if math.isfinite(clip_norm) else 0.0  # DeepSpeed reads it at each step
        self._norm = None
        self.engine.step()
        if not self.engine.was_step_applied():
            return None
        norm = self._norm
        assert norm is not None and math.isfinite(norm), "DeepSpeed has moved the weights by an infinite gradient"
        return norm

    def _read_norm(self, *_: Any) -> None:
        """Where DeepSpeed itself has just waited for it; later, Adam's work would be waited for too."""
        if self._norm is None:  # ZeRO takes a step by group of parameters
            self._norm = float(self.optimizer._global_grad_norm)

    def gather(self, kind: str) -> dict[str, torch.Tensor]:
        """Name -> full fp32 CPU tensor, on rank 0 alone, of ``WEIGHTS`` or one of ``OPTIMIZER_STATES``.

        Frozen parameters have an average, which is their value, but no moments. All ranks must call.
        """
        tensors = dict(self._frozen) if kind in (WEIGHTS, "ema") else {}
        for name, parameter in self._trained_parameters():
            if kind == WEIGHTS:
                full = safe_get_full_fp32_param(parameter)
            else:
                full = safe_get_full_optimizer_state(parameter, kind)
            if dist.get_rank() == 0:
                tensors[name] = full.detach().to("cpu", torch.float32)
        return tensors

    def scatter(self, kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put full tensors, as ``gather`` gave them, into the partition that each rank owns.

        The model that the engine was made from must have had the same weights.
        """
        for name, parameter in self._trained_parameters():
            full = tensors[name].to(parameter.device)
            if hasattr(parameter, "ds_id"):
                _scatter_stage3(kind, parameter, full)
            elif kind == WEIGHTS:
                safe_set_full_fp32_param(parameter, full)
            else:
                safe_set_full_optimizer_state(parameter, full, kind)

    @property
    def trained_names(self) -> set[str]:
        return {name for name, _ in self._trained_parameters()}

    def _trained_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [named for named in self.engine.module.named_parameters() if named[1].requires_grad]

    def set_step(self, step: int) -> None:
        """How often the weights have moved, which Adam's bias correction and the EMA's warm-up count from."""
        for state in self._inner.state.values():
            state["step"].fill_(step)


def _scatter_stage3(kind: str, parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
    """DeepSpeed's own setter of full ZeRO-3 tensors fails where the ranks' parts need padding."""
    part = safe_get_local_fp32_param(parameter)
    flat = full.new_zeros(part.numel() * dist.get_world_size())
    flat[: full.numel()] = full.flatten()
    mine = flat.view(-1, part.numel())[dist.get_rank()]
    if kind == WEIGHTS:
        safe_set_local_fp32_param(parameter, mine)
    else:
        safe_set_local_optimizer_state(parameter, mine, kind)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a ``deepspeed`` section that DeepSpeed would refuse, or not understand and ignore."""
    for key in settings:
        if key in DERIVED_KEYS:
            raise ConfigError(f"deepspeed.{key} is derived from the train.* settings: remove it")
        if key not in KNOWN_KEYS:
            nearest = difflib.get_close_matches(key, KNOWN_KEYS, 1) or [", ".join(KNOWN_KEYS)]
            raise ConfigError(f"unknown key 'deepspeed.{key}', did you mean {nearest[0]}?")
    zero = zero_of(settings)
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"deepspeed.zero_optimization: found {zero!r}, expected keys with stage: 1, 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            raise ConfigError(f"deepspeed.zero_optimization.{part}.device: found nvme, expected cpu or none")
    if zero.get("compute_grad_norm") is False:
        raise ConfigError("deepspeed.zero_optimization.compute_grad_norm: the guard against NaN needs it, remove it")
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"deepspeed.zero_optimization.{name}: {first['msg']}") from None


def _deepspeed_config(
    optimizer: OptimizerConfig, precision: str, accumulation: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # it differs by bucket, and DeepSpeed only counts with it
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip_norm,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        **settings,
        "zero_optimization": {"reduce_bucket_size": BUCKET_NUMBERS, **zero_of(settings)},
    }
