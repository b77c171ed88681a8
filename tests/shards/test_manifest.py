import json
import os
import shutil

import pyarrow.parquet as pq
import pytest

from shards.dataset import Dataset, compact, create_dataset, ensure_fingerprint, require_equal
from shards.errors import DatasetError, ShardError
from shards.schema import LATENTS, Reject, index_schema
from shards.writer import commit_path, write_shard

SIZE, LONG = "64x64x8", "64x64x16"


def test_a_dataset_is_created_once_and_keeps_its_name(tmp_path):
    root = create_dataset(tmp_path / "deep" / "a", "shapes")
    assert root == create_dataset(root, "shapes") and (root / "dataset.json").exists()
    with pytest.raises(DatasetError, match="holds dataset 'shapes', not 'other'"):
        create_dataset(root, "other")


@pytest.mark.parametrize("path", ["pipe:ls", "pipe://ls", ""])
def test_odd_urls_are_refused_everywhere(path):
    for use in (
        lambda: create_dataset(path, "a"),
        lambda: ensure_fingerprint(path, SIZE, LATENTS, {}),
        lambda: compact(path, {}),
        lambda: Dataset.open(path),
    ):
        with pytest.raises(DatasetError, match="expected the path of"):
            use()


def test_a_fingerprint_is_recorded_once_whatever_its_order(tmp_path):
    first = ensure_fingerprint(tmp_path, SIZE, LATENTS, {"vae": {"a": 1, "b": [1, 2]}, "fps": 8})
    assert first == ensure_fingerprint(tmp_path, SIZE, LATENTS, {"fps": 8, "vae": {"b": (1, 2), "a": 1}})
    assert first != ensure_fingerprint(tmp_path, LONG, LATENTS, {"fps": 9})


def test_other_settings_are_refused_with_each_difference(tmp_path):
    recorded = {
        "vae": {"weights_hash": "aa", "factor": 8, "same": 1},
        "fps": 8,
        "sizes": [16, 32],
        "old": {"x": None},
    }
    ensure_fingerprint(tmp_path, SIZE, LATENTS, recorded)
    changed = {"vae": {"weights_hash": "bb", "factor": 8, "same": 1}, "fps": 8.5, "sizes": [16], "new": True}
    with pytest.raises(DatasetError) as caught:
        ensure_fingerprint(tmp_path, SIZE, LATENTS, changed)
    for words in (
        f"{tmp_path / SIZE / LATENTS} was encoded with other settings",
        'vae.weights_hash is "aa", expected "bb"',
        "fps is 8, expected 8.5",
        "sizes is [16, 32], expected [16]",
        "old.x is null, expected absent",
        "new is absent, expected true",
    ):
        assert words in str(caught.value)
    assert "factor" not in str(caught.value) and "same" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ensure_fingerprint(tmp_path, SIZE, LATENTS, recorded)  # nothing was overwritten


def test_parts_of_fingerprints_compare_the_same_way():
    require_equal({"hash": "a"}, {"hash": "a"}, "VAE", "take the other")
    with pytest.raises(DatasetError, match='^VAE: hash is "a", expected "b". To go on, take the other$'):
        require_equal({"hash": "a"}, {"hash": "b"}, "VAE", "take the other")


def test_the_manifest_counts_everything(build):
    root = build({SIZE: [3, 0, 2], LONG: [4]}, rejects=[Reject("z1", "timeout", ""), Reject("z2", "timeout", "")])
    manifest = Dataset.open(root).manifest
    assert (manifest.name, manifest.schema_version, manifest.totals) == (
        "tests",
        1,
        {"clips": 11, "written": 9},
    )
    assert manifest.buckets[SIZE].statuses == {"timeout": 2, "written": 5}
    assert manifest.buckets[LONG].samples == 4
    shards = manifest.buckets[SIZE].columns[LATENTS].shards
    assert [(shard.number, shard.samples) for shard in shards] == [(0, 3), (1, 0), (2, 2)]
    for shard in shards:
        assert os.path.getsize(root / SIZE / LATENTS / shard.tar) == shard.tar_bytes


def test_the_index_holds_the_written_rows_alone_in_order(build, samples):
    root = build({SIZE: [3, 2]}, rejects=[Reject("a", "timeout", "slow"), Reject("zz", "too_short", "")])
    dataset = Dataset.open(root)
    index = dataset.index(SIZE)
    assert index.schema.equals(index_schema([LATENTS, "text.t5"]))
    expected = samples(3) + samples(2, start=3)
    assert index["key"].to_pylist() == [sample.key for sample in expected]
    assert index["shard"].to_pylist() == [0, 0, 0, 1, 1]
    assert index["caption"].to_pylist() == [sample.attributes["caption"] for sample in expected]
    assert index["text.t5.shape"].to_pylist() == [[count, 6] for count in index["text.t5.tokens"].to_pylist()]


def test_equal_commits_give_equal_files(build):
    first, second = build({SIZE: [3, 2], LONG: [1]}, name="a"), build({SIZE: [3, 2], LONG: [1]}, name="b")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    shards, columns = 3, 2
    assert len(files) == 3 + 2 + 2 * columns + shards * columns * 2  # null text and header, indexes, columns
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in files)


def test_a_dataset_grows_and_the_old_view_stays_whole(build, samples):
    root = build({SIZE: [3]})
    before = Dataset.open(root)
    for column in before.columns(SIZE):
        fingerprint_hash = ensure_fingerprint(root, SIZE, column, before.fingerprint(SIZE, column))
        write_shard(root / SIZE / column, 1, samples(2, 3, column=column), fingerprint_hash=fingerprint_hash)
    assert Dataset.open(root).index(SIZE).num_rows == 3  # not compacted yet
    compact(root, {})
    assert Dataset.open(root).index(SIZE).num_rows == 5
    assert before.read(SIZE, 2, LATENTS).keys() == {"mean.npy"}


def test_a_text_column_counts_once_every_latent_shard_has_it(build, samples):
    root = build({SIZE: [3, 2]}, texts=["t5", "new"])
    os.unlink(commit_path(root / SIZE / "text.new", 1))
    compact(root, {})
    assert Dataset.open(root).columns(SIZE) == [LATENTS, "text.t5"]
    with pytest.raises(DatasetError, match=f"{root}: text.new lacks 1 shard and cannot be used until encode --columns"):
        Dataset.open(root, text=["text.t5", "text.new"])
    os.unlink(commit_path(root / SIZE / "text.t5", 0))
    with pytest.raises(DatasetError, match=r"no complete text column: .*'text.t5': 1.* of 2 shards"):
        compact(root, {})
    assert Dataset.open(root).columns(SIZE) == [LATENTS, "text.t5"]  # the last manifest stands


def test_a_text_column_that_a_bucket_lacks_altogether_is_incomplete(build):
    root = build({SIZE: [3, 2], LONG: [1, 1]}, texts=["t5", "new"])
    shutil.rmtree(root / LONG / "text.new")
    compact(root, {})
    with pytest.raises(DatasetError, match="text.new lacks 2 shards"):
        Dataset.open(root, text="text.new")
    assert Dataset.open(root, buckets=[SIZE], text="text.new").columns(SIZE) == [LATENTS, "text.new"]


def test_columns_that_disagree_are_refused(build, samples):
    root = build({SIZE: [3]})
    folder = root / SIZE / "text.t5"
    fingerprint_hash = ensure_fingerprint(root, SIZE, "text.t5", Dataset.open(root).fingerprint(SIZE, "text.t5"))
    os.unlink(commit_path(folder, 0))
    write_shard(folder, 0, samples(3, 1, column="text.t5"), fingerprint_hash=fingerprint_hash)
    with pytest.raises(DatasetError, match="3 samples in latents and 3 in text.t5, not the same keys"):
        compact(root, {})


def test_a_shard_of_another_fingerprint_is_refused(build, samples):
    root = build({SIZE: [3]})
    (root / SIZE / LATENTS / "fingerprint.json").write_text('{"fps": 9}')
    with pytest.raises(DatasetError, match="000000.parquet has fingerprint"):
        compact(root, {})


def test_nothing_to_compact(tmp_path, build):
    with pytest.raises(DatasetError, match="does not exist"):
        compact(tmp_path / "none", {})
    with pytest.raises(DatasetError, match="no committed shard"):
        compact(create_dataset(tmp_path / "a", "a"), {})
    root = build({SIZE: [1]})
    shutil.move(root / SIZE, root / "plan")
    with pytest.raises(DatasetError, match="'plan' is not a bucket"):
        compact(root, {})


def test_a_bucket_of_rejects_alone_is_counted(build, samples):
    root = build({SIZE: [0], LONG: [2]}, rejects=[Reject("a", "timeout", "")])
    dataset = Dataset.open(root)
    assert dataset.index(SIZE).num_rows == 0 and dataset.counts_per_shard(SIZE) == [0]
    assert dataset.manifest.buckets[SIZE].statuses["timeout"] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda found: found | {"schema_version": 2},
            DatasetError,
            "schema version 2, this wisesora reads version 1",
        ),
        (lambda found: {"schema_version": 1}, ShardError, "is not a manifest"),
        (lambda found: [found], ShardError, "holds a list"),
        (lambda found: found | {"buckets": {SIZE: {}}}, ShardError, "is not a manifest"),
        (lambda found: found | {"extra": 1}, ShardError, "is not a manifest"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(build, change, error, message):
    root = build({SIZE: [1]})
    path = root / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(error, match=message):
        Dataset.open(root)


@pytest.mark.parametrize("name", ["pipe:ls", "../a.tar", "/etc/passwd", "000000-0123456.tar", "000000-01234567.tar\n"])
def test_a_manifest_cannot_name_files_elsewhere(build, name):
    root = build({SIZE: [1]})
    found = json.loads((root / "manifest.json").read_text())
    found["buckets"][SIZE]["columns"][LATENTS]["shards"][0]["tar"] = name
    (root / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(ShardError, match="expected NUMBER-HASH.tar"):
        Dataset.open(root)


def test_commits_hold_no_time(build):
    root = build({SIZE: [1]})
    metadata = pq.read_metadata(commit_path(root / SIZE / LATENTS, 0)).metadata[b"wisesora"]
    assert json.loads(metadata).keys() == {
        "schema_version",
        "fingerprint_hash",
        "tar",
        "tar_bytes",
        "tar_hash",
        "latent_rgb",
    }
