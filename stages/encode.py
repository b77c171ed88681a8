"""Videos and captions to latent shards: plan, then each column in turn on Ray, then the index.

Doing it again does what is left: rows that are planned are not planned again, shards that are committed are not
made again, and the index is made from the commits.
"""

import difflib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from models.text import LENGTHS, text_encoder_identity
from models.vae import vae_identity
from shards.dataset import compact, create_dataset, ensure_fingerprint
from shards.manifest import Manifest
from shards.schema import KEY, LATENTS, SCHEMA_VERSION, STATUS, WRITTEN, Bucket, text_column
from shards.writer import commit_path, committed_numbers, read_commit
from stages import execute
from stages.columns import LatentWorker, Target, TextConfig, TextWorker, VaeConfig
from stages.decode import POLICY, Decoder
from stages.errors import ConfigError, WorkError, at_least
from stages.execute import RuntimeConfig
from stages.metadata import Row, read_folder, read_internvid
from stages.output import output_folder, progress_bar, save_settings, save_summary
from stages.plan import (
    ClipConfig,
    Outcomes,
    PlanConfig,
    ShardPlan,
    Totals,
    append_plan,
    counts,
    load_plan,
    plan,
    shard_plans,
)
from stages.shapes.render import ShapesConfig, render_dataset

# Too few clips to tell a bad input from a bad start.
FAILURES_COUNT_FROM = 100


@dataclass(frozen=True)
class InputConfig:
    """Where the clips are. name is part of every key; by default the kind of input."""

    metadata: str = ""
    videos: str = ""
    name: str = ""


@dataclass(frozen=True)
class EncodeConfig:
    """Everything a dataset is made from.

    decoder: PyAV times every container right and sees damage; decord does neither for all, see `stages.decode`.
    shard_clips: clips planned for a shard, the unit of work. max_failed_share: of the clips that were to be
    encoded (a missing file is no failure), above which the job stops. shapes: what ``input: shapes`` renders.
    """

    input: Literal["internvid", "folder", "shapes"] = "internvid"
    output: str = ""
    data: InputConfig = field(default_factory=InputConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    decoder: Decoder = "pyav"
    shard_clips: int = 256
    max_failed_share: float = 0.5
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "shard_clips")
        at_least(self, 0, "max_failed_share")


def encode(config: EncodeConfig, retry: Sequence[str] = ()) -> dict[str, Any]:
    """Make the dataset, or what is left of it; returns the summary.

    retry: reasons whose rejected clips are planned once more, into new shards.
    """
    started = time.perf_counter()
    vae, text = _identities(config)
    check_size(config, vae)
    rows, videos = read_rows(config)
    root = create_dataset(output_folder(config.output), _name(config))
    previous = load_plan(root)
    added = _plan_rows(root, rows, config, previous, retry)
    table = pa.concat_tables([previous, added])
    plans = shard_plans(table, videos)
    buckets = sorted({shard.bucket for shard in plans})
    if not buckets:
        raise WorkError(
            f"no clip can be encoded: {_rejects(counts(table, {}))}; see data.metadata, data.videos and clip"
        )

    latents = _target(root, LATENTS, {bucket: latents_fingerprint(config, vae, bucket) for bucket in buckets})
    column = text_column(config.text_encoder.column)
    texts = _target(root, column, dict.fromkeys(buckets, text_fingerprint(config, text)))
    append_plan(root, added)  # now that no fingerprint was refused
    save_settings(root, config)
    threads = config.runtime.threads
    execute.start()
    try:
        made = _make_column(config, latents, plans, partial(LatentWorker, config.vae, vae, latents, threads))
        _make_column(config, texts, plans, partial(TextWorker, config.text_encoder, text, texts, threads))
    finally:
        execute.stop()

    totals = counts(table, _outcomes(root, plans))
    summary = _summary(compact(root, asdict(totals)), totals)
    seconds = round(time.perf_counter() - started, 1)
    summary |= {
        "seconds": seconds,
        "this_run": {"clips": sum(made.values()), "written": made[WRITTEN], "seconds": seconds},
    }
    save_summary(root, summary)
    if not totals.written:
        raise WorkError(f"no clip was written: {_rejects(totals)}; see {root / 'summary.json'}")
    return summary


def check_size(config: EncodeConfig, vae: dict[str, Any]) -> None:
    """Raises ConfigError for frames that the VAE cannot halve down to whole latents."""
    factor = vae["spatial_factor"]
    if config.clip.height % factor or config.clip.width % factor:
        size = f"{config.clip.height}x{config.clip.width}"
        raise ConfigError(f"clip.height x clip.width: found {size}, expected multiples of the VAE's {factor}")


def read_rows(config: EncodeConfig) -> tuple[Iterable[Row], str]:
    """The rows of the metadata, and the folder of the videos. Raises ConfigError where there are none."""
    data = config.data
    if config.input == "shapes":
        folder = Path(data.videos or Path(config.output).parent / "data")
        metadata, videos = render_dataset(folder, config.shapes)
        return read_internvid(str(metadata), str(videos)), str(videos)
    needed = ("metadata", "videos") if config.input == "internvid" else ("videos",)
    missing = [name for name in needed if not getattr(data, name)]
    if missing:
        raise ConfigError(
            f"{' and '.join(f'data.{name}' for name in missing)} not set: give {missing[0]!r} as data.{missing[0]}=PATH"
        )
    rows = read_internvid(data.metadata, data.videos) if config.input == "internvid" else read_folder(data.videos)
    return rows, data.videos


def latents_fingerprint(config: EncodeConfig, vae: dict[str, Any], bucket: Bucket) -> dict[str, Any]:
    """All that decides the bytes of a bucket's latents."""
    return {
        "schema_version": SCHEMA_VERSION,
        "vae": vae,
        "batch_frames": config.vae.batch_frames,
        "compute": config.vae.precision,
        "stored": "float16 mean and std" if config.vae.store_std else "float16 mean",
        "clip": asdict(bucket),
        "sampling": {"fps": config.clip.fps, "decoder": config.decoder, **POLICY},
    }


def text_fingerprint(config: EncodeConfig, text_encoder: dict[str, Any]) -> dict[str, Any]:
    """All that decides the bytes of text embeddings."""
    return {
        "schema_version": SCHEMA_VERSION,
        "text_encoder": text_encoder,
        "lengths": list(LENGTHS),
        "batch_captions": config.text_encoder.batch_captions,
        "compute": config.text_encoder.precision,
        "stored": "float16",
    }


def describe(config: EncodeConfig, retry: Sequence[str] = ()) -> str:
    """What ``encode`` would do, in a few lines; writes nothing but rendered shapes."""
    vae, text = _identities(config)
    check_size(config, vae)
    rows, videos = read_rows(config)
    root = Path(config.output)
    previous = load_plan(root)
    table = pa.concat_tables([previous, _plan_rows(root, rows, config, previous, retry)])
    outcomes = _outcomes(root, shard_plans(table, videos))
    totals = counts(table, outcomes)
    lines = [
        f"{totals.rows} rows: {totals.pending} clips to encode, {totals.written} written, "
        f"{totals.duplicates} duplicates; {_rejects(totals)}"
    ]
    left: defaultdict[Bucket, list[int]] = defaultdict(list)  # clips of each shard
    for shard in shard_plans(table, videos, done=outcomes):
        left[shard.bucket].append(len(shard.clips))
    for bucket, clips in sorted(left.items()):
        latents = sample_bytes(bucket, vae) * (2 if config.vae.store_std else 1)
        lines.append(
            f"  {bucket}: {sum(clips)} clips ({sum(clips) / totals.pending:.0%}) in {len(clips)} shards, "
            f"{sum(clips) * latents / 1e6:.1f} MB of latents, {text['dim'] * 2} bytes a text token"
        )
    return "\n".join(lines)


def sample_bytes(bucket: Bucket, vae: dict[str, Any]) -> int:
    """Of one clip's stored mean: float16 [T, C, h, w]."""
    frames = (bucket.frames - 1) // vae["temporal_factor"] + 1
    area = (bucket.height // vae["spatial_factor"]) * (bucket.width // vae["spatial_factor"])
    return 2 * frames * vae["latent_channels"] * area


def _identities(config: EncodeConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the VAE and of the text encoder."""
    text = config.text_encoder
    return vae_identity(config.vae.name), text_encoder_identity(text.name, text.max_tokens)


def _name(config: EncodeConfig) -> str:
    return config.data.name or config.input


def _plan_config(config: EncodeConfig) -> PlanConfig:
    return PlanConfig(config.clip, config.shard_clips)


def _plan_rows(
    root: Path, rows: Iterable[Row], config: EncodeConfig, previous: pa.Table, retry: Sequence[str]
) -> pa.Table:
    """What these rows add to the plan."""
    outcomes = _outcomes(root, shard_plans(previous, "")) if retry else {}
    rejected = counts(previous, outcomes).rejected if retry else {}
    for reason in retry:
        if reason not in rejected:
            nearest = difflib.get_close_matches(reason, rejected, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(rejected) or 'none'}"
            raise ConfigError(f"--retry {reason}: no clip was rejected for that; {hint}")
    return plan(rows, _plan_config(config), _name(config), previous, retry=retry, outcomes=outcomes)


def _outcomes(root: Path, plans: Sequence[ShardPlan]) -> Outcomes:
    """The rejects of every committed shard of latents."""
    outcomes = {}
    for bucket in {shard.bucket for shard in plans}:
        for number in committed_numbers(root / bucket.name / LATENTS):
            table = read_commit(commit_path(root / bucket.name / LATENTS, number)).table
            rejects = table.filter(pc.not_equal(table[STATUS], WRITTEN))
            pairs = zip(rejects[KEY].to_pylist(), rejects[STATUS].to_pylist(), strict=True)
            outcomes[bucket.name, number] = dict(pairs)
    return outcomes


def _target(root: Path, column: str, fingerprints: dict[Bucket, dict[str, Any]]) -> Target:
    hashes = {
        bucket: ensure_fingerprint(root, bucket, column, fingerprint) for bucket, fingerprint in fingerprints.items()
    }
    return Target(root.resolve(), column, hashes)


def _make_column(config: EncodeConfig, target: Target, plans: Sequence[ShardPlan], make_worker: Any) -> Counter[str]:
    """Make the shards of a column that are not committed; what became of their clips."""
    left = [shard for shard in plans if not commit_path(target.folder(shard.bucket), shard.number).exists()]
    statuses: Counter[str] = Counter()
    clips = sum(len(shard.clips) for shard in left)
    with progress_bar(clips, target.column, "clip") as bar:
        for report in execute.run_shards(make_worker, left, config.runtime, config.decoder):
            statuses.update(report.statuses)
            bar.update(sum(report.statuses.values()))
            bar.set_postfix_str(f"{statuses.total() - statuses[WRITTEN]} rejected")
            _check_failures(statuses, config.max_failed_share)
    return statuses


def _check_failures(statuses: Counter[str], max_failed_share: float) -> None:
    tried = statuses.total() - statuses["missing_file"]
    failed = tried - statuses[WRITTEN]
    if tried >= FAILURES_COUNT_FROM and failed > max_failed_share * tried:
        reasons = ", ".join(f"{count} {reason}" for reason, count in statuses.most_common() if reason != WRITTEN)
        raise WorkError(
            f"{failed} of {tried} clips failed ({reasons}), more than max_failed_share={max_failed_share:g}: "
            "look at the videos, or raise it; the same command goes on"
        )


def _rejects(totals: Totals) -> str:
    return "rejected: " + (", ".join(f"{count} {reason}" for reason, count in totals.rejected.items()) or "none")


def _summary(manifest: Manifest, totals: Totals) -> dict[str, Any]:
    columns = [column for bucket in manifest.buckets.values() for column in bucket.columns.values()]
    return {
        **{name: value for name, value in asdict(totals).items() if name != "pending"},
        "samples": sum(bucket.samples for bucket in manifest.buckets.values()),
        "shards": sum(len(bucket.columns[LATENTS].shards) for bucket in manifest.buckets.values()),
        "bytes": sum(shard.tar_bytes for column in columns for shard in column.shards),
    }
