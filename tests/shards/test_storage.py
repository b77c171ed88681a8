import threading
from pathlib import Path

import pytest

from shards.errors import DatasetError
from shards.storage import create_exclusive, list_folder, local_path, make_folder, read_range, write_whole


@pytest.mark.parametrize("location", ["pipe:cat a", "s3://b/c", "file:///a", "http://a/b", "PIPE:x", Path("pipe:rm")])
def test_what_is_no_local_path_is_refused(location):
    with pytest.raises(DatasetError, match="expected the path of a local folder"):
        local_path(location)


@pytest.mark.parametrize("location", ["/a/b", "a/b:c", "./pipe:a", "../a", "a b", Path("/x")])
def test_local_paths_pass(location):
    assert local_path(location) == Path(location)


def test_no_path_and_a_file_in_the_way_are_the_users_mistake(tmp_path):
    with pytest.raises(DatasetError, match="no dataset given"):
        local_path("")
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


def test_a_range_ends_where_the_file_does(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    assert read_range(tmp_path / "a", 10, 5) == bytes(range(10, 15))
    assert read_range(tmp_path / "a", 95, 10) == bytes(range(95, 100))
    assert read_range(tmp_path / "a", 200, 10) == b""
