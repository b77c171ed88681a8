import io
import re
import tarfile

import numpy as np
import pytest

from shards.errors import DatasetError
from shards.memory import empty_rows
from shards.schema import (
    LATENTS,
    MEAN,
    STD,
    TEXT,
    Bucket,
    RecordLayout,
    Sample,
    check_sample,
    decode_record,
    encode_record,
    make_key,
    record_layout,
    text_column,
)


def test_bucket_names_go_both_ways():
    assert Bucket(256, 512, 56).name == str(Bucket(256, 512, 56)) == "256x512x56"
    assert Bucket.parse("256x512x56") == Bucket(256, 512, 56)


@pytest.mark.parametrize("name", ["", "64x64", "64x64x8x1", "064x64x8", "64x64x0", "64X64x8", " 64x64x8", "plan"])
def test_other_names_are_no_buckets(name):
    with pytest.raises(DatasetError, match="HEIGHTxWIDTHxFRAMES"):
        Bucket.parse(name)


def test_keys_of_internvid_clips_of_one_second_stay_apart():
    ids = [
        f"-A.b:c{video}_00:01:02.{ms:03d}_00:01:0{end}.500" for video in range(5) for ms in range(400) for end in (4, 5)
    ]
    keys = {make_key(id, "internvid", id) for id in ids}
    assert len(keys) == len(ids) == 4000
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{18,49}", key) for key in keys)
    assert all(key.startswith("-A_b_c") for key in keys)


def test_a_key_depends_on_all_of_the_identity():
    same = make_key("clip", "dataset", "a.mp4", 0, "64x64x8")
    assert same == make_key("clip", "dataset", "a.mp4", 0, "64x64x8")
    others = [
        make_key("clip", "dataset", "a.mp4", 1, "64x64x8"),
        make_key("clip", "dataset", "a.mp4", "0", "64x64x8"),
        make_key("clip", "dataset", "a.mp40", "64x64x8"),
        make_key("clip", "dataseta.mp4", 0, "64x64x8"),
        make_key("clip:", "dataset", "a.mp4", 0, "64x64x8"),
        make_key("clip.", "dataset", "a.mp4", 0, "64x64x8"),
    ]
    assert len({same, *others}) == 7


def test_keys_stay_the_same_between_versions():
    assert make_key("vid.1_ä", "shapes", 3) == "vid_1___df2d929355a64ccf"


@pytest.mark.parametrize("prefix", ["", "..", "中文", "a" * 500, "a/../b", "a\nb"])
def test_any_text_makes_a_key(prefix):
    assert re.fullmatch(r"[A-Za-z0-9_-]{17,49}", make_key(prefix))


def test_text_columns_are_named_plainly():
    assert text_column("t5-xxl_2") == "text.t5-xxl_2"
    for name in ("", "t5.xxl", "a/b", "t5\n"):
        with pytest.raises(DatasetError, match="text column"):
            text_column(name)


def test_a_record_is_a_tar_of_npy_files_without_pickle(samples):
    (sample,) = samples(1, std=True)
    record = encode_record(sample)
    with tarfile.open(fileobj=io.BytesIO(record + bytes(1024)), mode="r:") as tar:
        members = tar.getmembers()
        arrays = [np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False) for member in members]
    assert [member.name for member in members] == [f"{sample.key}.mean.npy", f"{sample.key}.std.npy"]
    assert all((m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) == (0, 0, 0, "", "", 0o644) for m in members)
    np.testing.assert_array_equal(arrays[0], sample.members[MEAN])
    np.testing.assert_array_equal(arrays[1], sample.members[STD])
    assert arrays[0].dtype == np.float16


def test_a_record_reads_back_and_does_not_depend_on_the_order_or_layout_of_its_members(samples):
    (sample,) = samples(1, std=True)
    members = {suffix: np.asfortranarray(sample.members[suffix]) for suffix in (STD, MEAN)}
    record = encode_record(Sample(sample.key, members, sample.attributes))
    assert record == encode_record(sample)
    found = decode_record(record)
    assert found.keys() == {MEAN, STD}
    for suffix, array in found.items():
        np.testing.assert_array_equal(array, sample.members[suffix])


def test_a_payload_that_fills_its_blocks_gets_no_padding():
    text = np.arange(192, dtype=np.float16).reshape(3, 64)  # 128 bytes of .npy header and 384 of numbers
    record = encode_record(Sample("key", {TEXT: text}, {}))
    assert len(record) == 1024
    assert np.array_equal(decode_record(record)[TEXT], text)


def test_a_record_of_pickled_objects_is_refused():
    payload = io.BytesIO()
    np.save(payload, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    info = tarfile.TarInfo("key.mean.npy")
    info.size = payload.tell()
    record = info.tobuf(tarfile.USTAR_FORMAT) + payload.getvalue() + bytes(-info.size % 512)
    with pytest.raises(ValueError, match="(?i)object"):
        decode_record(record)


def test_samples_that_a_column_cannot_hold_are_refused(samples):
    (latents,), (text,) = samples(1), samples(1, column="text.t5")
    check_sample("latents", latents)
    check_sample("text.t5", text)
    mean = latents.members[MEAN]
    wrong = {
        "members": {},
        r"members \['std.npy'\]": {STD: mean},
        "holds": {MEAN: mean, "text.npy": mean},
        "object": {MEAN: mean.astype(object)},
        "float32": {MEAN: mean.astype(np.float32)},
        "4 axes": {MEAN: mean[0]},
        r"std.npy: found float16 \(1, 4, 3, 3\)": {MEAN: mean, STD: mean[:1]},
    }
    for message, members in wrong.items():
        with pytest.raises(ValueError, match=message):
            check_sample("latents", Sample(latents.key, members, latents.attributes))
    with pytest.raises(ValueError, match="attributes"):
        check_sample("latents", Sample(latents.key, latents.members, text.attributes))
    with pytest.raises(ValueError, match="9 tokens"):
        check_sample("text.t5", Sample(text.key, text.members, text.attributes | {"tokens": 9}))


@pytest.mark.parametrize(("column", "std"), [(LATENTS, False), (LATENTS, True), ("text.t5", False)])
def test_the_members_of_records_are_where_their_layout_says(samples, column, std):
    one, other = samples(2, column=column, std=std)  # of texts, which differ in length
    layouts = []
    for sample in (one, other):
        shape = next(iter(sample.members.values())).shape
        record = encode_record(sample)
        layouts.append(record_layout(column, shape, len(record)))
        assert layouts[-1].length == len(record) and layouts[-1].suffixes == tuple(sorted(sample.members))
        layouts[-1].check(sample.key, memoryview(record))
    memory = empty_rows(2, max(layout.length for layout in layouts))
    for row, sample in zip(memory, (one, other), strict=True):
        record = encode_record(sample)
        row.data[: len(record)] = record
    for number, (sample, layout) in enumerate(zip((one, other), layouts, strict=True)):
        members = layout.members(memory)
        assert members.keys() == sample.members.keys()
        for suffix, array in sample.members.items():
            assert members[suffix].shape == (2, *array.shape) and members[suffix].dtype == np.float16
            assert np.array_equal(members[suffix][number], array) and np.shares_memory(members[suffix], memory)


def test_a_record_of_something_else_is_refused(samples):
    (sample,) = samples(1)
    record = memoryview(encode_record(sample))
    record_layout(LATENTS, (2, 4, 3, 3)).check(sample.key, record)
    wrong = [
        ("other", record_layout(LATENTS, (2, 4, 3, 3))),  # another key
        (sample.key[:-1], record_layout(LATENTS, (2, 4, 3, 3))),
        (sample.key, RecordLayout(("std.npy",), (2, 4, 3, 3))),  # another member
        (sample.key, record_layout(LATENTS, (2, 4, 9, 1))),  # as many values of another shape
    ]
    for key, layout in wrong:
        with pytest.raises(ValueError, match="expected .* of this shape"):
            layout.check(key, record)
