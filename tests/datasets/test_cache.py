import os
from pathlib import Path

import numpy as np
import pytest

from sfl_jax.datasets import cache
from sfl_jax.datasets.cache import contents

ARRAYS = {"images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "classes": np.array(3)}


def read_cache(dataset, mapped=(), variant=""):
    return cache.read_cache(dataset, contents(dataset), mapped, variant)


def write_cache(dataset, arrays, variant=""):
    cache.write_cache(dataset, contents(dataset), arrays, variant)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A dataset directory, and the directory where its cache goes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dataset = tmp_path / "data" / "set" / "1.0.0"
    dataset.mkdir(parents=True)
    (dataset / "records").write_bytes(b"12345")
    return dataset, tmp_path / "cache" / "sfl_jax" / "datasets"


def read_equal(dataset, mapped=()):
    arrays = read_cache(dataset, mapped)
    assert arrays is not None
    assert arrays.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], values, strict=True)


def test_reads_what_was_written(place):
    dataset, cache = place
    assert read_cache(dataset) is None
    write_cache(dataset, ARRAYS)
    read_equal(dataset)
    read_equal(dataset, ["images"])
    assert len(os.listdir(cache)) == 1


def rewritten(dataset):
    """Writes other bytes with the same length and time, as packagers with reproducible builds do."""
    before = (dataset / "records").stat().st_mtime_ns
    (dataset / "records").write_bytes(b"12435")
    os.utime(dataset / "records", ns=(before, before))


@pytest.mark.parametrize(
    "change",
    [
        rewritten,
        lambda dataset: (dataset / "records").write_bytes(b"1234"),
        lambda dataset: (dataset / "more").write_bytes(b""),
        lambda dataset: (dataset / "records").rename(dataset / "other"),
    ],
)
def test_a_changed_dataset_is_decoded_again_and_replaces_its_cache(place, change):
    dataset, cache = place
    write_cache(dataset, ARRAYS)
    change(dataset)
    assert read_cache(dataset) is None
    write_cache(dataset, ARRAYS)
    read_equal(dataset)
    assert len(os.listdir(cache)) == 1


def test_the_time_of_a_file_says_nothing(place):
    dataset, _ = place
    write_cache(dataset, ARRAYS)
    os.utime(dataset / "records", ns=(0, 1))
    read_equal(dataset)


def test_contents_are_those_of_every_file_by_name(place):
    """Also if the bytes of all files together are the same."""
    dataset, _ = place
    known = {contents(dataset)}
    for a, b in ((b"12", b"345"), (b"123", b"45"), (b"45", b"123"), (b"", b"12345")):
        (dataset / "records").write_bytes(a)
        (dataset / "second").write_bytes(b)
        known.add(contents(dataset))
    assert len(known) == 5
    (dataset / "directory").mkdir()
    assert contents(dataset) in known


def test_each_way_to_read_a_dataset_keeps_its_own(place):
    dataset, cache = place
    write_cache(dataset, ARRAYS)
    write_cache(dataset, {"images": ARRAYS["images"] + 1}, "coarse_label")
    read_equal(dataset)
    assert read_cache(dataset, (), "label") is None
    kept = read_cache(dataset, (), "coarse_label")
    assert kept is not None
    np.testing.assert_array_equal(kept["images"], ARRAYS["images"] + 1)
    assert len(os.listdir(cache)) == 2


def test_datasets_do_not_share_a_cache(place, tmp_path):
    dataset, _ = place
    write_cache(dataset, ARRAYS)
    twin = tmp_path / "elsewhere" / "set" / "1.0.0"
    twin.mkdir(parents=True)
    (twin / "records").write_bytes(b"12345")
    assert read_cache(twin) is None


def test_damage_does_not_go_unnoticed(place):
    dataset, cache = place
    write_cache(dataset, ARRAYS)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    for i in range(0, len(good), 3):
        file.write_bytes(good[:i] + bytes([good[i] ^ 4]) + good[i + 1 :])
        if read_cache(dataset) is not None:  # a byte that does not matter, such as a date in the archive
            read_equal(dataset)
    for length in range(0, len(good), 31):
        file.write_bytes(good[:length])
        assert read_cache(dataset) is None
    file.write_bytes(good)
    read_equal(dataset)


def test_pickles_are_not_opened(place, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "bang"),))

    dataset, _ = place
    write_cache(dataset, ARRAYS | {"bomb": np.array([Bomb()], dtype=object)})
    assert read_cache(dataset) is None
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize("home", ["file", "file/below"])
def test_without_a_place_for_it_nothing_is_kept_and_nothing_fails(place, tmp_path, monkeypatch, home):
    dataset, _ = place
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
    write_cache(dataset, ARRAYS)
    assert read_cache(dataset) is None


def test_without_a_home_nothing_is_kept_and_nothing_fails(place, monkeypatch):
    """For a user without an entry in /etc/passwd, as in containers of some clusters."""
    dataset, _ = place
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(RuntimeError, match="home directory"):
        Path.home()
    write_cache(dataset, ARRAYS)
    assert read_cache(dataset) is None


def test_a_relative_cache_home_is_no_home(place, tmp_path, monkeypatch):
    dataset, _ = place
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_cache(dataset, ARRAYS)
    assert (tmp_path / "home" / ".cache" / "sfl_jax").is_dir()
    assert not (tmp_path / "relative").exists()
