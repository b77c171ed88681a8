"""The rates of single kernels, beside those that the arithmetic of docs/performance.md assumed."""

from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.machine import Machine
from benchmarks.table import Row
from models.layers import modulated
from stages.training.optimizer import EmaAdamW, OptimizerConfig

WIDTH, HEADS, HEAD_DIM, PARAMETERS = 1152, 16, 72, 1_057_500_000
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
ATTENTIONS = {  # groups of independent sequences, of so many tokens
    "spatial 256²": (56, 256),
    "spatial 512²": (128, 1024),
    "spatial 720p": (56, 3600),
    "temporal 16 frames": (256, 16),
    "temporal 56 frames": (256, 56),
    "temporal 128 frames": (1024, 128),
}
ASSUMED = {"product": 650e12, "attention": 300e12, "passes": 4.0e12, "optimizer": 10e-3}


def measure(machine: Machine) -> Iterator[Row]:
    yield from _products(machine)
    yield from _attentions(machine)
    yield _fused_norm(machine)
    yield _optimizer(machine)


def _products(machine: Machine) -> Iterator[Row]:
    for tokens in (64,) if machine.toy else (14_336, 131_072):
        for inner, outer in ((WIDTH, WIDTH), (WIDTH, 3 * WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)):
            left, right = machine.randn(tokens, inner), machine.randn(inner, outer)
            rate = 2 * tokens * inner * outer / machine.seconds(lambda a=left, b=right: a @ b)  # type: ignore[misc]
            yield _against(f"product {tokens} x {inner} x {outer}", rate / 1e12, "TFLOP/s", ASSUMED["product"] / 1e12)


def _attentions(machine: Machine) -> Iterator[Row]:
    """Forward and backward as the model calls it; the useful work is that of 72 channels a head, three times."""
    for name, (groups, tokens) in ATTENTIONS.items():
        groups, tokens = (2, 8) if machine.toy else (groups, tokens)
        for channels in (HEAD_DIM, 80, 96, 128):
            for backend in BACKENDS:
                try:
                    with sdpa_kernel([backend]):
                        seconds = machine.seconds(_attention(machine, name, groups, tokens, channels))
                except RuntimeError as error:
                    print(f"{name}, {channels} channels: {backend.name} does not run: {str(error).splitlines()[0]}")
                    continue
                rate = 3 * 4 * groups * HEADS * tokens**2 * HEAD_DIM / seconds
                what = f"{name}, {channels} channels, {backend.name.lower()}"
                yield _against(what, rate / 1e12, "TFLOP/s", ASSUMED["attention"] / 1e12)


def _attention(machine: Machine, name: str, groups: int, tokens: int, channels: int):  # type: ignore[no-untyped-def]
    if name.startswith("spatial"):
        made = [machine.randn(groups, tokens, HEADS, channels) for _ in range(3)]
    else:  # the groups lie beside the heads
        made = [machine.randn(1, tokens, groups * HEADS, channels) for _ in range(3)]
    query, key, value = (tensor.requires_grad_() for tensor in made)
    gradient = torch.ones_like(query)

    def work() -> None:
        out = scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        torch.autograd.grad(out.transpose(1, 2), (query, key, value), gradient)

    return work


def _fused_norm(machine: Machine) -> Row:
    frames, places = (2, 8) if machine.toy else (56, 1024)
    x, vectors = machine.randn(1, frames, places, WIDTH), machine.randn(2, 1, 1, 1, WIDTH)
    fused = torch.compile(modulated, backend=machine.compiler)
    seconds = machine.seconds(lambda: fused(x, vectors[0], vectors[1]))
    return _against("norm and modulation, compiled", 2 * x.nbytes / seconds / 1e12, "TB/s", ASSUMED["passes"] / 1e12)


def _optimizer(machine: Machine) -> Row:
    weights = torch.nn.Parameter(torch.zeros(10_000 if machine.toy else PARAMETERS, device=machine.device))
    optimizer = EmaAdamW([weights], OptimizerConfig())
    optimizer.init_state([weights])
    weights.grad = torch.ones_like(weights)
    return _against("EmaAdamW of XL/2", machine.seconds(optimizer.step) * 1e3, "ms", ASSUMED["optimizer"] * 1e3)


def _against(name: str, value: float, unit: str, assumed: float) -> Row:
    return Row(name, value, unit, f"the {assumed:g} assumed", value / assumed)
