"""The page about a dataset: what was found in it, in words, charts and pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from shards.manifest import Manifest
from shards.schema import TEXT_PREFIX, TOKENS
from stages.browsing.compare import Compared
from stages.browsing.rejects import Reason
from stages.browsing.survey import Survey
from stages.chart import Histogram, histogram
from stages.evaluation.report import dataset_numbers
from stages.output import write_text
from stages.page import render_page
from stages.quality import FAR_MEAN, FAR_STD, LEAST_SNR_DB, Channel, Expected, least_and_median

LOW_PSNR_DB = 20.0
"""A clip below this does not show what its source shows."""
FAULTS_SHOWN = 20
CHANNEL_AXIS = 3.0
"""The channels' means and deviations are drawn from minus to plus so many expected deviations."""

_TITLES = {
    "duration_s": "Duration of the whole clip, seconds",
    "aesthetic": "Aesthetic score",
    "umt": "UMT score",
    "matching_score": "Matching score",
    "latent_motion": "Motion of the latents",
}


@dataclass(frozen=True)
class Account:
    """All that was found out about a dataset."""

    manifest: Manifest
    survey: Survey
    clips: Sequence[Compared]
    channels: Sequence[Channel]
    expected: Expected
    rejected: Sequence[Reason]


@dataclass(frozen=True)
class Finding:
    """One thing that was checked, in a line: whether it is as it should be, None where that cannot be told."""

    good: bool | None
    text: str


@dataclass(frozen=True)
class Spread:
    """How the values of one column are spread over the clips; ``words`` tells it without the picture."""

    title: str
    chart: Histogram
    words: str


def findings(account: Account) -> list[Finding]:
    """What a person wants to know first."""
    return [*_of_damage(account), *_of_pictures(account), *_of_latents(account)]


def write_page(path: Path, account: Account, texts: Sequence[tuple[str, str]]) -> None:
    """Write the page as one HTML file. texts: (title, text) of all that says how the dataset was made."""
    numbers = dataset_numbers(account.manifest)
    page = render_page(
        "browse.html",
        account=account,
        manifest=account.manifest,
        today=datetime.now(timezone.utc).date().isoformat(),
        findings=findings(account),
        dataset=numbers,
        psnr=least_and_median([clip.psnr_db for clip in account.clips]),
        snr=least_and_median([clip.stored_snr_db for clip in account.clips]),
        buckets=_shares(account.manifest),
        spreads=list(_spreads(account.survey)),
        rejected=sum(reason.clips for reason in account.rejected),
        texts=texts,
        low_psnr_db=LOW_PSNR_DB,
        least_snr_db=LEAST_SNR_DB,
        far_mean=FAR_MEAN,
        far_std=FAR_STD,
        channel_axis=CHANNEL_AXIS,
        faults_shown=FAULTS_SHOWN,
    )
    write_text(path, page)


def _of_damage(account: Account) -> Iterator[Finding]:
    faults = len(account.survey.faults)
    if faults:
        yield Finding(False, f"{faults} damaged or missing {'piece' if faults == 1 else 'pieces'}, named below")
    else:
        yield Finding(True, f"nothing that was read is damaged: {account.survey.sums.clips:,} records and the indexes")


def _of_pictures(account: Account) -> Iterator[Finding]:
    psnr = least_and_median([clip.psnr_db for clip in account.clips])
    beside = sum(clip.psnr_db is not None for clip in account.clips)
    if psnr is None:
        yield Finding(None, "no clip could be compared with its source")
        return
    low = sum(clip.psnr_db is not None and clip.psnr_db < LOW_PSNR_DB for clip in account.clips)
    numbers = f"{psnr['median']:.1f} dB median, {psnr['least']:.1f} dB least"
    below = f"; {low:,} of them below {LOW_PSNR_DB:g} dB" if low else ""
    yield Finding(not low, f"PSNR of {beside:,} clips against their source: {numbers}{below}")
    alone = len(account.clips) - beside
    if alone:
        yield Finding(None, f"{alone:,} of {len(account.clips):,} clips could not be compared with their source")


def _of_latents(account: Account) -> Iterator[Finding]:
    stored = least_and_median([clip.stored_snr_db for clip in account.clips])
    bf16 = least_and_median([clip.bf16_snr_db for clip in account.clips])
    if stored is not None:
        numbers = f"SNR {stored['median']:.1f} dB median, {stored['least']:.1f} dB least; {LEAST_SNR_DB:g} wanted"
        yield Finding(stored["least"] >= LEAST_SNR_DB, f"stored latents against fp32: {numbers}")
    if bf16 is not None:
        passes = bf16["least"] >= LEAST_SNR_DB
        verdict = "passes, vae.precision=bf16 may be used" if passes else "does not pass, keep vae.precision=fp32"
        numbers = f"SNR {bf16['least']:.1f} dB least; {LEAST_SNR_DB:g} wanted"
        yield Finding(None, f"bf16 compute against fp32: {numbers}: {verdict}")
    far = [str(number) for number, channel in enumerate(account.channels) if channel.far_off]
    if far:
        yield Finding(False, f"latent channels far off from what the VAE states: {', '.join(far)}")
    elif account.channels:
        yield Finding(True, f"all {len(account.channels)} latent channels are spread as the VAE states")


def _shares(manifest: Manifest) -> list[tuple[str, int, float]]:
    """(bucket, samples, share of all samples), the largest first."""
    samples = {name: entry.samples for name, entry in manifest.buckets.items()}
    total = max(1, sum(samples.values()))
    return [(name, count, count / total) for name, count in sorted(samples.items(), key=lambda item: -item[1])]


def _spreads(found: Survey) -> Iterator[Spread]:
    for column, values in found.numbers.items():
        if not len(values):
            continue
        chart = histogram(values)
        low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
        words = [f"median {middle:.3g}", f"5 to 95 % of the clips: {low:.3g} to {high:.3g}"]
        words += [f"{chart.outside:,} beyond"] if chart.outside else []
        words += [f"{found.missing[column]:,} clips have none"] if found.missing[column] else []
        yield Spread(_title(column), chart, "; ".join(words))


def _title(column: str) -> str:
    if column.startswith(TEXT_PREFIX):
        return f"Tokens of {column.removesuffix(f'.{TOKENS}')}"
    return _TITLES.get(column, column)
