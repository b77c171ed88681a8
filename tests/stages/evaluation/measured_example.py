"""Made-up numbers of everything that can be measured."""

from stages.evaluation.clip_score import ClipScore
from stages.evaluation.frechet import FrechetDistance
from stages.evaluation.held_out_loss import Curve, HeldOutLoss
from stages.evaluation.intervals import Estimate, Proportion
from stages.evaluation.measured import Beside, Measured
from stages.evaluation.motion import MEASURES
from stages.evaluation.nearest import Nearest, Pair


def example() -> Measured:
    def estimate(value: float) -> Estimate:
        return Estimate(value, (0.9 * value - 0.01, 1.1 * value + 0.01), 2048, 1000)

    def curve(name: str, value: float) -> Curve:
        return Curve(name, estimate(value), [estimate(value * (1 + level / 10)) for level in range(10)])

    levels = [(place + 0.5) / 10 for place in range(10)]
    folders = [f"outputs/a_long_name_of_a_run_that_someone_gave_{number}/checkpoints/step-0100000" for number in "12"]
    loss = HeldOutLoss("held-out", "velocity", levels, curve(folders[0], 0.6), curve(folders[1], 0.7), curve("", -0.1))
    pair = Pair("0007-a-woman-walks-along-a-beach-at-sunset.mp4", "clip_0123456789abcdef", "a_source.mp4", 3.5, 0.02)
    return Measured(
        loss,
        "held-out",
        [
            FrechetDistance(f"{name}.pt", name == "latents", 400, 2000, 123.456, (120.5, 126.4), 150.3, 96.61)
            for name in ("i3d_torchscript_of_a_long_name", "latents")
        ],
        [Beside(name, unit, estimate(0.5), estimate(0.6)) for name, unit in MEASURES.items()],
        Nearest(50_000, estimate(0.4), estimate(0.5), 0.1, Proportion(130, 2048), [pair]),
        ClipScore("clip", estimate(31.2), estimate(15.1), estimate(16.1), estimate(32.0)),
        ["something could not be measured"],
    )
