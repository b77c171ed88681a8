"""The transformer's arithmetic and speed, against diffusers' Latte and PixArt on the same weights.

python -m benchmarks.model [ROUNDS]     prints a table, writes outputs/benchmarks/model.json

Counts are of XL/2 on 16 frames of 256 px and take no memory: nothing is computed. Times are of one step forward and
backward at width 384 and 2 layers, in fp32 on one thread, the arms in turns: the least CPU time of ROUNDS (7), which on
a quiet machine is the time itself. Outputs are held against each other first. 4 minutes.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.table import Row, report
from models.flops import count_flops
from models.presets import preset
from models.text_lengths import USUAL_TOKENS
from models.transformer import Transformer, TransformerConfig
from tests.models.networks import assert_close, image_model, inputs, latte, random_transformer

FULL_SIZE = replace(preset("XL/2"), out_channels=8)
SMALL_SIZE = TransformerConfig(out_channels=8, num_layers=2, num_heads=6, head_dim=64)

FLOPS = {120: 0.97, 300: 0.93}  # text tokens -> target
TIMES = {(16, 120): 1.10, (16, 300): 1.30, (56, 120): 1.40}  # frames, text tokens -> target


Arms = Mapping[str, Callable[[], Tensor]]


class Skipped(nn.Module):
    """In the place of a temporal block, for the half of the network that PixArt has too."""

    def forward(self, x: Tensor, *_: Tensor, **__: Tensor) -> Tensor:
        return x


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.set_num_threads(1)
    rows = [*flops(), *times(rounds)]
    report("model", rows, ("torch", "diffusers"))


def flops() -> Iterator[Row]:
    """A training step's, on padded text, which diffusers' Latte always has, and ours on what a caption needs."""
    ours = {tokens: counted(FULL_SIZE, tokens) for tokens in FLOPS}
    needed = count_flops(FULL_SIZE, 1, 16, 32, 32, USUAL_TOKENS).training
    for tokens, target in FLOPS.items():
        theirs = counted(FULL_SIZE, tokens, reference=True)
        against, share = f"Latte's, text {tokens}", ours[tokens] / theirs
        name = f"FLOPs of a training step, text {tokens}"
        yield Row(name, ours[tokens] / 1e12, "TFLOP", against, share, f"<= {target}", share <= target)
        name = f"FLOPs of a training step, {USUAL_TOKENS} true tokens"
        yield Row(name, needed / 1e12, "TFLOP", against, needed / theirs)


def counted(config: TransformerConfig, text_tokens: int, *, reference: bool = False) -> int:
    """By PyTorch's counter, 16 frames of 256 px."""
    with torch.device("meta"):
        model: nn.Module = latte(config, 16) if reference else Transformer(config)
        latents, timestep = torch.empty(1, 4, 16, 32, 32), torch.empty(1)
        text = torch.empty(1, text_tokens, config.text_dim)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output(model, latents, timestep, text).sum().backward()
    return counter.get_total_flops()


def times(rounds: int) -> Iterator[Row]:
    for (frames, tokens), target in TIMES.items():
        seconds = least_s(videos(frames, tokens), rounds)
        yield faster(f"a step, {frames} frames of 256 px, text {tokens}", "Latte's", target, seconds)
    yield faster("a step, 4 images, without temporal blocks", "PixArt's", 1.0, least_s(images(), rounds))


def videos(frames: int, text_tokens: int) -> Arms:
    model, reference = random_transformer(SMALL_SIZE), latte(SMALL_SIZE, frames)
    reference.load_state_dict(model.state_dict())
    latents, timestep, text, _ = inputs(SMALL_SIZE, (frames, 32, 32), (text_tokens,))
    return {
        "ours": lambda: output(model, latents, timestep, text),
        "theirs": lambda: output(reference, latents, timestep, text),
    }


def images() -> Arms:
    model, reference = image_model(replace(SMALL_SIZE, temporal_init="zero"))
    model.temporal_transformer_blocks = nn.ModuleList(Skipped() for _ in range(SMALL_SIZE.num_layers))
    latents, timestep, text, mask = inputs(SMALL_SIZE, (1, 32, 32), (120, 60, 30, 15))
    told = {"timestep": timestep, "encoder_attention_mask": mask, "return_dict": False}
    return {
        "ours": lambda: model(latents, timestep, text, mask)[:, :, 0],
        "theirs": lambda: reference(latents[:, :, 0], text, **told)[0],
    }


def output(model: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """Of text that is not padded."""
    if isinstance(model, LatteTransformer3DModel):
        return model(latents, timestep, text, return_dict=False)[0]
    return model(latents, timestep, text)


def least_s(arms: Arms, rounds: int) -> dict[str, float]:
    """CPU seconds of the fastest step of each arm; they take turns, and give the same."""
    found = {name: forward().detach() for name, forward in arms.items()}
    assert_close(found["ours"], found["theirs"])
    least = dict.fromkeys(arms, float("inf"))
    for _ in range(rounds):
        for name, forward in arms.items():
            started = time.process_time()
            forward().sum().backward()
            least[name] = min(least[name], time.process_time() - started)
    return least


def faster(name: str, whose: str, target: float, seconds: Mapping[str, float]) -> Row:
    ratio = seconds["theirs"] / seconds["ours"]
    return Row(name, seconds["ours"], "s", f"{whose} ÷ ours", ratio, f">= {target:.2f}", ratio >= target)


if __name__ == "__main__":
    main()
