"""What sorting captions by length saves: tokens that the text encoder runs on, and time.

    python -m benchmarks.text_encoder      prints a table, writes outputs/benchmarks/text_encoder.json; about 1 minute

Captions have InternVid's lengths (a third under 10 words, half from 10 to 20, the rest longer), 256 a shard. Against
them: every caption padded to 120 tokens, as PixArt-α stores it, in batches of as many tokens. A T5 of
random weights, 256 wide, on one CPU thread; the arms take turns, and the best of several rounds counts.
"""

import numpy as np
import torch
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from benchmarks.rounds import fastest
from benchmarks.table import Row, report
from models.source import resolve_model
from models.text import TextEncoder

SHARD_CAPTIONS, ROUNDS = 256, 3
BATCH_TOKENS, PADDED_TOKENS = 1024, 120
WORDS = "a red blue green ball square moves left right up down".split()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny", "tokenizer"), local_files_only=True)
    config = T5Config(vocab_size=256, d_model=256, d_kv=64, d_ff=640, num_layers=4, num_heads=4)
    model = T5EncoderModel(config).eval()
    encoder = TextEncoder(model, tokenizer, {"max_tokens": PADDED_TOKENS}, BATCH_TOKENS)
    shard = captions(0)
    ran: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: ran.append(given["input_ids"].numel()), with_kwargs=True)
    real = sum(len(text) for text in encoder.encode(shard))
    sorted_tokens = sum(ran)

    def padded() -> None:
        every = tokenizer(shard, padding="max_length", max_length=PADDED_TOKENS)
        ids, mask = torch.tensor(every["input_ids"]), torch.tensor(every["attention_mask"])
        for batch in zip(*(part.split(BATCH_TOKENS // PADDED_TOKENS) for part in (ids, mask)), strict=True):
            with torch.inference_mode():
                model(input_ids=batch[0], attention_mask=batch[1])

    seconds = fastest({"sorted": lambda: encoder.encode(shard), "padded": padded}, ROUNDS)
    count = len(shard)
    rates = {name: count / elapsed for name, elapsed in seconds.items()}
    padded_to = f"padded to {PADDED_TOKENS}"
    rows = [
        Row("tokens of a caption", real / count, "tokens"),
        Row("tokens that the encoder runs on", sorted_tokens / count, "tokens", "the real ones", sorted_tokens / real),
        Row(f"… {padded_to}", PADDED_TOKENS, "tokens", "the real ones", PADDED_TOKENS * count / real),
        Row(f"captions {padded_to}", rates["padded"], "/s"),
        Row("captions sorted by length", rates["sorted"], "/s", padded_to, rates["sorted"] / rates["padded"]),
    ]
    report("text_encoder", rows, ("torch", "transformers"))


def captions(seed: int) -> list[str]:
    """A shard's, with lengths as InternVid's paper gives them (arXiv:2307.06942)."""
    draw = np.random.default_rng(seed)
    ranges = draw.choice([(4, 10), (10, 21), (21, 41)], SHARD_CAPTIONS, p=[1 / 3, 1 / 2, 1 / 6])
    return [" ".join(draw.choice(WORDS, draw.integers(*between))) for between in ranges]


if __name__ == "__main__":
    main()
