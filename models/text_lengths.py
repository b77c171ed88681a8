"""The lengths that texts are padded to, for encoding and for sampling."""

LENGTHS = (16, 32, 64, 128)
"""The only token counts that run: libraries choose their kernels by shape, so only a fixed one gives a text the same
answer whatever it runs with."""

USUAL_TOKENS = 20
"""Of an InternVid caption, about."""


def padded_length(tokens: int) -> int:
    """The least of LENGTHS that holds so many tokens. Raises ValueError where none does."""
    fitting = [length for length in LENGTHS if length >= tokens]
    if not fitting:
        raise ValueError(f"a text has {tokens} tokens; expected at most {LENGTHS[-1]}")
    return fitting[0]
