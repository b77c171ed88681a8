"""Colours from latents, against a least squares over all pixels at once."""

from pathlib import Path

import numpy as np

from shards.dataset import Dataset, compact, create_dataset, ensure_fingerprint
from shards.latent_rgb import LatentRgbFit, solve, to_rgb
from shards.schema import LATENTS, Bucket
from shards.writer import write_shard
from tests.shards.conftest import make_samples

MAP = np.array([[0.1, -0.05, 0.0], [0.0, 0.1, 0.05], [0.05, 0.0, -0.1], [0.02, 0.03, 0.04], [0.5, 0.4, 0.6]])


def pictures(draw: np.random.Generator, count: int, factor: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Latents [4, 3, 5] and frames whose patches have, on average, the colours that MAP gives them."""
    found = []
    for _ in range(count):
        latents = draw.normal(size=(4, 3, 5))
        colours = np.moveaxis(latents, 0, -1) @ MAP[:-1] + MAP[-1]
        frame = np.kron(colours, np.ones((factor, factor, 1))) * 255 + draw.normal(size=(3 * factor, 5 * factor, 3))
        found.append((latents, frame.round().clip(0, 255).astype(np.uint8)))
    return found


def test_the_map_is_the_least_squares_fit_over_the_pixels_of_all_shards() -> None:
    draw = np.random.default_rng(0)
    shards = [pictures(draw, 3, factor=8), pictures(draw, 5, factor=4)]
    sums = []
    for shard in shards:
        fit = LatentRgbFit()
        for latents, frame in shard:
            fit.add(latents, frame)
        sums.append(fit.sums())
    found = solve([*sums, LatentRgbFit().sums()])  # a shard whose clips were all rejected adds nothing

    inputs, colours = [], []
    for latents, frame in (picture for shard in shards for picture in shard):
        factor = len(frame) // 3
        for row, column in np.ndindex(3, 5):
            inputs.append([*latents[:, row, column], 1])
            patch = frame[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
            colours.append(patch.reshape(-1, 3).mean(0) / 255)
    expected, *_ = np.linalg.lstsq(np.array(inputs), np.array(colours), rcond=None)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(found, MAP, atol=0.01)


def test_the_map_gives_back_the_colours() -> None:
    ((latents, frame),) = pictures(np.random.default_rng(1), 1, factor=1)
    shown = to_rgb(np.stack([latents, latents]), MAP.tolist())
    assert shown.shape == (2, 3, 5, 3) and shown.dtype == np.uint8
    assert np.abs(shown[1].astype(int) - frame).max() <= 4  # the noise that the picture has
    assert to_rgb(np.full((4, 1, 1), 1e6), MAP.tolist()).tolist() == [[[255, 255, 0]]]  # beyond what can be shown


def test_nothing_to_fit_gives_no_map() -> None:
    assert solve([]) == solve([[]]) == []


def test_the_manifest_has_the_map_of_all_shards_and_buckets(tmp_path: Path) -> None:
    root, draw, sums = create_dataset(tmp_path / "dataset", "tests"), np.random.default_rng(2), []
    for place, (bucket, number) in enumerate([("24x40x2", 0), ("24x40x2", 1), ("24x40x4", 0)]):
        fit = LatentRgbFit()
        for latents, frame in pictures(draw, 2, factor=8):
            fit.add(latents, frame)
        sums.append(fit.sums())
        for column in (LATENTS, "text.t5"):
            fingerprint = ensure_fingerprint(root, Bucket.parse(bucket), column, {})
            samples = make_samples(2, 2 * place, column=column)
            rgb = fit if column == LATENTS else None
            write_shard(root / bucket / column, number, samples, fingerprint_hash=fingerprint, latent_rgb=rgb)
    compact(root, {})
    assert Dataset.open(root).manifest.latent_rgb == solve(sums)
