"""Guided sampling: its speed against diffusers' LattePipeline, and how exact it is.

python -m benchmarks.sampling [LAYERS]      prints a table, writes outputs/benchmarks/sampling.json

Both make the same latents with the same random weights of width 384 in LAYERS (2) layers, on CPU cores in fp32, DDIM,
two steps, 256 x 256 pixels, prompts and negative prompts of 120 tokens, embedded beforehand. 10 minutes on 2 cores.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.exactness import difference, within
from benchmarks.table import Row, report
from models.objective import ObjectiveConfig
from models.transformer import Transformer, TransformerConfig
from models.weights import CheckpointInfo
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Request, denoise
from tests.models.networks import random_transformer
from tests.stages.sampling.pipelines import VIDEOS, frames_of_pixart, latte_pipeline, videos_of_latte

STEPS, GUIDANCE, TOKENS, SIDE = 2, 7.5, 120, 32
NETWORK = TransformerConfig(out_channels=8, num_heads=6, head_dim=64)


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    rows = [*exactness(), *batches()]
    for frames, prompts, target, rounds in ((16, 1, 1.2, 6), (56, 8, 1.4, 2)):
        rows.append(speed(layers, frames, prompts, target, rounds))
    report("sampling", rows, ("torch", "diffusers"))


def exactness() -> Iterator[Row]:
    """The largest difference to diffusers' pipelines over the latents' scale."""
    for prediction, name in VIDEOS:
        yield within(
            f"{name}, {prediction}: against LattePipeline", difference(*videos_of_latte(prediction, name)), 1e-4
        )
    for frame_sampler in ("ddim", "dpm++"):
        found, expected = frames_of_pixart(frame_sampler)
        yield within(f"{frame_sampler}, a frame: against PixArtAlphaPipeline", difference(found, expected), 1e-4)


def batches() -> Iterator[Row]:
    """A sample alone, and among seven others."""
    config = TransformerConfig(num_layers=2, num_heads=2, head_dim=12, text_dim=20, sample_size=16)
    model, shape = random_transformer(config), (4, 8, 16, 16)
    info = CheckpointInfo(0, config, ObjectiveConfig("velocity"), {"spatial_factor": 8}, {}, 1 / 8)
    requests = [Request(text(seed, 2 * seed + 1, 20), text(9, 1, 20), seed) for seed in range(8)]
    settings = DenoiseConfig(steps=10)
    together = denoise(model, info, requests, shape, settings)[:1]
    for name, repeated, target in (("filled up to 8", 8, 0.0), ("in a batch of 1", 1, 1e-3)):
        alone = denoise(model, info, requests[:1] * repeated, shape, settings)[:1]
        largest = float((alone - together).abs().max())
        yield Row(f"a sample {name}, and among 8", largest, "latents", target=f"<= {target:g}", holds=largest <= target)


def speed(layers: int, frames: int, prompts: int, target: float, rounds: int) -> Row:
    """Seconds of ours, and LattePipeline's over them; interleaved, the least of the rounds."""
    model = random_transformer(replace(NETWORK, num_layers=layers))
    texts = [text(seed, TOKENS, NETWORK.text_dim) for seed in range(prompts + 1)]
    arms = {"ours": _ours(model, frames, texts), "theirs": _theirs(model, frames, texts)}
    spans: dict[str, list[float]] = {name: [] for name in arms}
    results = {}
    for _ in range(rounds):
        for name, sample in arms.items():
            start = time.perf_counter()
            results[name] = sample()
            spans[name].append(time.perf_counter() - start)
    if prompts == 1:
        assert difference(results["ours"], results["theirs"]) <= 1e-4
    ours, theirs = (min(spans[name]) for name in arms)
    name = f"{frames} frames of 256 x 256, {prompts} prompt{'s' if prompts > 1 else ''}, {layers} layers"
    ratio = theirs / ours
    return Row(name, ours, "s", "LattePipeline's speed", ratio, f">= {target}", ratio >= target)


def text(seed: int, tokens: int, width: int) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def _ours(model: Transformer, frames: int, texts: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    info = CheckpointInfo(0, model.config, ObjectiveConfig("epsilon"), {"spatial_factor": 8}, {}, 1 / 8)
    requests = [Request(each, texts[-1], seed) for seed, each in enumerate(texts[:-1])]
    config = DenoiseConfig(steps=STEPS, guidance_scale=GUIDANCE)
    return lambda: denoise(model, info, requests, (4, frames, SIDE, SIDE), config)


def _theirs(model: Transformer, frames: int, texts: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    pipeline, prompts = latte_pipeline(model, "ddim", frames), len(texts) - 1
    return lambda: pipeline(
        negative_prompt=None, prompt_embeds=torch.stack(texts[:-1]),
        negative_prompt_embeds=texts[-1].expand(prompts, -1, -1), num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        video_length=frames, height=8 * SIDE, width=8 * SIDE, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in range(prompts)],
    ).frames  # fmt: skip


if __name__ == "__main__":
    main()
