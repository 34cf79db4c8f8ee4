import io
import json
import os
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sfl_jax.datasets import Dataset, load, loading
from sfl_jax.datasets.cache import contents, write_cache
from sfl_jax.datasets.loading import _EMBEDDED
from sfl_jax.errors import BadInput

tfds.disable_progress_bar()


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Tiny(tfds.core.GeneratorBasedBuilder):
    """A small set that TFDS writes as `tfds build` does."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing about it is registered

    def __init__(self, *, features, splits, **kwargs):
        self._features, self._splits = features, splits
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self._features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(examples) for split, examples in self._splits.items()}

    def _generate_examples(self, examples):
        yield from enumerate(examples)


def encoded(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, kind)
    return io.BytesIO(file.getvalue())


def pictures(count, shape=(5, 4, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def examples(images, labels=None, kind="PNG"):
    labels = [i % 3 for i in range(len(images))] if labels is None else labels
    return [{"image": encoded(a, kind), "label": b} for a, b in zip(images, labels, strict=True)]


def prepare(root, splits, *, shape=(None, None, 3), config=None, **more):
    features = {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(num_classes=3)}
    if config:
        more["config"] = tfds.core.BuilderConfig(name=config, version="1.0.0")
    builder = Tiny(features=features | more.pop("features", {}), splits=splits, data_dir=root, **more)
    builder.download_and_prepare()
    return Path(builder.data_path)


def as_multiset(images, labels):
    """TFDS shuffles what it writes."""
    return sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))


def check_equal(dataset, train, test):
    for got, labels, images in (
        (dataset.train_images, dataset.train_labels, train),
        (dataset.test_images, dataset.test_labels, test),
    ):
        assert (got.dtype, labels.dtype) == (np.uint8, np.int32)
        assert got.shape == images.shape
        assert as_multiset(got, labels) == as_multiset(images, np.arange(len(images)) % 3)


@pytest.fixture(scope="module")
def mnist_twice():
    """MNIST decoded (unless another test has done so), and MNIST from the cache."""
    return load("mnist"), load("mnist")


def test_embedded_mnist_is_the_whole_of_mnist(mnist_twice):
    dataset, again = mnist_twice
    assert dataset.train_images.shape == (60000, 28, 28, 1)
    assert dataset.test_images.shape == (10000, 28, 28, 1)
    assert (dataset.num_classes, dataset.name) == (10, "mnist")
    # LeCun's counts by class, and the usual mean and standard deviation of MNIST.
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(dataset.train_labels).tolist() == train
    assert np.bincount(dataset.test_labels).tolist() == test
    values, counts = (
        np.arange(256) / 255,
        np.bincount(dataset.train_images.ravel(), minlength=256) / 47_040_000,
    )
    assert values @ counts == pytest.approx(0.1307, abs=5e-5)
    assert np.sqrt(values**2 @ counts - (values @ counts) ** 2) == pytest.approx(0.3081, abs=5e-5)
    for name, value in vars(dataset).items():
        np.testing.assert_array_equal(getattr(again, name), value, strict=True)


def test_images_are_those_that_tfds_decodes(mnist_twice):
    builder: Any = tfds.builder_from_directory(_EMBEDDED)
    source = builder.as_data_source("test")
    for dataset in mnist_twice:
        for i in (0, 1, 4095, 4096, 9999):  # both sides of a chunk's edge
            np.testing.assert_array_equal(dataset.test_images[i], source[i]["image"])
            assert dataset.test_labels[i] == source[i]["label"]


def test_the_cache_is_used_and_believed_only_where_it_fits(tmp_path, cache_home):
    images = pictures(4)
    directory = prepare(tmp_path, {"train": examples(images), "test": examples(images)})
    kept = {
        "train_images": images[:, ::-1],
        "train_labels": np.arange(4, dtype=np.int32) % 3,
        "test_images": images,
        "test_labels": np.arange(4, dtype=np.int32) % 3,
        "num_classes": np.array(3),
        "digest": np.zeros(32, np.uint8),
        "train_checksums": np.zeros(4, np.uint32),
        "notes": np.zeros(0, np.uint8),
    }
    key = contents(directory)
    write_cache(directory, key, kept)
    check_equal(load("tiny", tmp_path), images[:, ::-1], images)
    for name, value in (
        ("train_images", images.astype(np.float32)),
        ("train_images", images[0]),
        ("train_labels", np.zeros(3, np.int32)),
        ("test_labels", np.zeros(4, np.int64)),
        ("num_classes", np.zeros(1, int)),
        ("train_checksums", np.zeros(3, np.uint32)),
        ("train_labels", np.full(4, 3, np.int32)),
        ("more", images),
    ):
        write_cache(directory, key, kept | {name: value})
        check_equal(load("tiny", tmp_path), images, images)


def dated(directory):
    """Gives all files one time, as packagers with reproducible builds do."""
    for file in directory.iterdir():
        os.utime(file, (1, 1))


def test_other_labels_of_the_same_size_and_time_are_not_taken_for_those_kept(tmp_path):
    images, digests = pictures(6), []
    for shift in (0, 1):
        labels = [(i + shift) % 3 for i in range(6)]
        shutil.rmtree(tmp_path / "tiny", ignore_errors=True)
        splits = {split: examples(images, labels) for split in ("train", "test")}
        dated(prepare(tmp_path, splits))
        for dataset in (load("tiny", tmp_path), load("tiny", tmp_path, in_file=True)):
            found = as_multiset(dataset.train_images[:], dataset.train_labels)
            assert found == as_multiset(images, labels)
            digests.append(dataset.digest)
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_what_is_replaced_while_it_is_decoded_is_not_kept_as_its_successor(tmp_path, monkeypatch):
    images, others = pictures(3), pictures(3, seed=1)
    prepare(tmp_path, {"train": examples(images), "test": examples(images)})
    decode = loading.decode

    def replaced_meanwhile(*given):
        decoded = decode(*given)
        shutil.rmtree(tmp_path / "tiny")
        prepare(tmp_path, {"train": examples(others), "test": examples(others)})
        return decoded

    monkeypatch.setattr(loading, "decode", replaced_meanwhile)
    check_equal(load("tiny", tmp_path), images, images)
    monkeypatch.setattr(loading, "decode", decode)
    check_equal(load("tiny", tmp_path), others, others)


def test_in_a_file_images_are_read_one_by_one(tmp_path, cache_home):
    images, others = pictures(6), pictures(6, seed=1)
    directory = prepare(tmp_path, {"train": examples(images), "test": examples(others)})
    fresh = load("tiny", tmp_path, in_file=True)
    again, in_memory = load("tiny", tmp_path, in_file=True), load("tiny", tmp_path)
    assert isinstance(again.train_images, np.memmap)
    assert not isinstance(in_memory.train_images, np.memmap)
    for dataset in (fresh, again):
        check_equal(dataset, images, others)
        np.testing.assert_array_equal(dataset.train_images[:], in_memory.train_images)
        np.testing.assert_array_equal(dataset.train_images[[4, 1, 4]], in_memory.train_images[[4, 1, 4]])
        assert type(dataset.train_images[2:4]) is np.ndarray
        assert dataset.digest == in_memory.digest
    # A byte of row 3 changes on the disk: only reading that row raises.
    (file,) = (cache_home / "sfl_jax" / "datasets").iterdir()
    content = bytearray(file.read_bytes())
    content[content.index(again.train_images[3:4].tobytes()) + 7] ^= 1
    file.write_bytes(content)
    damaged = load("tiny", tmp_path, in_file=True).train_images
    np.testing.assert_array_equal(damaged[[0, 5]], in_memory.train_images[[0, 5]])
    for rows in (slice(2, 4), np.array([3]), 3):
        with pytest.raises(BadInput, match=f"^{file}: the dataset in this file is damaged; remove the file$"):
            damaged[rows]
    # Reading the whole file notices it at once and writes a new one.
    check_equal(load("tiny", tmp_path), images, others)
    assert load("tiny", tmp_path, in_file=True).digest == in_memory.digest
    assert directory.exists()


def test_where_nothing_can_be_kept_images_are_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    images = pictures(3)
    prepare(tmp_path, {"train": examples(images), "test": examples(images)})
    dataset = load("tiny", tmp_path, in_file=True)
    check_equal(dataset, images, images)
    assert not isinstance(dataset.train_images, np.memmap)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_reads_what_tfds_prepared(tmp_path, channels):
    train, test = pictures(7, (5, 4, channels)), pictures(3, (5, 4, channels), seed=1)
    prepare(tmp_path, {"train": examples(train), "test": examples(test)}, shape=(None, None, channels))
    dataset = load("tiny", tmp_path)
    check_equal(dataset, train, test)
    assert (dataset.num_classes, dataset.name) == (3, "tiny")
    with pytest.raises(AssertionError):
        check_equal(dataset, train[:, ::-1], test)


def test_other_features_do_not_matter_and_validation_stands_in_for_test(tmp_path):
    train, test = pictures(6), pictures(4, seed=1)
    splits = {"train": examples(train), "validation": examples(test)}
    for split in splits.values():
        for i, example in enumerate(split):
            example["id"] = f"image {i}"
    prepare(tmp_path, splits, features={"id": tfds.features.Text()})
    check_equal(load("tiny", tmp_path), train, test)


def test_large_jpegs_are_decoded_in_threads_in_order(tmp_path):
    smooth = np.linspace(0, 255, 200 * 200 * 3).reshape(200, 200, 3)
    images = np.stack([np.roll(smooth, 9000 * i).astype(np.uint8) for i in range(9)])
    noise = pictures(9, (200, 200, 3)) // 8
    images = np.minimum(images, 220) + noise
    prepare(tmp_path, {"train": examples(images, kind="JPEG"), "test": examples(images[:3], kind="JPEG")})
    builder: Any = tfds.builder_from_directory(tmp_path / "tiny" / "1.0.0")
    source = builder.as_data_source("train")
    dataset = load("tiny", tmp_path)
    for i in range(9):
        np.testing.assert_array_equal(dataset.train_images[i], source[i]["image"])


def test_grey_images_of_a_colour_set_get_three_equal_channels(tmp_path):
    grey = pictures(3, (5, 4, 1))
    prepare(tmp_path, {"train": examples(grey), "test": examples(grey)})
    check_equal(load("tiny", tmp_path), np.repeat(grey, 3, axis=3), np.repeat(grey, 3, axis=3))


def test_pictures_of_16_bits_keep_their_range(tmp_path):
    grey = np.random.default_rng(0).integers(0, 2**16, (3, 5, 4), np.uint16)
    prepare(tmp_path, {"train": examples(grey), "test": examples(grey)}, shape=(None, None, 1))
    high = (grey >> 8).astype(np.uint8)[..., None]
    check_equal(load("tiny", tmp_path), high, high)


def test_without_a_shape_channels_are_those_of_the_pictures(tmp_path):
    grey, colour = pictures(3, (5, 4, 1)), pictures(3)
    unsaid = {"shape": (None, None, None)}
    prepare(tmp_path / "a", {"train": examples(grey), "test": examples(grey)}, **unsaid)
    check_equal(load("tiny", tmp_path / "a"), grey, grey)
    prepare(tmp_path / "b", {"train": examples(grey), "test": examples(colour)}, **unsaid)
    with pytest.raises(BadInput, match=r"images of \(5, 4, 1\) and \(5, 4, 3\)"):
        load("tiny", tmp_path / "b")


def test_pictures_of_floats_are_refused_by_name(tmp_path):
    floats = np.ones((2, 5, 4), np.float32)
    splits = {split: examples(floats, kind="TIFF") for split in ("train", "test")}
    prepare(tmp_path, splits, shape=(None, None, 1))
    with pytest.raises(BadInput, match=r"tiny/1\.0\.0: split train has pictures of mode F; store them with"):
        load("tiny", tmp_path)


def several_labels(images, **keys):
    """Examples with a class label for each of `keys`, shifted by its value."""
    return [
        {"image": encoded(image), **{key: (i + shift) % 3 for key, shift in keys.items()}}
        for i, image in enumerate(images)
    ]


def prepare_labels(root, images, **keys):
    splits = {split: several_labels(images, **keys) for split in ("train", "test")}
    features = {key: tfds.features.ClassLabel(num_classes=3) for key in keys}
    for example in (example for split in splits.values() for example in split):
        example.setdefault("label", 0)
    without = {} if "label" in keys else {"label": tfds.features.Scalar(np.int64)}
    return prepare(root, splits, features=features | without)


def test_one_of_several_class_labels_is_learnt(tmp_path):
    images = pictures(4)
    prepare_labels(tmp_path, images, label=0, coarse_label=1)
    for _ in range(2):  # the second time from the cache
        fine, coarse = load("tiny", tmp_path), load("tiny", tmp_path, label_key="coarse_label")
        check_equal(fine, images, images)
        assert as_multiset(coarse.train_images, coarse.train_labels) == as_multiset(images, [1, 2, 0, 1])
        assert fine.notes == ("labels: label, of coarse_label, label (label_key)",)
        assert coarse.notes == ("labels: coarse_label, of coarse_label, label (label_key)",)
        assert fine.digest != coarse.digest
    with pytest.raises(
        BadInput, match=r"^label_key=fine: must be one of coarse_label, label, the class labels"
    ):
        load("tiny", tmp_path, label_key="fine")


def test_several_class_labels_none_of_which_is_called_so_must_be_chosen_from(tmp_path):
    images = pictures(4)
    prepare_labels(tmp_path, images, shape=0, colour=1)
    with pytest.raises(BadInput, match=r"has the class labels colour, shape; choose one with label_key$"):
        load("tiny", tmp_path)
    check_equal(load("tiny", tmp_path, label_key="shape"), images, images)


def test_where_labels_for_testing_are_hidden_validation_is_taken(tmp_path):
    images, others = pictures(4), pictures(3, seed=1)
    hidden = examples(images, [-1] * 4)
    prepare(tmp_path / "a", {"train": examples(images), "validation": examples(others), "test": hidden})
    for _ in range(2):
        dataset = load("tiny", tmp_path / "a")
        check_equal(dataset, images, others)
        assert dataset.notes == ("labels of split test are hidden; tests use validation",)


def test_a_class_that_there_is_not_is_no_reason_to_look_elsewhere(tmp_path):
    images = pictures(2)
    labels = {"train": [0, 1], "test": [0, 2], "validation": [0, 1]}
    directory = prepare(tmp_path, {split: examples(images, own) for split, own in labels.items()})
    three, two = b'"numClasses": "3"', b'"numClasses": "2"'
    rewrite(directory / "features.json", lambda data: data.replace(three, two))
    with pytest.raises(BadInput, match=r"split test has labels outside 0\.\.1; every image needs one"):
        load("tiny", tmp_path)
    shutil.rmtree(tmp_path / "tiny")
    prepare(tmp_path, {split: examples(images, [0, -1]) for split in ("train", "validation")})
    with pytest.raises(BadInput, match=r"split train has labels outside 0\.\.2; every image needs one"):
        load("tiny", tmp_path)


def missing(name):
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def raising(error, cause=None):
    def fail(*_, **__):
        raise error from cause

    return fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (missing("tensorflow"), "reading it needs the module tensorflow: pip install tensorflow"),
        (missing("PIL.Image"), "reading it needs the module PIL: pip install pillow"),
        (
            ImportError("libfoo.so: no such file"),
            r"a module that reads it does not load \(libfoo.so: no",
        ),
        (PermissionError(13, "Permission denied", "/x"), r"cannot be read \(\[Errno 13\] Permission denied"),
        (OSError(24, "Too many open files"), r"cannot be read \(\[Errno 24\] Too many open files"),
        (OSError("image file is truncated"), "is damaged"),
        (ValueError("nonsense"), "is damaged"),
    ],
)
def test_what_is_missing_here_is_not_laid_to_the_data(tmp_path, monkeypatch, error, words):
    prepare(tmp_path, {"train": examples(pictures(2)), "test": examples(pictures(2))})
    core: Any = tfds.core
    builder = core.read_only_builder.ReadOnlyBuilder
    causes = (
        [(error, None)] if isinstance(error, OSError) else [(error, None), (RuntimeError("in TFDS"), error)]
    )
    for where in ((tfds, "builder_from_directory"), (builder, "as_data_source")):
        for raised, cause in causes:
            with monkeypatch.context() as patch:
                patch.setattr(*where, raising(raised, cause))
                with pytest.raises(BadInput, match=f"{tmp_path}/tiny/1.0.0.* {words}") as caught:
                    load("tiny", tmp_path)
            assert ("download_and_prepare" in str(caught.value)) == ("damaged" in words)
    check_equal(load("tiny", tmp_path), pictures(2), pictures(2))


def test_without_tfds_the_package_is_named_and_too_little_memory_is_nothing_else(tmp_path, monkeypatch):
    prepare(tmp_path, {"train": examples(pictures(2)), "test": examples(pictures(2))})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow_datasets", None)
        with pytest.raises(BadInput, match=r"module tensorflow_datasets: pip install tensorflow-datasets$"):
            load("tiny", tmp_path)
    monkeypatch.setattr(tfds, "builder_from_directory", raising(MemoryError()))
    with pytest.raises(MemoryError):
        load("tiny", tmp_path)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    """These tests may run as root, which may read everything."""
    directory = prepare(tmp_path, {"train": examples(pictures(2)), "test": examples(pictures(2))})

    def denied(what, real):
        def attempt(path, *more, **named):
            if Path(path) == what:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *more, **named)

        return attempt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied(directory / TRAIN, Path.open))
        with pytest.raises(BadInput) as caught:
            load("tiny", tmp_path)
    assert str(caught.value) == f"dataset=tiny: {directory / TRAIN} cannot be read (Permission denied)"
    for place in (tmp_path, tmp_path / "tiny"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "glob", lambda *_: [])  # glob skips what it may not read
            patch.setattr(os, "listdir", denied(place, os.listdir))
            with pytest.raises(BadInput) as caught:
                load("tiny", tmp_path)
        assert str(caught.value) == f"dataset=tiny: {place} cannot be read (Permission denied)"


def test_without_a_home_directory_the_flag_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for data_dir in (None, "~/sets"):
        with pytest.raises(BadInput, match=r"^dataset=tiny: no home directory here; set data_dir"):
            load("tiny", data_dir)
    prepare(tmp_path, {"train": examples(pictures(2)), "test": examples(pictures(2))})
    check_equal(load("tiny", tmp_path), pictures(2), pictures(2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"train_images": np.ones((3, 2, 2, 1), np.float32)},
            "images of float32 and uint8; must be",
        ),
        (
            {"test_images": np.ones((3, 2, 2, 1), np.int64)},
            r"test: images of int64 \(3, 2, 2, 1\); must be uint8",
        ),
        ({"train_images": np.ones(3, np.uint8)}, r"train: images of shape \(3,\); must be \(N, ...\)"),
        ({"test_images": np.ones((3, 4, 2, 1), np.uint8)}, r"images of \(2, 2, 1\) and \(4, 2, 1\)"),
        (
            {"train_labels": np.arange(2)},
            r"train: labels of int64 \(2,\); must be integers, one for",
        ),
        ({"test_labels": np.ones(3)}, "test: labels of float64"),
        ({"test_labels": np.arange(3) - 1}, "test: labels -1 to 1; must be 0 to 2"),
        ({"train_labels": np.arange(3) + 1}, "train: labels 1 to 3; must be 0 to 2"),
        ({"train_images": np.ones((0, 2, 2, 1), np.uint8), "train_labels": np.arange(0)}, "N at least 1"),
    ],
)
def test_arrays_that_are_no_dataset_are_refused(changes, words):
    """Also without the type checks that tests switch on."""
    images, labels = np.ones((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32)
    good = vars(Dataset(images, labels, images, labels, 3, "mine"))
    with pytest.raises(BadInput, match=f"^dataset mine: {words}" if "N at" not in words else words):
        Dataset.__post_init__(types.SimpleNamespace(**(good | changes)))  # pyright: ignore


def test_finds_configs_and_the_newest_version(tmp_path, monkeypatch):
    old, new, other = pictures(3), pictures(3, seed=1), pictures(3, seed=2)
    for images, root in ((old, tmp_path), (new, tmp_path / "b")):
        prepare(root, {"train": examples(images), "test": examples(images)})
    shutil.copytree(tmp_path / "b" / "tiny" / "1.0.0", tmp_path / "tiny" / "1.10.0")
    shutil.copytree(tmp_path / "tiny" / "1.0.0", tmp_path / "tiny" / "1.9.0")
    shutil.copytree(tmp_path / "tiny" / "1.0.0", tmp_path / "tiny" / "2.0.0.incomplete")
    prepare(tmp_path / "c", {"train": examples(other), "test": examples(other)}, config="large")
    check_equal(load("tiny", tmp_path), new, new)
    check_equal(load("tiny:1.0.0", tmp_path), old, old)
    check_equal(load("tiny/large", tmp_path / "c"), other, other)
    check_equal(load("tiny/large:1.0.0", tmp_path / "c"), other, other)
    with pytest.raises(BadInput, match=r"choose one of tiny/\{large\}"):
        load("tiny", tmp_path / "c")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    check_equal(load("tiny"), new, new)


def preparing(name, root):
    call = f"tfds.builder('{name}', file_format='array_record').download_and_prepare()"
    python = sys.executable.removeprefix(f"{os.getcwd()}/")
    return (
        f"{python} -m pip install -c constraints.txt tensorflow && "
        f'TFDS_DATA_DIR={root} {python} -c "import tensorflow_datasets as tfds; {call}"'
    )


@pytest.mark.parametrize("name", ["cifar10", "tiny:9.9.9", "tiny/none", "mnist/x", "mnist"])
def test_missing_set_names_the_directory_and_the_command(tmp_path, name):
    prepare(tmp_path, {"train": examples(pictures(3)), "test": examples(pictures(3))})
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput) as caught:
            load(name, root)
        message = str(caught.value)
        assert message.startswith(f"dataset={name}: not found in {root}")
        assert (f"({root} has tiny)" in message) == (root == tmp_path)
        assert message.endswith(preparing(name, root))
        assert "\n" not in message


def test_a_set_given_as_the_directory_of_sets_is_said_to_be_one(tmp_path):
    prepare(tmp_path, {"train": examples(pictures(3)), "test": examples(pictures(3))})
    with pytest.raises(
        BadInput, match=rf"{tmp_path}/tiny is a set itself; give the directory above, {tmp_path}$"
    ):
        load("tiny", tmp_path / "tiny")


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "a/b/c", "a b", "a:1", "x\n", "/etc/none", "é"])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(BadInput, match=r"must be a TFDS name|no such folder"):
        load(name, tmp_path)


def test_a_misspelt_name_is_answered_with_the_name_that_was_meant(tmp_path):
    for name, meant in {
        "mnst": "mnist",
        "cifar-10": None,
        "cifar_10": "cifar10",
        "fashionmnist": "fashion_mnist",
    }.items():
        with pytest.raises(BadInput, match=rf"did you mean {meant}\?" if meant else "must be a TFDS name"):
            load(name, tmp_path)
    with pytest.raises(BadInput, match="download_and_prepare"):
        load("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "shape", "reason"),
    [
        ([*pictures(2), *pictures(1, (6, 4, 3))], pictures(2), (None, None, 3), "one size"),
        ([*pictures(2), *pictures(1, (5, 1, 3))], pictures(2), (None, None, 3), "one size"),
        (pictures(2), pictures(2, (4, 5, 3)), (None, None, 3), r"\(5, 4, 3\) and \(4, 5, 3\)"),
    ],
)
def test_sets_that_cannot_be_used(tmp_path, train, test, shape, reason):
    splits = {"train": examples(train)} | ({"test": examples(test)} if len(test) else {})
    prepare(tmp_path, splits, shape=shape)
    with pytest.raises(BadInput, match=reason) as caught:
        load("tiny", tmp_path)
    assert "\n" not in str(caught.value)


def test_unlabelled_and_unclassified_sets_are_refused(tmp_path):
    images = pictures(3)
    prepare(tmp_path / "a", {"train": examples(images), "test": examples(images, [0, 1, -1])})
    with pytest.raises(BadInput, match=r"split test has labels outside 0\.\.2"):
        load("tiny", tmp_path / "a")
    splits = {
        split: [{**example, "label": 1.0} for example in examples(images)] for split in ("train", "test")
    }
    prepare(tmp_path / "b", splits, features={"label": tfds.features.Scalar(np.float32)})
    with pytest.raises(BadInput, match=r"label \(Scalar\); needs one uint8 image, and a class label"):
        load("tiny", tmp_path / "b")


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


def as_tfrecord(directory):
    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))


TRAIN = "tiny-train.array_record-00000-of-00001"


def flip_a_pixel(data):
    start = data.index(b"\x89PNG") + 60
    return data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: rewrite(path / "dataset_info.json", lambda data: data[:100]), "is damaged"),
        (lambda path: rewrite(path / "features.json", lambda data: data[:100]), "is damaged"),
        (lambda path: rewrite(path / "features.json", lambda data: b"\xff\n\n"), "is damaged"),
        (lambda path: (path / "dataset_info.json").unlink(), "is damaged"),
        (lambda path: (path / TRAIN).unlink(), "split train is damaged"),
        (lambda path: rewrite(path / TRAIN, lambda data: b""), "split train is damaged"),
        (lambda path: rewrite(path / TRAIN, lambda data: data[: len(data) // 2]), "split train is damaged"),
        (lambda path: rewrite(path / TRAIN, flip_a_pixel), "split train is damaged"),
        (as_tfrecord, "is tfrecord, which only TensorFlow can read"),
    ],
)
def test_damaged_sets_are_refused_in_one_line_with_the_remedy(tmp_path, damage, reason):
    images = pictures(3)
    prepare(tmp_path, {"train": examples(images), "test": examples(images)})
    load("tiny", tmp_path)
    damage(tmp_path / "tiny" / "1.0.0")
    with pytest.raises(BadInput, match=reason) as caught:
        load("tiny", tmp_path)
    message = str(caught.value)
    directory = tmp_path / "tiny" / "1.0.0"
    assert message.endswith(f"; remove {directory} and prepare it again: {preparing('tiny', tmp_path)}")
    assert "\n" not in message


@pytest.mark.slow
def test_no_damage_to_the_records_goes_unnoticed(tmp_path):
    images = pictures(40)
    directory = prepare(tmp_path, {"train": examples(images), "test": examples(images)})
    records, noise = directory / TRAIN, random.Random(0)
    good = records.read_bytes()
    used = good.rindex(b"IEND") + 4
    refused = 0
    for _ in range(300):
        start, length = noise.randrange(used), noise.choice([1, 16, 200])
        bad = bytearray(good)
        bad[start : start + length] = noise.randbytes(length)
        records.write_bytes(bytes(bad) if noise.random() < 0.8 else good[:start])
        try:
            check_equal(load("tiny", tmp_path), images, images)
        except BadInput:
            refused += 1
    assert refused > 150


def test_reading_is_quiet_and_needs_no_tensorflow(tmp_path):
    prepare(tmp_path, {"train": examples(pictures(3)), "test": examples(pictures(3))})
    program = (
        "import sys\n"
        "from sfl_jax.datasets import load\n"
        f"for _ in range(2): load('tiny', {str(tmp_path)!r})\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
        "assert not {'jax', 'tensorflow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
