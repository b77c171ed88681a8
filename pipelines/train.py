"""Train from latent shards: ``deepspeed pipelines/train.py --config FILE [key.path=value ...]``."""

import sys
from collections.abc import Sequence

from pipelines.command import Parser, run
from pipelines.config import load_config
from stages.launched import rank, tell, world
from stages.output import settings_text
from stages.train import describe, train
from stages.training.config import TrainConfig


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Train the diffusion transformer from latent shards with DeepSpeed ZeRO.")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    options = parser.read(arguments)
    config = load_config(TrainConfig, options.config, options.settings)
    if options.dry_run:
        tell(settings_text(config) + describe(config, world()))
        return
    summary = train(config)
    if rank() == 0:
        loss = "no loss yet" if summary["final_loss"] is None else f"final loss {summary['final_loss']:.4f}"
        print(f"{summary['steps']} steps, {loss}, checkpoints in {config.output}")


if __name__ == "__main__":
    sys.exit(run(main))
