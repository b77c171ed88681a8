"""Make the tiny models that ship in ``models/tiny``: ``python -m stages.make_tiny [FOLDER]``.

Reads nothing; about 10 minutes on one core; seeded, so that the same versions give the same files.

    vae/            AutoencoderKL, 4 channels at an eighth of the size, trained here on moving shapes and on
                    gradients, blots and noise, so that other pictures come back as something sensible
    tokenizer/      SentencePiece unigram pieces, trained here on captions and common words
    text_encoder/   T5EncoderModel, seeded and untrained: words keep their own directions in its output

They are real models at a small size, loaded by the same code as the real weights.
"""

import io
import random
import string
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from diffusers import AutoencoderKL
from torch.nn import functional
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from stages.shapes.render import ShapesConfig, caption, render_frames, seen

SEED = 0
SIZE_PX = 64
CROP_PX = 32
STEPS = 2400
CROP_STEPS_SHARE = 0.85
"""Share of the steps that see crops around a shape: a quarter of the work, four times the shape. Then whole frames."""
BATCH = 16
PEAK_LR = 3e-3
KL_WEIGHT = 1e-4
CHROMA_WEIGHT = 2.0
ABSOLUTE_WEIGHT = 1 / 15
SHAPE_SHARE = 0.75
"""Share of training pictures that show shapes; the rest is anything."""
ANY_WEIGHT = 0.3
"""Weight of the rest's error: blots are harder than shapes and would take the whole model."""
FIRST_LOG_VARIANCE = -6.0
"""Where the posterior's log variance starts: from 0, the noise hides all colour for most of the training."""


def shape_pictures(count: int, side_px: int, rng: np.random.Generator) -> np.ndarray:
    """Frames of clips, cut to a square around the shape: uint8 [count, side, side, 3]; no held-out combination."""
    config, shown = ShapesConfig(size_px=SIZE_PX, frames=2), seen()
    pictures = np.empty((count, side_px, side_px, 3), np.uint8)
    for number in range(count):
        frame = render_frames(shown[int(rng.integers(len(shown)))], config, rng)[number % 2]
        centre = np.argwhere((frame != frame[0, 0]).any(axis=2)).mean(axis=0)
        corner = centre - side_px / 2 + rng.uniform(-0.4, 0.4, 2) * side_px
        top, left = corner.clip(0, SIZE_PX - side_px).astype(int)
        pictures[number] = frame[top : top + side_px, left : left + side_px]
    return pictures


def any_pictures(count: int, side_px: int, rng: np.random.Generator) -> np.ndarray:
    """Pictures of no particular thing, uint8 [count, side, side, 3]: blots of many grains, with boxes over them."""
    pictures = np.empty((count, side_px, side_px, 3), np.uint8)
    for number in range(count):
        cells = int(rng.choice((2, 3, 5, 9, side_px // 4)))
        contrast = rng.uniform(0.0, 0.6)
        picture = _enlarge(rng.uniform(0, 1, 3) + contrast * rng.normal(0, 0.5, (cells, cells, 3)), side_px)
        for _ in range(int(rng.integers(0, 4))):
            top, left = rng.integers(0, side_px, 2)
            height, width = rng.integers(4, side_px // 2, 2)
            picture[top : top + height, left : left + width] = rng.uniform(0, 1, 3)
        pictures[number] = np.rint(picture.clip(0, 1) * 255)
    return pictures


def _enlarge(coarse: np.ndarray, side_px: int) -> np.ndarray:
    """Bilinear interpolation of [n, n, 3] to [side, side, 3]."""
    tensor = torch.from_numpy(coarse).permute(2, 0, 1)[None]
    large = functional.interpolate(tensor, size=(side_px, side_px), mode="bilinear", align_corners=True)
    return large[0].permute(1, 2, 0).numpy().copy()


def as_input(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder of 0.4 M parameters.

    One group in its norms: with two of eight channels in a group, a plain picture has only 2^4 outputs left.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=SIZE_PX,
    )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = FIRST_LOG_VARIANCE
        vae.quant_conv.weight[4:] *= 0.1
    return vae


def picture_error(restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error, chroma weighted up, and some absolute error for clean backgrounds: [N, 3, H, W] -> [N]."""
    difference = restored - target
    chroma = difference - difference.mean(dim=1, keepdim=True)
    pixels = difference.square() + CHROMA_WEIGHT * chroma.square() + ABSOLUTE_WEIGHT * difference.abs()
    return pixels.mean(dim=(1, 2, 3))


def train_vae(vae: AutoencoderKL, steps: int) -> None:
    """Reconstruction, with a small KL term whose noise makes the decoder smooth."""
    rng = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.05)
    shapes = int(BATCH * SHAPE_SHARE)
    weights = torch.tensor([1.0] * shapes + [ANY_WEIGHT] * (BATCH - shapes)) / BATCH
    started_s = time.monotonic()
    for step in range(1, steps + 1):
        side_px = CROP_PX if step <= CROP_STEPS_SHARE * steps else SIZE_PX
        pictures = shape_pictures(shapes, side_px, rng), any_pictures(BATCH - shapes, side_px, rng)
        target = as_input(np.concatenate(pictures))
        posterior = vae.encode(target).latent_dist
        errors = picture_error(vae.decode(posterior.sample()).sample, target)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (3 * errors @ weights + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            error, taken_s = errors[:shapes].mean().item(), time.monotonic() - started_s
            print(f"vae {step}/{steps}  error {error:.4f}  kl {kl.item():.3f}  {taken_s:.0f} s", flush=True)


def even_out(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Give the latents' channels zero mean and one common scale, and the config the factor that makes it 1.

    A change of the two 1 x 1 convolutions around the latents that the decoder's output does not notice; a diffusion
    model learns channels of equal scale more easily.
    """
    with torch.no_grad():
        latents = vae.encode(as_input(pictures)).latent_dist.mean
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        common = std.square().mean().sqrt()
        gain = common / std
        inward, outward = vae.quant_conv, vae.post_quant_conv
        outward.bias += outward.weight[:, :, 0, 0] @ mean
        outward.weight /= gain[None, :, None, None]
        inward.bias[:4] -= mean
        inward.bias[:4] *= gain
        inward.weight[:4] *= gain[:, None, None, None]
        inward.bias[4:] += 2 * gain.log()
    vae.register_to_config(scaling_factor=round(1 / common.item(), 5))


def make_vae(folder: Path, steps: int = STEPS) -> None:
    """Train and save the VAE."""
    torch.manual_seed(SEED)
    vae = new_vae()
    train_vae(vae, steps)
    even_out(vae, shape_pictures(512, SIZE_PX, np.random.default_rng(SEED + 1)))
    vae.save_pretrained(folder)


COLUMNS = (
    ["a", "the", "two", "one small", "a large", "some"],
    ["red", "yellow", "green", "cyan", "blue", "purple", "white", "black", "young", "old", "wooden"],
    ["ball", "square", "triangle", "woman", "man", "dog", "cat", "car", "tree", "street", "child", "people"],
    ["moves", "walks", "stands", "runs", "sits", "is shown", "is playing", "is seen", "talks", "dances"],
    ["left", "right", "up", "down", "in the water", "on the table", "with the camera", "of the house", "and smiles"],
)
"""Words of the sentences that the tokenizer is trained on: one of each column."""
PIECES = 256
TEXT_WIDTH = 64


def training_sentences(count: int) -> list[str]:
    """Captions of moving shapes, sentences of common words, and random letters so that each can stand alone.

    The trainer takes for a piece only what occurs in several different words, so each word also comes with endings.
    """
    rng = random.Random(SEED)
    letters = string.ascii_lowercase + string.digits + string.punctuation
    sentences = [caption(combination) for combination in seen()] * (count // 200)
    sentences += [" ".join(rng.choice(words) for words in COLUMNS) for _ in range(count)]
    sentences += [f"{word}{end}" for words in COLUMNS for word in " ".join(words).split() for end in (",", ".", "s")]
    sentences += ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(count // 20)]
    return sentences


def make_tokenizer(folder: Path) -> None:
    """Train and save a SentencePiece unigram tokenizer of T5's kind: <pad> 0, </s> 1, <unk> 2, any ASCII text."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_sentences(2000)),
        model_writer=pieces,
        model_type="unigram",
        vocab_size=PIECES,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars=string.printable.strip(),
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "spiece.model").write_bytes(pieces.getvalue())
        T5Tokenizer.from_pretrained(scratch, extra_ids=0, model_max_length=512).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(pieces.getvalue())


def make_text_encoder(folder: Path, pieces: int) -> None:
    """Save a seeded, untrained T5 encoder.

    T5's own initialisation has large embeddings and weak attention, so each token keeps most of its own random
    direction, and a linear map can read the words from the mean of the output. The final norm gives unit scale.
    """
    torch.manual_seed(SEED)
    config = T5Config(
        vocab_size=pieces,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    T5EncoderModel(config).save_pretrained(folder)


def main(folder: Path) -> None:
    """Make the three models in ``folder``."""
    torch.set_num_threads(1)
    make_tokenizer(folder / "tokenizer")
    make_text_encoder(folder / "text_encoder", PIECES)
    make_vae(folder / "vae")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "models" / "tiny")
