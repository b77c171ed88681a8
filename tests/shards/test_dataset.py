import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from shards.dataset import Dataset, create_dataset, write_null_text
from shards.errors import DatasetError, ShardError
from shards.manifest import Manifest
from shards.schema import LATENTS, MEAN, STD, TEXT, Bucket
from tests.running import ROOT

SIZE, LONG = "64x64x8", "64x64x16"


def test_any_row_of_any_column_reads_back(build, samples):
    dataset = Dataset.open(build({SIZE: [3, 0, 2], LONG: [2]}, std=True))
    start = 0
    for bucket, counts in ((SIZE, (3, 0, 2)), (LONG, (2,))):
        row = 0
        for count in counts:
            for column in (LATENTS, "text.t5"):
                for place, sample in enumerate(samples(count, start, column=column, std=True)):
                    found = dataset.read(Bucket.parse(bucket), row + place, column)
                    assert found.keys() == sample.members.keys()
                    assert all(np.array_equal(found[name], sample.members[name]) for name in found)
            row, start = row + count, start + count
        assert row == sum(counts) == dataset.index(bucket).num_rows
    assert start == 7


def test_what_is_open_is_what_was_asked_for(build):
    root = build({SIZE: [3, 2], LONG: [4], "128x64x8": [1]}, texts=["t5", "clip"])
    dataset = Dataset.open(root)
    assert dataset.buckets == [Bucket(64, 64, 8), Bucket(64, 64, 16), Bucket(128, 64, 8)]
    assert dataset.columns(LONG) == [LATENTS, "text.clip", "text.t5"]
    assert dataset.counts_per_shard(SIZE) == [3, 2]
    chosen = Dataset.open(str(root), buckets=[LONG, Bucket(64, 64, 8)], text="text.clip")
    assert chosen.buckets == [Bucket(64, 64, 8), Bucket(64, 64, 16)]
    assert chosen.columns(SIZE) == [LATENTS, "text.clip"]
    assert not [name for name in chosen.index(SIZE).column_names if name.startswith("text.t5")]
    assert chosen.read(SIZE, 0, "text.clip").keys() == {TEXT}
    for wrong in (lambda: chosen.index("128x64x8"), lambda: chosen.read(SIZE, 0, "text.t5")):
        with pytest.raises(DatasetError, match="has no"):
            wrong()


def test_what_is_not_there_is_named_with_what_is(tmp_path, build):
    with pytest.raises(DatasetError, match="absent does not exist: expected the output folder of an encode"):
        Dataset.open(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty has no dataset.json"):
        Dataset.open(tmp_path / "empty")
    with pytest.raises(DatasetError, match="its encode has not finished; run it again"):
        Dataset.open(create_dataset(tmp_path / "begun", "a"))
    root = build({SIZE: [1], LONG: [1]})
    with pytest.raises(DatasetError, match=f"has no bucket 1x1x1: found {LONG}, {SIZE}"):
        Dataset.open(root, buckets=["1x1x1"])
    with pytest.raises(DatasetError, match="has no column text.clip: found latents, text.t5"):
        Dataset.open(root, text="text.clip")


def test_a_newer_dataset_is_refused(build):
    root = build({SIZE: [1]})
    (root / "dataset.json").write_text(json.dumps({"schema_version": 2, "name": "tests"}))
    for use in (lambda: Dataset.open(root), lambda: create_dataset(root, "tests")):
        with pytest.raises(DatasetError, match="schema version 2, this wisesora reads version 1"):
            use()


def test_opening_reads_the_manifest_and_the_index_and_lists_nothing(build, monkeypatch):
    root = build({SIZE: [2], LONG: [1]})
    for path in root.rglob("*.parquet"):
        if path.parent.name != "index":
            path.unlink()

    def refuse(*args):
        raise AssertionError("listed")

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    assert Dataset.open(root).read(SIZE, 1, LATENTS).keys() == {MEAN}


def test_a_flipped_bit_anywhere_in_a_record_is_found(build):
    """Header, .npy header, payload and padding of both members: stock WebDataset checks none of them."""
    root = build({SIZE: [2]}, std=True)
    dataset = Dataset.open(root)
    row = dataset.index(SIZE).to_pylist()[1]
    (tar,) = (root / SIZE / LATENTS).glob("*.tar")
    whole = tar.read_bytes()
    begin, end = row["latents.offset"], row["latents.offset"] + row["latents.length"]
    assert end - begin == 2 * (512 + math.ceil((128 + 2 * 4 * 3 * 3 * 2) / 512) * 512)
    for position in range(begin, end, 7):
        with open(tar, "r+b") as file:
            file.seek(position)
            file.write(bytes([whole[position] ^ 1]))
        with pytest.raises(ShardError) as caught:
            dataset.read(SIZE, 1, LATENTS)
        assert str(tar) in str(caught.value) and row["key"] in str(caught.value)
        assert "checksum" in str(caught.value) and f"{row['latents.checksum']:016x}" in str(caught.value)
        tar.write_bytes(whole)
    assert dataset.read(SIZE, 1, LATENTS).keys() == {MEAN, STD}


def test_a_cut_tar_is_found_at_any_length(build):
    root = build({SIZE: [3]})
    dataset = Dataset.open(root)
    rows = dataset.index(SIZE).to_pylist()
    (tar,) = (root / SIZE / LATENTS).glob("*.tar")
    whole = tar.read_bytes()
    begin, length = rows[1]["latents.offset"], rows[1]["latents.length"]
    for kept in (0, 100, 512, 600, length - 1, length):  # header, payload, padding, and between two samples
        tar.write_bytes(whole[: begin + kept])
        assert dataset.read(SIZE, 0, LATENTS)
        cut = 2 if kept == length else 1
        with pytest.raises(ShardError, match=rf"{tar}: the record of {rows[cut]['key']} is cut, \d+ of {length}"):
            dataset.read(SIZE, cut, LATENTS)
    tar.unlink()
    with pytest.raises(ShardError, match=f"{tar}, which holds {rows[0]['key']}, does not exist"):
        dataset.read(SIZE, 0, LATENTS)


def test_a_tar_of_another_dataset_in_its_place_is_found(build):
    root, other = build({SIZE: [2]}, name="a"), build({LONG: [2], SIZE: [2]}, name="b")
    (tar,), (foreign,) = (list((path / SIZE / LATENTS).glob("*.tar")) for path in (root, other))
    shutil.copy(foreign, tar)
    with pytest.raises(ShardError, match="the tar is damaged"):
        Dataset.open(root).read(SIZE, 0, LATENTS)


def test_an_index_that_belongs_to_other_records_is_found(build):
    root = build({SIZE: [2]})
    (path,) = (root / "index").iterdir()
    manifest, index = Manifest.read(root / "manifest.json"), pq.read_table(path)
    swapped = index
    for field in ("offset", "checksum"):  # whole records, each under the key of the other
        swapped = put(swapped, f"latents.{field}", index[f"latents.{field}"].to_pylist()[::-1])
    longer = put(index, "latents.length", [length + 512 for length in index["latents.length"].to_pylist()])
    for table, message in ((swapped, "found a member"), (longer, "it has 1536 bytes, expected 1024")):
        pq.write_table(table, path)
        entry = replace(manifest.buckets[SIZE], index_hash=xxhash.xxh3_128_hexdigest(path.read_bytes()))
        manifest.buckets[SIZE] = entry
        (root / "manifest.json").write_bytes(manifest.to_bytes())
        with pytest.raises(ShardError, match=f"the record of {index['key'][1]} is not of this format: {message}"):
            Dataset.open(root).read(SIZE, 1, LATENTS)


def put(table: pa.Table, field: str, values: list) -> pa.Table:
    place = table.schema.get_field_index(field)
    return table.set_column(place, table.schema.field(field), pa.array(values, table.schema.field(field).type))


def test_a_damaged_or_missing_index_is_found(build):
    root = build({SIZE: [2]})
    (index,) = (root / "index").iterdir()
    whole = index.read_bytes()
    for position in range(0, len(whole), 211):
        index.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(ShardError, match=f"{index} has the hash .* the index is damaged"):
            Dataset.open(root)
    index.unlink()
    with pytest.raises(ShardError, match="does not exist"):
        Dataset.open(root)


def test_the_null_text_is_stored_once_with_its_mask(build):
    root = build({SIZE: [1]}, null_tokens=2)
    embedding, mask = Dataset.open(root).null_text("text.t5")
    assert embedding.shape == (2, 6) and embedding.dtype == np.float16 and (embedding == 0.5).all()
    assert mask.dtype == bool and mask.all() and mask.shape == (2,)
    write_null_text(root, "text.t5", np.zeros((2, 6), np.float16))  # the first one stays
    assert (Dataset.open(root).null_text("text.t5")[0] == 0.5).all()
    with pytest.raises(DatasetError, match=r"has the shape \(2, 6\), not \(1, 8\): another text encoder"):
        write_null_text(root, "text.t5", np.zeros((1, 8), np.float16))
    for wrong in (np.zeros((0, 6), np.float16), np.zeros((1, 6)), np.zeros(6, np.float16)):
        with pytest.raises(ValueError, match="expected float16"):
            write_null_text(root, "text.t5", wrong)


def test_an_absent_or_damaged_null_text_is_found(build):
    dataset = Dataset.open(build({SIZE: [1]}))
    (path,) = dataset.path.glob("null.*")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ShardError, match=f"{path} is damaged"):
        dataset.null_text("text.t5")
    path.unlink()
    with pytest.raises(DatasetError, match=f"{path} does not exist"):
        dataset.null_text("text.t5")


def test_what_all_buckets_share_is_given_once(build):
    root = build({SIZE: [1], LONG: [1]})
    assert Dataset.open(root).shared(LATENTS, "vae") == {"weights_hash": "aa", "latent_channels": 4}
    manifest = Manifest.read(root / "manifest.json")
    manifest.buckets[LONG].columns[LATENTS].fingerprint["vae"]["weights_hash"] = "cc"
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(DatasetError, match='vae of 64x64x16/latents .* weights_hash is "cc", expected "aa"'):
        Dataset.open(root).shared(LATENTS, "vae")
    assert Dataset.open(root, buckets=[LONG]).shared(LATENTS, "vae")["weights_hash"] == "cc"


def test_reading_shards_loads_no_heavy_library():
    heavy = ("torch", "ray", "webdataset", "pandas")
    script = f"import sys, shards.loader; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "[]", found.stderr
