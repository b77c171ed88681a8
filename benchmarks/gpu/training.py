"""Training steps of XL/2 in bf16, optimiser included: their speed, what fits, and how long they wait for data."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.plain_step import Clips, TrainingStep, random_batch, random_loss
from benchmarks.rounds import fastest
from benchmarks.table import Row
from models.activations import ActivationMemory
from models.attention_kernels import AttentionKernel, kernel_seconds, preferring
from models.flops import count_flops, peak_flops_per_s
from models.presets import preset
from models.transformer import Transformer, TransformerConfig
from shards.loader import Batch
from stages.training.optimizer import OptimizerConfig

CHUNK_TOKENS = 65_536
GPU_GB = 141
WARM_STEPS = 3
TOY = Clips(4, 32, 32)


@dataclass(frozen=True)
class Case:
    """clips: of a step. memory: what it keeps, see `models.activations`. chunk_tokens: of the MLPs, None for all.

    Reaches, None for none: MFU, seconds a clip, GB.
    """

    clips: Clips
    memory: ActivationMemory = "none"
    chunk_tokens: int | None = None
    rounds: int = 20
    least_mfu: float | None = None
    most_s: float | None = None
    most_gb: float | None = None

    def clips_on(self, machine: Machine) -> Clips:
        return replace(TOY, batch=self.clips.batch) if machine.toy else self.clips


STEPS = (
    Case(Clips(56, 256, 256), least_mfu=0.45, most_s=0.193),
    Case(Clips(56, 256, 256, batch=3), least_mfu=0.45, most_s=0.193),
    Case(Clips(16, 256, 256), most_s=1 / 16),
    Case(Clips(16, 256, 256, batch=8), most_s=1 / 16),
    Case(Clips(128, 512, 512), "block", rounds=6, least_mfu=0.38, most_s=2.2, most_gb=48),
    Case(Clips(128, 720, 1280), "block", rounds=2, most_s=11, most_gb=GPU_GB),
    Case(Clips(128, 512, 512), "selective", rounds=6, least_mfu=0.38, most_s=2.2),
)
FROM_SHARDS = (
    Case(Clips(16, 256, 256, batch=8), most_s=1 / 16),
    Case(Clips(56, 256, 256), least_mfu=0.45, most_s=0.193),
)


def measure_steps(machine: Machine) -> Iterator[Row]:
    for compiled in (True, False):  # what is selected lies within a block, where a compiler would choose itself
        step = make_step(machine, compiled)
        for case in STEPS:
            if compiled is (case.memory != "selective"):
                yield from _case(machine, step, case)
        del step


def measure_limits(machine: Machine) -> Iterator[Row]:
    """What fits, the surest first; nothing is compiled, which would only cost its time here."""
    step = make_step(machine, compiled=False)
    yield from _most_frames(machine, step, Case(Clips(0, 256, 256)), (56, 160, 200, 240, 276), 240)
    yield from _most_frames(machine, step, Case(Clips(0, 512, 512), "pair", CHUNK_TOKENS), (128, 256, 512, 768), 512)
    yield from _case(machine, step, Case(Clips(56, 1088, 1920), "block", rounds=1, most_gb=GPU_GB))
    # Of the host these take up to 120 GB.
    yield from _case(machine, step, Case(Clips(128, 1088, 1920), "offload", CHUNK_TOKENS, rounds=1, most_gb=GPU_GB))
    yield from _most_frames(machine, step, Case(Clips(0, 512, 512), "offload", CHUNK_TOKENS), (768, 896, 1024), 512)


def measure_from_shards(machine: Machine) -> Iterator[Row]:
    """Steps fed as the trainer feeds them, and how long they wait: 16 frames need the most bytes a second."""
    step = make_step(machine)
    for case in FROM_SHARDS:
        clips = case.clips_on(machine)
        with preferring(fastest_kernel(machine, step.model.config, clips)):
            step_s, waited_s = _fed_step_s(machine, step, clips)
        yield from _speed_rows(machine, step, case, f"{case.clips.name}, from shards", step_s)
        share = 100 * waited_s / step_s
        yield Row(f"{case.clips.name}: data stall", share, "%", target="<= 1, moonshot 0.1", holds=share <= 1)


def _fed_step_s(machine: Machine, step: TrainingStep, clips: Clips) -> tuple[float, float]:
    """Seconds of a step from shards, and those of it that it waited for its batch."""
    from benchmarks.rendered import Samples, loader_of
    from shards.loader import DataConfig
    from shards.schema import Bucket

    steps = 4 if machine.toy else 100
    bucket = Bucket(clips.height, clips.width, clips.frames)
    samples = Samples(bucket, 2 if machine.toy else 16, 8 if machine.toy else 128)
    with tempfile.TemporaryDirectory() as folder:
        loader = loader_of(samples.render(Path(folder) / "dataset"), bucket, clips.batch, DataConfig())
        with closing(loader.batches(0, WARM_STEPS + steps)) as batches:
            for _ in range(WARM_STEPS):
                step(next(batches))
            machine.wait()
            started, waited_s = time.perf_counter(), 0.0
            for _ in range(steps):
                asked = time.perf_counter()
                batch = next(batches)
                waited_s += time.perf_counter() - asked
                float(step(batch))  # as the trainer waits for its gradient norm
            return (time.perf_counter() - started) / steps, waited_s / steps


def measure_engine(machine: Machine) -> Iterator[Row]:
    """What DeepSpeed adds, ZeRO-1 on one rank, where the host has much to launch for little work and where it has not;
    the two take turns."""
    from stages.engine import Engine, start_ranks
    from stages.training.config import TrainConfig

    start_ranks()
    plain = make_step(machine)
    engine = Engine(
        make_model(machine),
        OptimizerConfig(),
        precision="bf16",
        accumulation=1,
        deepspeed_settings=TrainConfig().deepspeed,
    )
    network = plain.model.config
    loss = random_loss(network, machine.device)

    def plain_step(batch: Batch) -> None:
        plain(batch)
        machine.wait()

    def engine_step(batch: Batch) -> None:
        engine.backward(loss.training(engine.module, batch, network.tokens(*batch.latent_shape)))
        engine.step(lr_share=1.0, clip_norm=1.0)
        machine.wait()

    for clips in (TOY,) if machine.toy else (Clips(16, 256, 256), Clips(56, 256, 256)):
        batch = random_batch(clips, network)
        arms = {"plain": partial(plain_step, batch), "engine": partial(engine_step, batch)}
        with preferring(fastest_kernel(machine, network, clips)):
            seconds = fastest(arms, 2 if machine.toy else 20)
        yield Row(f"{clips.name}: plain PyTorch", seconds["plain"] * 1e3, "ms")
        share = seconds["engine"] / seconds["plain"]
        yield Row(f"{clips.name}: DeepSpeed, ZeRO-1", seconds["engine"] * 1e3, "ms", "plain", share)


def make_model(machine: Machine, compiled: bool = True) -> Transformer:
    torch.manual_seed(0)
    network = preset("tiny", {"text_dim": 4096}) if machine.toy else preset("XL/2")
    with machine.device:
        model = Transformer(network)
    if compiled and not machine.toy:
        model.compile_blocks(any_size=False)
    return model


def make_step(machine: Machine, compiled: bool = True) -> TrainingStep:
    return TrainingStep(make_model(machine, compiled), torch.bfloat16)


def _case(machine: Machine, step: TrainingStep, case: Case) -> Iterator[Row]:
    clips = case.clips_on(machine)
    name = f"{case.clips.name}, {case.memory}"
    batch = random_batch(clips, step.model.config)
    _set_memory(machine, step, case)
    try:
        kernel = fastest_kernel(machine, step.model.config, clips)
        with preferring(kernel):
            step(batch)  # compiles, which has a peak of its own
            machine.forget_peak()
            step_s = machine.seconds(lambda: step(batch), case.rounds)
    except RuntimeError as error:  # of the GPU's memory, or of the host's
        print(f"{name}: {str(error).splitlines()[0]}")
        yield Row(f"{name}: does not fit", 0, "", target="fits", holds=False)
        return
    yield from _speed_rows(machine, step, case, f"{name}, {kernel}", step_s)
    yield _with_target(Row(f"{name}: peak memory", machine.peak_gb(), "GB"), most=case.most_gb)


def _speed_rows(machine: Machine, step: TrainingStep, case: Case, name: str, step_s: float) -> Iterator[Row]:
    clips, network = case.clips_on(machine), step.model.config
    flops = count_flops(network, clips.batch, *clips.latent_shape, clips.batch * clips.text_tokens).training
    mfu = flops / step_s / (peak_flops_per_s(machine.device) or 989.5e12)
    yield _with_target(Row(f"{name}: seconds a clip", step_s / clips.batch, "s"), most=case.most_s)
    yield _with_target(Row(f"{name}: model FLOPs utilisation", mfu, ""), least=case.least_mfu)


def fastest_kernel(machine: Machine, network: TransformerConfig, clips: Clips) -> AttentionKernel:
    """As the trainer finds it."""
    shape = clips.batch, clips.frames, network.tokens(*clips.latent_shape) // clips.frames
    seconds = kernel_seconds(network, shape, machine.device, torch.bfloat16)
    return min(seconds, key=lambda kernel: seconds[kernel])


def _set_memory(machine: Machine, step: TrainingStep, case: Case) -> None:
    step.model.activation_memory = case.memory
    step.model.chunk_mlp(case.chunk_tokens)
    machine.forget_peak()


def _most_frames(
    machine: Machine, step: TrainingStep, case: Case, counts: tuple[int, ...], target: int
) -> Iterator[Row]:
    """Of these counts, from the least on, each written as it is found to fit: what more of them does cannot undo it."""
    name, most = f"frames at {case.clips.height}², {case.memory}", 0
    for frames in counts:
        if not _fits(machine, step, replace(case.clips, frames=frames), case):
            break
        most = frames
        yield Row(f"{name}: fit", frames, "frames")
    yield Row(f"{name}: the most", most, "frames", target=f">= {target}", holds=most >= target)


def _fits(machine: Machine, step: TrainingStep, clips: Clips, case: Case) -> bool:
    clips = TOY if machine.toy else clips
    _set_memory(machine, step, case)
    try:
        step(random_batch(clips, step.model.config))
        machine.wait()
    except RuntimeError as error:  # of the GPU's memory, or of the host's
        print(f"{clips.name}, {case.memory}: {str(error).splitlines()[0]}")
        return False
    return True


def _with_target(row: Row, least: float | None = None, most: float | None = None) -> Row:
    if least is not None:
        return replace(row, target=f">= {least:.3g}", holds=row.value >= least)
    if most is not None:
        return replace(row, target=f"<= {most:.3g}", holds=row.value <= most)
    return row
