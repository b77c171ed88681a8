"""Videos and captions to latent shards: plan, then each column in turn on Ray, then the index.

Doing it again does what is left: rows that are planned are not planned again, shards that are committed are not
made again, and the index is made from the commits.
"""

import difflib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shards import storage
from shards.compaction import incomplete_columns
from shards.dataset import compact, create_dataset, ensure_fingerprint
from shards.manifest import FINGERPRINT, read_header, read_json
from shards.null_text import null_text_path
from shards.schema import KEY, LATENTS, STATUS, TEXT_PREFIX, WRITTEN, Bucket, text_column
from shards.writer import commit_path, committed_numbers, read_commit
from stages import execute
from stages.captions import Captions
from stages.columns import Target
from stages.encode_config import CAPTIONS, EncodeConfig, Identities, latents_fingerprint, read_rows, text_fingerprint
from stages.errors import ConfigError, WorkError
from stages.execute import Worker
from stages.output import save_settings, save_summary
from stages.planning.metadata import Row
from stages.planning.plan import Outcomes, Plan, ShardPlan, Totals, counts, plan, shard_plans
from stages.planning.plan_table import planned_shards
from stages.progress import Progress

Sizes = dict[tuple[str, int], int]
"""(bucket name, number) of each of some shards -> its clips."""

SHARD_FIELDS = ("bucket", "shard")
"""The columns of a plan that ``shard_sizes`` needs."""

# Too few clips to tell a bad input from a bad start.
FAILURES_COUNT_FROM = 100


def encode(config: EncodeConfig, retry: Sequence[str] = ()) -> dict[str, Any]:
    """Make the dataset, or what is left of it; returns the summary.

    retry: reasons whose rejected clips are planned once more, into new shards.
    """
    started = time.perf_counter()
    config = config.located()
    identities = Identities.of(config)
    rows, videos = read_rows(config)
    root = create_dataset(output_of(config), config.name)
    planned = Plan(root)
    sizes = shard_sizes(planned.parts(SHARD_FIELDS))
    _targets(root, config, identities, planned, sizes)  # a fingerprint is refused before anything is planned
    outcomes = read_outcomes(root, sizes) if retry else {}
    with execute.running(config.runtime):
        for part in plan_rows(rows, videos, config, planned, outcomes, retry):
            planned.append(part)
            sizes |= shard_sizes([part])
        latents, texts = _targets(root, config, identities, planned, sizes)
        if not latents.fingerprints:
            none = f"no clip can be encoded: {rejects_of(counts(planned, {}))}"
            raise WorkError(f"{none}; see data.metadata, data.videos, data.filter and clip")
        save_settings(root, config)
        made_latents = _make_latents(config, identities, latents, planned, sizes, videos)
        outcomes = read_outcomes(root, sizes)
        made_text = _make_text(config, identities, texts, text_left(root, texts.column, sizes, outcomes))
    return _finish(root, counts(planned, outcomes), [made_latents, made_text], started)


def encode_text(config: EncodeConfig) -> dict[str, Any]:
    """Make the text column alone, for the latents that a dataset has; returns the summary.

    No metadata is read and no latents are touched. A caption that another column of the same text encoder has is
    not encoded again.
    """
    started = time.perf_counter()
    config = config.located()
    root = storage.place(output_of(config))
    read_header(root)
    identities, planned = Identities.of(config), Plan(root)
    sizes = shard_sizes(planned.parts(SHARD_FIELDS))
    _, texts = _targets(root, config, identities, planned, sizes, text_only=True)
    save_settings(root, config, f"config.{texts.column}.yaml")
    outcomes = read_outcomes(root, sizes)
    with execute.running(config.runtime):
        made = _make_text(config, identities, texts, text_left(root, texts.column, sizes, outcomes))
    return _finish(root, counts(planned, outcomes), [made], started)


def output_of(config: EncodeConfig) -> str:
    if not config.output:
        raise ConfigError("output is not set: give output=FOLDER")
    return config.output


def check_captions(config: EncodeConfig, planned: Plan) -> None:
    """Raises ConfigError for a file of captions that has none of the clips planned.

    To be asked before a fingerprint records its hash, which would refuse the right file.
    """
    if config.text_encoder.captions:
        keys = (key for part in planned.parts([KEY]) for key in part[KEY].drop_null().to_pylist())
        Captions(config.text_encoder.captions).require_any(keys)


def plan_rows(
    rows: Iterable[Row], videos: str, config: EncodeConfig, planned: Plan, outcomes: Outcomes, retry: Sequence[str]
) -> Iterator[pa.Table]:
    """What these rows add to the plan, part by part; files are probed where that needs it.

    outcomes: of what is committed; only a retry asks for them.
    """
    rejected = counts(planned, outcomes).rejected if retry else {}
    for reason in retry:
        if reason not in rejected:
            nearest = difflib.get_close_matches(reason, rejected, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(rejected) or 'none'}"
            raise ConfigError(f"--retry {reason}: no clip was rejected for that; {hint}")
    probe = partial(execute.probe, videos=videos, runtime=config.runtime)
    return plan(rows, config.planning, config.name, planned, retry=retry, outcomes=outcomes, probe=probe)


def read_outcomes(root: storage.Place, shards: Iterable[tuple[str, int]]) -> Outcomes:
    """The rejects of every committed shard of latents; reads all their commits."""
    outcomes = {}
    for bucket in sorted({bucket for bucket, _ in shards}):
        for number in committed_numbers(root / bucket / LATENTS):
            table = read_commit(commit_path(root / bucket / LATENTS, number)).table
            rejects = table.filter(pc.not_equal(table[STATUS], WRITTEN))
            pairs = zip(rejects[KEY].to_pylist(), rejects[STATUS].to_pylist(), strict=True)
            outcomes[bucket, number] = dict(pairs)
    return outcomes


def shard_sizes(parts: Iterable[pa.Table]) -> Sizes:
    """Of all shards in these parts of a plan, of which no shard is in two; in their order."""
    planned = (part.filter(pc.is_valid(part["shard"])) for part in parts)
    return {(bucket, number): rows.num_rows for part in planned for bucket, number, rows in planned_shards(part)}


def rejects_of(totals: Totals) -> str:
    return "rejected: " + (", ".join(f"{count} {reason}" for reason, count in totals.rejected.items()) or "none")


def _targets(
    root: storage.Place,
    config: EncodeConfig,
    identities: Identities,
    planned: Plan,
    sizes: Sizes,
    text_only: bool = False,
) -> tuple[Target, Target]:
    """Where latents and text of the planned buckets go, their fingerprints recorded, or compared with those there."""
    check_captions(config, planned)
    buckets = sorted({Bucket.parse(name) for name, _ in sizes})
    latents = {bucket: latents_fingerprint(config, identities.vae, bucket) for bucket in buckets if not text_only}
    text = dict.fromkeys(buckets, text_fingerprint(config, identities.text))
    columns = {LATENTS: latents, text_column(config.text_encoder.column): text}
    return tuple(  # type: ignore[return-value]
        Target(
            root.resolve() if isinstance(root, Path) else root,  # workers have other working folders
            column,
            {bucket: ensure_fingerprint(root, bucket, column, one) for bucket, one in fingerprints.items()},
        )
        for column, fingerprints in columns.items()
    )


def _make_latents(
    config: EncodeConfig, identities: Identities, target: Target, planned: Plan, sizes: Sizes, videos: str
) -> Progress:
    done = _committed(target.dataset, LATENTS, sizes)
    left = {shard: clips for shard, clips in sizes.items() if shard not in done}
    make_worker = partial(_latent_worker, config.vae, identities.vae, target, config.runtime.threads)
    return _make(config, target.column, left, shard_plans(planned.parts(), videos, done), make_worker)


def _make_text(config: EncodeConfig, identities: Identities, target: Target, left: Sizes) -> Progress:
    plans = (ShardPlan(Bucket.parse(bucket), number, ()) for bucket, number in left)
    reuse = {bucket: _same_encoder(target, bucket) for bucket in target.fingerprints}
    make_worker = partial(_text_worker, config.text_encoder, identities.text, target, reuse, config.runtime.threads)
    if not left and not storage.exists(null_text_path(target.dataset, target.column)):
        make_worker()  # a worker begins with the null text
    return _make(config, target.column, left, plans, make_worker)


def text_left(root: storage.Place, column: str, sizes: Sizes, outcomes: Outcomes) -> Sizes:
    """The shards that have latents and no text in a column yet, and the written clips of each."""
    done = _committed(root, column, sizes)
    return {shard: clips - len(outcomes[shard]) for shard, clips in sizes.items() if shard in outcomes.keys() - done}


def _same_encoder(target: Target, bucket: Bucket) -> list[str]:
    """The other text columns that the same text encoder made, in the same way."""
    folder = target.dataset / bucket.name
    own = read_json(folder / target.column / FINGERPRINT)
    others = [name for name in storage.list_folder(folder) if name.startswith(TEXT_PREFIX) and name != target.column]
    whole = [name for name in others if storage.exists(folder / name / FINGERPRINT)]  # a kill may leave a folder alone
    return [name for name in whole if read_json(folder / name / FINGERPRINT) | {CAPTIONS: own[CAPTIONS]} == own]


def _latent_worker(*arguments: Any) -> Worker:
    """In an actor, which alone needs PyTorch and the model's library: they take seconds to load."""
    from stages.latent_worker import LatentWorker

    return LatentWorker(*arguments)


def _text_worker(*arguments: Any) -> Worker:
    from stages.text_worker import TextWorker

    return TextWorker(*arguments)


def _committed(root: storage.Place, column: str, shards: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
    buckets = sorted({bucket for bucket, _ in shards})
    return {(bucket, number) for bucket in buckets for number in committed_numbers(root / bucket / column)}


def _make(
    config: EncodeConfig,
    column: str,
    left: Sizes,
    plans: Iterable[ShardPlan],
    make_worker: Callable[[], Worker],
) -> Progress:
    """Make the shards of a column that are not committed. ``left``: the clips of each."""
    progress = Progress(column, sum(left.values()), len(left), execute.places(config.runtime))
    made = execute.run_shards(make_worker, plans, config.runtime, config.decoder, progress.watch)
    with progress, closing(made):
        for report in made:
            progress.add(report)
            _check_failures(progress.statuses, config.max_failed_share)
    return progress


def _check_failures(statuses: Counter[str], max_failed_share: float) -> None:
    tried = statuses.total() - statuses["missing_file"]
    failed = tried - statuses[WRITTEN]
    if tried >= FAILURES_COUNT_FROM and failed > max_failed_share * tried:
        reasons = ", ".join(f"{count} {reason}" for reason, count in statuses.most_common() if reason != WRITTEN)
        raise WorkError(
            f"{failed} of {tried} clips failed ({reasons}), more than max_failed_share={max_failed_share:g}: "
            "look at the videos, or raise it; the same command goes on"
        )


def _finish(root: storage.Place, totals: Totals, made: Sequence[Progress], started: float) -> dict[str, Any]:
    """Make the index and the manifest, and tell what there is."""
    manifest = compact(root, asdict(totals))
    columns = [column for bucket in manifest.buckets.values() for column in bucket.columns.values()]
    latents = sum((progress.statuses for progress in made if progress.column == LATENTS), Counter[str]())
    summary = {
        **{name: value for name, value in asdict(totals).items() if name != "pending"},
        "samples": sum(bucket.samples for bucket in manifest.buckets.values()),
        "shards": sum(len(bucket.columns[LATENTS].shards) for bucket in manifest.buckets.values()),
        "bytes": sum(shard.tar_bytes for column in columns for shard in column.shards),
        "incomplete": incomplete_columns(root, manifest),
        "seconds": (seconds := round(time.perf_counter() - started, 1)),
        "this_run": {
            "clips": latents.total(),
            "written": latents[WRITTEN],
            "seconds": seconds,
            "columns": {progress.column: progress.summary() for progress in made},
        },
    }
    save_summary(root, summary)
    if not totals.written:
        raise WorkError(f"no clip was written: {rejects_of(totals)}; see {root / 'summary.json'}")
    return summary
