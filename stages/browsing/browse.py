"""Can this dataset be trusted? One page that shows what is in it, before a training is spent on it."""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import xxhash
import yaml

from models.identity import vae_identity
from shards import storage
from shards.dataset import Dataset, require_equal
from shards.manifest import Manifest, json_bytes
from shards.schema import LATENTS
from stages.browsing.browse_page import Account, findings, write_page
from stages.browsing.compare import Compared, Comparer
from stages.browsing.rejects import Planned, failed_clips, planned, reasons, with_pictures
from stages.browsing.source_frames import Source, SourceReader
from stages.browsing.survey import Survey, survey
from stages.errors import ConfigError, at_least
from stages.output import SETTINGS, output_folder, progress_bar, save_settings, save_summary
from stages.quality import expected_latents, least_and_median
from stages.shapes.render import VIDEOS_NAME

PAGE = "browse.html"


@dataclass(frozen=True)
class BrowseConfig:
    """What is looked at.

    shards: the dataset. output: where browse.html and summary.json go, outputs/browse/FOLDER-HASH by default, which
    no two datasets share.
    clips: how many are decoded back, as many from each bucket, picked by ``seed``. statistics_clips: how many
    have their latents added up. vae, videos: where these are now, if not where the dataset's config.yaml says.
    """

    shards: str = ""
    output: str = ""
    clips: int = 16
    statistics_clips: int = 512
    seed: int = 0
    vae: str = ""
    videos: str = ""

    def __post_init__(self) -> None:
        at_least(self, 0, "clips", "statistics_clips", "seed")


def browse(config: BrowseConfig) -> dict[str, Any]:
    """Write the page and return the summary.

    Damage costs the clip or the part that it is in, and is told on the page. Raises DatasetError or ConfigError where
    there is no dataset, its encode has not finished, or its VAE is not the one that made it.
    """
    started = time.perf_counter()
    dataset = Dataset.open(config.shards, buckets=())
    settings = _settings(dataset)
    (vae, identity), videos = _vae(config, dataset, settings), _videos(config, dataset, settings)
    output = output_folder(_output(config, dataset))
    save_settings(output, config)

    found = survey(config.shards, dataset.manifest, config.clips, config.statistics_clips, config.seed)
    failed, damaged = failed_clips(dataset, config.seed)
    plan = planned(config.shards, [clip.key for clip in found.picked] + [clip.key for clip in failed])
    found.faults += damaged + ([plan.fault] if plan.fault else [])
    with SourceReader() as reader:
        clips = list(_compared(found, plan, Comparer(vae, dataset.manifest, reader), videos))
        rejected = [with_pictures(reason, reader, videos) for reason in reasons(dataset, failed, plan)]

    expected = expected_latents(vae, identity)
    channels = found.sums.channels(expected)
    account = Account(dataset.manifest, found, clips, channels, expected, rejected)
    write_page(output / PAGE, account, list(_texts(dataset.manifest, settings)))
    told = findings(account)
    summary = {
        "dataset": str(dataset.path),
        "clips": len(clips),
        "with_source": sum(clip.psnr_db is not None for clip in clips),
        "psnr_db": least_and_median([clip.psnr_db for clip in clips]),
        "stored_snr_db": least_and_median([clip.stored_snr_db for clip in clips]),
        "bf16_snr_db": least_and_median([clip.bf16_snr_db for clip in clips]),
        "channels": [asdict(channel) | {"far_off": channel.far_off} for channel in channels],
        "faults": found.faults,
        "findings": [asdict(finding) for finding in told],
        "page": str(output / PAGE),
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_summary(output, summary)
    return summary


def describe(config: BrowseConfig) -> str:
    """What ``browse`` would do, in a few lines; writes nothing."""
    dataset = Dataset.open(config.shards, buckets=())
    settings = _settings(dataset)
    vae, _ = _vae(config, dataset, settings)
    samples = sum(entry.samples for entry in dataset.manifest.buckets.values())
    videos = _videos(config, dataset, settings)
    return (
        f"{min(config.clips, samples):,} of {samples:,} samples to decode with {vae}, which is the VAE that made them, "
        f"beside their source in {videos or 'a folder that is not known: give videos='}\n"
        f"latents of {min(max(config.clips, config.statistics_clips), samples):,} to measure; "
        f"the page: {os.path.join(_output(config, dataset), PAGE)}"
    )


def result_lines(summary: dict[str, Any]) -> list[str]:
    """What a person wants to know first of ``browse``'s summary, the page's path last."""
    signs = {True: "ok: ", False: "LOOK: ", None: ""}
    lines = [f"{signs[finding['good']]}{finding['text']}" for finding in summary["findings"]]
    return [*lines, f"page: {summary['page']}"]


def _settings(dataset: Dataset) -> dict[str, Any]:
    """The settings that the dataset was encoded with; none where they were not kept or cannot be read."""
    try:
        found = yaml.safe_load(storage.read(dataset.path / SETTINGS))
    except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _vae(config: BrowseConfig, dataset: Dataset, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the identity of the VAE that made the latents; refuses another one."""
    recorded = settings.get("vae") or ""
    name = config.vae or (recorded.get("name", "") if isinstance(recorded, dict) else str(recorded))
    if not name:
        raise ConfigError(f"{dataset.path / SETTINGS} names no VAE: give vae= the one that made the dataset")
    identity = vae_identity(name)
    for bucket, entry in dataset.manifest.buckets.items():
        made_by = entry.columns[LATENTS].fingerprint["vae"]
        what = f"{name} is not the VAE that made {dataset.path / bucket}"
        require_equal(identity, made_by, what, "give vae= the name, folder or hub id of that one")
    return name, identity


def _videos(config: BrowseConfig, dataset: Dataset, settings: dict[str, Any]) -> str:
    """The folder that the plan's paths are below; empty where it is not known."""
    recorded = (settings.get("data") or {}).get("videos") or ""
    if config.videos:
        return config.videos
    if settings.get("input") == "shapes":  # which are rendered beside the dataset
        return os.path.join(recorded or os.path.join(os.path.dirname(str(dataset.path)), "data"), VIDEOS_NAME)
    return recorded


def _output(config: BrowseConfig, dataset: Dataset) -> str:
    """Where the page goes: never into the dataset, whose folders hold what its manifest names."""
    root = os.path.abspath(str(dataset.path))
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.basename(root))
    place = xxhash.xxh3_64_hexdigest(root.encode())[:8]  # another dataset may have that name elsewhere
    output = config.output or os.path.join("outputs", "browse", f"{name}-{place}")
    inside = os.path.abspath(storage.local_path(output))
    if os.path.commonpath([inside, root]) == root:
        raise ConfigError(f"output={output} is inside the dataset {dataset.path}: give another folder")
    return output


def _compared(found: Survey, plan: Planned, comparer: Comparer, videos: str) -> Iterator[Compared]:
    with progress_bar(len(found.picked), "browse", "clip") as bar:
        for clip in found.picked:
            row = plan.clips.get(clip.key)
            path = "" if row is None else os.path.join(videos, row["path"])
            source = None if row is None else Source(path, row["kind"], clip.start_s)
            yield comparer.compare(clip, source)
            bar.update()


def _texts(manifest: Manifest, settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what it is, text) of all that says how the dataset was made."""
    if settings:
        yield SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    for bucket, entry in manifest.buckets.items():
        for column, made in entry.columns.items():
            yield f"fingerprint of {bucket}/{column}", json_bytes(made.fingerprint).decode()
