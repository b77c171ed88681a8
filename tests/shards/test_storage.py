import os
import pickle
import sys
import threading
from pathlib import Path

import pytest
import xxhash
from fsspec.registry import _registry

from shards.errors import DatasetError
from shards.storage import (
    OpenFiles,
    create_exclusive,
    hash_of,
    list_folder,
    make_folder,
    open_read,
    place,
    read_into,
    walk,
    write_whole,
)


@pytest.mark.parametrize(
    "location", ["pipe:cat a", "pipe://cat a", "file:///a", "PIPE:x", Path("pipe:rm"), "foo://a/b", "s3:a", "s3://"]
)
def test_what_is_neither_a_path_nor_a_url_is_refused(location):
    with pytest.raises(DatasetError, match="expected the path of a local folder .* or a URL such as s3://"):
        place(location)


@pytest.mark.parametrize("location", ["simplecache::s3://b/c", "s3::pipe:ls", "s3://b/c::pipe:ls"])
def test_chained_urls_are_refused(location):
    with pytest.raises(DatasetError, match="expected the path of a local folder"):
        place(location)


@pytest.mark.parametrize("location", ["/a/b", "a/b:c", "./pipe:a", "../a", "a b", Path("/x")])
def test_local_paths_pass(location):
    assert place(location) == Path(location) and isinstance(place(location), Path)
    assert pickle.loads(pickle.dumps(place(location))) == Path(location)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.delitem(_registry, "s3", raising=False)  # it may be open in this process already
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DatasetError, match=r"s3://b/c: .*s3fs.*pip install -e '\.\[s3\]'"):
        place("s3://b/c")


def test_no_path_and_a_file_in_the_way_are_the_users_mistake(tmp_path):
    with pytest.raises(DatasetError, match="no dataset given"):
        place("")
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="file is a file"):
        make_folder(tmp_path / "file")
    with pytest.raises(DatasetError, match="is a file"):
        make_folder(tmp_path / "file" / "below")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(KeyError), write_whole(path) as file:
        file.write(b"half")
        raise KeyError
    assert list_folder(tmp_path) == []
    for content in (b"first", b"second"):
        with write_whole(path) as file:
            file.write(content)
            file.flush()
            assert path.exists() == (content == b"second")
        assert path.read_bytes() == content
    assert list_folder(tmp_path) == ["a.json"]


def test_a_name_may_depend_on_the_content(tmp_path):
    with write_whole(tmp_path / "a", final_name=lambda: f"a-{written}") as file:
        written = file.write(b"12345")
    assert list_folder(tmp_path) == ["a-5"]


def test_of_several_creators_one_wins(tmp_path):
    start = threading.Barrier(8)
    won = []

    def create(number: int) -> None:
        start.wait()
        won.append((create_exclusive(tmp_path / "a", bytes([number]) * 100_000), number))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for first, number in won if first]
    assert len(won) == 8 and len(winners) == 1
    assert (tmp_path / "a").read_bytes() == bytes(winners) * 100_000
    assert list_folder(tmp_path) == ["a"]


def test_a_walk_follows_links_and_survives_loops(tmp_path):
    for name in ("b.mp4", "a/z.mp4", "a/.hidden/y", ".x", "c/d/e"):
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_text("")
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "f").write_text("")
    (tmp_path / "top" / "a" / "loop").symlink_to(tmp_path / "top")
    (tmp_path / "top" / "linked").symlink_to(tmp_path / "aside")
    assert list(walk(tmp_path / "top")) == ["b.mp4", "a/z.mp4", "c/d/e", "linked/f"]
    with pytest.raises(DatasetError, match="no folder at .*none"):
        walk(tmp_path / "none")  # at once, not at the first name


def test_a_file_is_read_from_front_to_back(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"content")
    with open_read(str(tmp_path / "a.mp4")) as stream:
        assert stream.read() == b"content"


def test_a_buffer_is_filled_as_far_as_the_file_goes(tmp_path, monkeypatch):
    data, whole_read = bytes(range(100)), os.preadv
    (tmp_path / "a").write_bytes(data)
    for preadv in (
        whole_read,
        lambda file, buffers, offset: whole_read(file, [buffers[0][:7]], offset),
    ):  # a system's choice
        monkeypatch.setattr(os, "preadv", preadv)
        for offset, count in ((0, 30), (60, 30), (85, 15), (95, 5), (100, 0), (200, 0)):
            buffer = bytearray(30)
            assert read_into(tmp_path / "a", offset, memoryview(buffer)) == count
            assert buffer == data[offset : offset + count] + bytes(30 - count)


def test_a_file_is_hashed_whole_from_where_it_stands(tmp_path):
    data = os.urandom(5 << 19)
    (tmp_path / "a").write_bytes(data)
    with open(tmp_path / "a", "rb") as file:
        file.seek(3)
        assert hash_of(file) == xxhash.xxh3_128_hexdigest(data[3:])


def test_files_are_kept_open_up_to_a_limit(tmp_path):
    def is_open(name: str) -> bool:
        return str(tmp_path / name) in map(os.path.realpath, Path("/proc/self/fd").iterdir())

    files, buffer = OpenFiles(2), bytearray(1)
    for name in "abcab":
        (tmp_path / name).write_text(name)
    for name, opened in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")):
        assert files.read_into(tmp_path / name, 0, memoryview(buffer)) == 1 and buffer == name.encode()
        assert [name for name in "abc" if is_open(name)] == list(opened)
    with pytest.raises(FileNotFoundError):
        files.read_into(tmp_path / "none", 0, memoryview(buffer))
    del files
    assert not any(map(is_open, "abc"))
