"""Sampling with a step cache: how many steps it saves, how much time, and how much it changes the latents.

python -m benchmarks.step_cache [key=value ...]     prints a table, writes outputs/benchmarks/step_cache.json

Settings are those of the sample command, by default of configs/sample/latest.yaml: README's eight prompts, on the
demo's run. How slowly outputs change from step to step is learnt: random weights would tell nothing. Text included, VAE
not. Some minutes on 2 cores.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks.rounds import fastest
from benchmarks.table import Row, report
from models.errors import WeightsError
from models.weights import find_checkpoint
from pipelines.config import load_config
from stages.sampling.config import SampleConfig
from stages.sampling.generate import generate
from stages.sampling.models import Models
from stages.sampling.prompts import read_prompts

CONFIG = "configs/sample/latest.yaml"
THRESHOLDS = (0.05, 0.1, 0.2)
ROUNDS = 3


def main() -> None:
    config = load_config(SampleConfig, CONFIG, sys.argv[1:])
    try:
        checkpoint = find_checkpoint(config.ckpt)
    except WeightsError as error:
        sys.exit(f"error: {error}: run `make demo` first, or give ckpt=")
    report("step_cache", list(rows(config, checkpoint)), ("torch",))


def rows(config: SampleConfig, checkpoint: Path) -> Iterator[Row]:
    prompts, models = read_prompts(config.text_prompt), Models.on_this_machine().kept()
    model = models.transformer(checkpoint, weights=config.weights)
    runs: list[int] = []
    model.transformer_blocks[-1].register_forward_hook(lambda _, inputs, output: runs.append(1))

    def latents(threshold: float | None) -> Tensor:
        runs.clear()
        return generate(replace(config, step_cache=threshold), prompts, checkpoint, models).latents

    exact, steps = latents(None), len(runs)
    caches = {f"step_cache={threshold:g}": partial(latents, threshold) for threshold in THRESHOLDS}
    seconds = fastest({"without": partial(latents, None), **caches}, ROUNDS)
    yield Row(f"{len(prompts)} samples, {len(model.transformer_blocks)} pairs of blocks", seconds["without"], "s")
    for name, sample in caches.items():
        found = sample()
        yield Row(f"{name}: steps at which all pairs ran", len(runs), "steps", "all", len(runs) / steps)
        change = float((found - exact).norm() / exact.norm())
        yield Row(f"{name}: change of the latents, root mean square", change, "relative")
        speed = seconds["without"] / seconds[name]
        yield Row(f"{name}: time", seconds[name], "s", "the speed without", speed)


if __name__ == "__main__":
    main()
