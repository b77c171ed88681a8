"""Which samples run together."""

import torch

from stages.sampling.denoise import Given, Request
from stages.sampling.generate import fixed_batches


def _request(tokens: int, null_tokens: int = 1, given: bool = False) -> Request:
    frames = Given(torch.zeros(4, 2, 8, 8), torch.tensor([True, False])) if given else None
    return Request(torch.zeros(tokens, 6), torch.zeros(null_tokens, 6), 0, frames)


def test_only_samples_of_the_same_shapes_run_together() -> None:
    requests = [
        _request(16), _request(17), _request(1), _request(3, null_tokens=120), _request(2), _request(32),
        _request(5, given=True),
    ]  # fmt: skip
    assert [request.padded_tokens for request in requests] == [16, 32, 16, 128, 16, 32, 16]
    assert list(fixed_batches(requests, 2)) == [(0, 2), (4,), (1, 5), (3,), (6,)]
