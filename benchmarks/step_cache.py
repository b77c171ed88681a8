"""Sampling with a step cache: how many steps it saves, how much time, and how much it changes the latents.

python -m benchmarks.step_cache [key=value ...]     prints a table, writes outputs/benchmarks/step_cache.json

Settings are those of the sample command, by default of configs/sample/latest.yaml: README's eight prompts, on the
demo's run. How slowly outputs change from step to step is learnt: random weights would tell nothing. Neither
text nor VAE is included. Some minutes on 2 cores.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from benchmarks.rounds import fastest
from benchmarks.table import Row, report
from models.errors import WeightsError
from pipelines.config import load_config
from stages.sampling.config import SampleConfig
from stages.sampling.generate import generate, requests_of
from stages.sampling.models import Models
from stages.sampling.plan import Plan, plan_samples

CONFIG = "configs/sample/latest.yaml"
THRESHOLDS = (0.05, 0.1, 0.2)
ROUNDS = 3


def main() -> None:
    config = load_config(SampleConfig, CONFIG, sys.argv[1:])
    try:
        plan = plan_samples(config)
    except WeightsError as error:
        sys.exit(f"error: {error}: run `make demo` first, or give ckpt=")
    report("step_cache", list(rows(plan)), ("torch",))


def rows(plan: Plan) -> Iterator[Row]:
    models = Models.on_this_machine().kept()
    requests = requests_of(plan, range(len(plan.asked)), models)
    model = models.transformer(plan.checkpoint, weights=plan.config.weights)
    runs: list[int] = []
    model.transformer_blocks[-1].register_forward_hook(lambda _, inputs, output: runs.append(1))

    def latents(threshold: float | None) -> Tensor:
        runs.clear()
        return generate(replace(plan, config=replace(plan.config, step_cache=threshold)), requests, models)

    exact, steps = latents(None), len(runs)
    caches = {f"step_cache={threshold:g}": partial(latents, threshold) for threshold in THRESHOLDS}
    seconds = fastest({"without": partial(latents, None), **caches}, ROUNDS)
    yield Row(f"{len(requests)} samples, {len(model.transformer_blocks)} pairs of blocks", seconds["without"], "s")
    for name, sample in caches.items():
        found = sample()
        yield Row(f"{name}: steps at which all pairs ran", len(runs), "steps", "all", len(runs) / steps)
        change = float((found - exact).norm() / exact.norm())
        yield Row(f"{name}: change of the latents, root mean square", change, "relative")
        speed = seconds["without"] / seconds[name]
        yield Row(f"{name}: time", seconds[name], "s", "the speed without", speed)


if __name__ == "__main__":
    main()
