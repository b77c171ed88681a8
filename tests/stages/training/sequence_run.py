"""Run by test_sequence_parallel.py: trains each case on four ranks, two of which share a video, and on one rank.

usage: sequence_run.py FOLDER; leaves the runs FOLDER/CASE/RANKS, and of the resumed case FOLDER/resumed.
"""

import os
import sys
from pathlib import Path

from torch.multiprocessing import start_processes

from shards.loader import DataConfig
from stages.train import train
from stages.training.config import StepConfig, TrainConfig
from stages.training.given_frames import ConditioningConfig
from stages.training.optimizer import OptimizerConfig
from stages.training.validate import ValidationConfig
from tests.running import free_port
from tests.stages.training.mixed_dataset import mixed_dataset

RANKS, SHARING, STEPS, STOP = 4, 2, 4, 2
CASES = {  # frames of the clips, and what else is set
    "zero-1": (8, {}, {"stage": 1}),
    "zero-1, uneven": (5, {"activation_memory": "pair", "gradient_accumulation": 2}, {"stage": 1}),
    "zero-3, uneven": (5, {"activation_memory": "pair"}, {"stage": 3}),
}
ALONE = ("zero-1", "zero-1, uneven")  # the cases that are run on one rank too


def config(case: str, shards: Path, output: Path, steps: int, sharing: int) -> TrainConfig:
    """Pictures beside clips, some of the frames given, and samples and a validation loss at the end."""
    frames, settings, zero = CASES[case]
    return TrainConfig(
        output=str(output),
        data=DataConfig(shards=str(shards), subclip_frames=(frames,)),
        model={"preset": "tiny", "num_layers": 2, "temporal_pos": "branch"},
        train=StepConfig(
            steps=steps, batch_size=4, precision="fp32", sequence_parallel=sharing, log_every=1, **settings
        ),
        conditioning=ConditioningConfig(first=0.5),
        validation=ValidationConfig(holdout=0.2, samples=4, levels=2, every=STEPS, sample_every=STEPS, sample_steps=2),
        optimizer=OptimizerConfig(warmup_steps=0, lr=1e-3),
        deepspeed={"zero_optimization": zero},
    )


def run_cases(rank: int, ranks: int, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    shards, sharing = folder / "shards", SHARING if ranks > 1 else 1
    for case in CASES if ranks > 1 else ALONE:
        train(config(case, shards, folder / case / str(ranks), STEPS, sharing))
    train(config("zero-1", shards, folder / "resumed", STOP if ranks > 1 else STEPS, sharing))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    mixed_dataset(folder / "shards")
    for ranks in (RANKS, 1):
        start_processes(run_cases, (ranks, folder, free_port()), ranks, start_method="fork")
