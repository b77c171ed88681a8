"""Prompts, or the latents that a run sampled, to videos.

``python -m pipelines.sample [--config FILE | --from-file VIDEO.mp4] [--prompt "…"] [key.path=value ...]``
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.command import Parser, run
from pipelines.config import load_config
from stages.errors import ConfigError
from stages.launched import rank, tell
from stages.output import settings_text
from stages.sampling.config import SampleConfig
from stages.sampling.record import settings_to_remake
from stages.sampling.sample import describe, sample


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Make videos from prompts with trained weights.")
    parser.add_argument("--prompt", help="one prompt, taken as it is")
    parser.add_argument("--from-file", metavar="VIDEO.mp4", type=Path, help="settings of a video that sample made")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    options = parser.read(arguments)
    if options.config and options.from_file:
        raise ConfigError("found --config and --from-file, expected one of them: a video has all its settings")
    base = settings_to_remake(options.from_file) if options.from_file else options.config
    prompt = [] if options.prompt is None else [("text_prompt", [options.prompt])]
    config = load_config(SampleConfig, base, options.settings, dict(prompt))
    if options.dry_run:
        tell(settings_text(config) + describe(config))
        return
    summary = sample(config)
    if rank() == 0:
        source = summary.get("checkpoint", config.latents)
        print(f"{len(summary['samples'])} videos from {source}, in {config.output}")


if __name__ == "__main__":
    sys.exit(run(main))
