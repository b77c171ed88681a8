"""What precomputing gains: a training step that encodes its clips and captions itself, against one fed from shards.

    python -m benchmarks.precompute      prints a table, writes outputs/benchmarks/precompute.json; about 2 minutes

The gain cannot be more than 1 + (VAE + text encoder) / model, by the times of each alone; the target is to get it. The
embedded VAE and text encoder, and a transformer 256 wide that makes them about as large a share of the step as the real
ones are on a GPU. One CPU thread; the arms take turns, and the best of several rounds counts.
"""

import tempfile
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks.plain_step import Clips, TrainingStep, random_batch
from benchmarks.rendered import Samples, loader_of
from benchmarks.rounds import fastest
from benchmarks.table import Row, report
from models.latents import LatentStats
from models.text import TextEncoder
from models.transformer import Transformer, TransformerConfig
from models.vae import FrozenVAE
from shards.loader import Batch, DataConfig
from shards.schema import Bucket

CLIPS = Clips(frames=8, height=64, width=64)
NETWORK = TransformerConfig(num_layers=2, num_heads=4, head_dim=64, text_dim=64, sample_size=8)
CAPTIONS = ["a red ball moves left while a blue square moves up and a green one moves right"] * CLIPS.batch
ROUNDS = 100


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    online = Online()
    text_tokens = online.texts().shape[1]  # in all arms
    bucket = Bucket(CLIPS.height, CLIPS.width, CLIPS.frames)
    stored = Samples(bucket, 2, 64, text_tokens=text_tokens, text_dim=NETWORK.text_dim)
    step = TrainingStep(Transformer(NETWORK), torch.float32, LatentStats.of(online.vae.identity))
    batch = random_batch(replace(CLIPS, text_tokens=text_tokens), NETWORK)
    with tempfile.TemporaryDirectory() as folder:
        loader = loader_of(stored.render(Path(folder) / "dataset"), stored.bucket, CLIPS.batch, DataConfig())
        with closing(loader.batches(0, ROUNDS + 1)) as batches:
            arms = {
                "the VAE alone": online.latents,
                "the text encoder alone": online.texts,
                "the model's step alone": lambda: float(step(batch)),
                "a step that encodes": lambda: float(step(online.batch(batch))),
                "a step from shards": lambda: float(step(*islice(batches, 1))),
            }
            seconds = fastest(arms, ROUNDS)
    report("precompute", _rows(seconds), ("torch", "diffusers", "transformers"))


class Online:
    """The frames and captions of a batch, and the encoders that make latents and embeddings of them."""

    def __init__(self) -> None:
        self.vae, self._text = FrozenVAE.load("tiny"), TextEncoder.load("tiny")
        shape = (CLIPS.batch * CLIPS.frames, CLIPS.height, CLIPS.width, 3)
        self._frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def latents(self) -> np.ndarray:
        return self.vae.encode(self._frames).reshape(CLIPS.batch, CLIPS.frames, -1, *CLIPS.latent_shape[1:])

    def texts(self) -> np.ndarray:
        return np.stack(self._text.encode(CAPTIONS))

    def batch(self, like: Batch) -> Batch:
        text = self.texts()
        return replace(like, mean=self.latents(), text=text, text_mask=np.ones(text.shape[:2], bool))


def _rows(seconds: dict[str, float]) -> list[Row]:
    vae, text, model, online, stored = seconds.values()
    bound, gain = 1 + (vae + text) / model, online / stored
    rows = [Row(name, elapsed * 1e3, "ms") for name, elapsed in seconds.items()]
    return [
        *rows,
        Row("the most that precomputing can gain", bound, "times"),
        Row("what it gains", gain, "times", "the most", gain / bound, ">= 0.95", gain / bound >= 0.95),
    ]


if __name__ == "__main__":
    main()
