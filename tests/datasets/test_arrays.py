"""The user's own data: arrays, files of arrays, folders of pictures."""

import os
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from sfl_jax.datasets import as_stored, from_arrays, load
from sfl_jax.errors import BadInput

RNG = np.random.default_rng(0)
X, Y = RNG.integers(0, 256, (20, 4, 5, 3), np.uint8), np.arange(20) % 4
FLOATS, FLOAT_TYPES = RNG.normal(size=(20, 4, 5)), (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
TOKENS = RNG.integers(0, 99, (20, 7))
ONE_COLUMN = (
    "must be (N,), one class number per sample: give one column, such as y_train[:, 0], or y_train.argmax(1)"
)


def test_arrays_are_what_was_given():
    data = from_arrays(X, Y, X[:6], Y[:6])
    assert data.num_classes == 4
    assert data.train_images is X
    np.testing.assert_array_equal(data.test_images, X[:6])
    np.testing.assert_array_equal(data.train_labels, Y)
    assert data.train_labels.dtype == np.int32
    assert from_arrays(X[::-1], Y, X[:6], Y[:6]).digest != data.digest


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (X[..., 0], (4, 5, 1)),  # grey images get a channel
        (X.reshape(20, -1), (60,)),
        (X[..., None], (4, 5, 3, 1)),
        *((FLOATS.astype(kind), (4, 5)) for kind in FLOAT_TYPES),  # series of numbers do not
        (FLOATS[:, 0], (5,)),
        (RNG.normal(size=(20, 2, 3, 4, 5)), (2, 3, 4, 5)),
        *((TOKENS.astype(kind), (7,)) for kind in (np.int8, np.int32, np.int64, np.uint16, np.uint32)),
        (TOKENS.tolist(), (7,)),
        (-TOKENS[..., None], (7, 1)),
    ],
)
def test_samples_of_any_shape_and_type(x, shape):
    data = from_arrays(x, Y[:, None], x[:3], Y[:3].astype(np.uint8))
    kind = np.asarray(x).dtype
    is_tokens = kind.kind in "iu" and kind != np.uint8
    assert data.train_images.shape == (20, *shape)
    assert data.train_images.dtype == (np.int32 if is_tokens else kind)
    np.testing.assert_array_equal(data.train_images.reshape(np.shape(x)), x)
    other = from_arrays(np.flip(x, 0), Y, x[:3], Y[:3])
    assert data.digest != other.digest
    np.testing.assert_array_equal(as_stored("x", x, data.train_images), data.train_images)


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (X.tolist(), "int64 (20, 4, 5, 3)"),
        (X.astype(np.uint16), "uint16 (20, 4, 5, 3)"),
        (X[..., 0].astype(np.uint16), "uint16 (20, 4, 5)"),
        (TOKENS + 2**31, "int64 (20, 7)"),
        (TOKENS * 1j, "complex128 (20, 7)"),
        (X > 3, "bool (20, 4, 5, 3)"),
    ],
)
def test_samples_whose_meaning_cannot_be_known(x, found):
    with pytest.raises(BadInput) as caught:
        from_arrays(x, Y, x, Y)
    rule = "must be uint8 (0 to 255), floats, or integer tokens (N, T)"
    assert str(caught.value) == f"x_train, y_train: images of {found}; {rule}"


def test_without_a_test_set_some_are_held_out_and_said():
    data = from_arrays(X, Y, test_share=0.3)
    assert data.notes == ("no samples to test on: 6 of 20 are held out",)
    both = np.concatenate([data.train_images, data.test_images])
    assert {image.tobytes() for image in both} == {image.tobytes() for image in X}
    assert len(both) == 20
    again = from_arrays(X, Y, test_share=0.3)
    np.testing.assert_array_equal(again.test_images, data.test_images)
    none = from_arrays(X, Y, test_share=0)
    assert (len(none.train_labels), len(none.test_labels), none.notes) == (20, 0, ())


def nan(x):
    return np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"y_train": Y[:-1]},
            "x_train, y_train: labels of int64 (19,); must be integers",
        ),
        ({"y_train": Y - 1}, "x_train, y_train: labels -1 to 2; must be 0 to "),
        ({"num_classes": 3}, "x_train, y_train: labels 0 to 3; must be 0 to 2"),
        ({"y_train": np.eye(4)[Y]}, f"y_train: of shape (20, 4); {ONE_COLUMN}"),
        ({"y_train": np.stack([Y, Y], 1)}, f"y_train: of shape (20, 2); {ONE_COLUMN}"),
        ({"y_train": X}, "y_train: of shape (20, 4, 5, 3); must be (N,), one class number per sample"),
        ({"x_train": nan(FLOATS).astype(ml_dtypes.bfloat16)}, "x_train: has numbers that are not finite"),
        ({"y_train": Y * 1.0}, "y_train: of float64; must be integers from 0"),
        ({"x_train": nan(X)}, "x_train: has numbers that are not finite"),
        ({"x_train": np.arange(20)}, "x_train: of shape (20,); must be (N, ...), one row per sample"),
        ({"x_test": X[:, :3]}, "dataset arrays: images of (4, 5, 3) and (3, 5, 3); must be of one size"),
        ({"x_test": X / 255}, "dataset arrays: images of uint8 and float64; must be of one type"),
        ({"y_test": None}, "x_test, y_test: one of them is missing"),
        (
            {"x_test": None, "y_test": None, "test_share": 1.0},
            "test_share=1.0: must be at least 0",
        ),
        (
            {"x_test": None, "y_test": None, "splits": [[0]]},
            "splits: needs x_test and y_test",
        ),
        ({"splits": [[0, 1], [20]]}, "splits[1]: indices 20 to 20; must be 0 to 19"),
        ({"splits": [[0, 1], [1, 2]]}, "splits[1]: has a sample twice, or a sample of another client"),
        ({"splits": [[0, 0]]}, "splits[0]: has a sample twice"),
        ({"x_train": [[1.0, 2.0], [3.0]]}, "x_train: NumPy cannot convert it to an array (setting an array"),
        ({"x_test": None, "y_test": None, "splits": np.array([[0, 1], [2, 3]])}, "splits: needs x_test"),
        ({"splits": [[0], []]}, "splits[1]: must be integers (n,), the indices of at least one sample"),
    ],
)
def test_what_does_not_fit_is_named(changes, line):
    given = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y} | changes
    with pytest.raises(BadInput) as caught:
        from_arrays(**given)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_file_of_arrays(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X[:5], y_test=Y[:5])
    np.savez(tmp_path / "b.npz", images=X, labels=Y)
    monkeypatch.chdir(tmp_path)
    data = load("a.npz")
    np.testing.assert_array_equal(data.train_images, X)
    assert (len(data.test_labels), data.name) == (5, "a.npz")
    assert len(load(str(tmp_path / "b.npz")).test_labels) == 2
    np.savez(tmp_path / "c.npz", x=X, fine=Y, coarse=Y)
    np.savez(tmp_path / "j.npz", x_train=X, y_train=np.stack([Y, Y], 1))
    np.savez(tmp_path / "k.npz", x_train=FLOATS.astype(ml_dtypes.bfloat16), y_train=Y)
    np.savez(tmp_path / "tokens.npz", x_train=TOKENS, y_train=Y)
    assert load("tokens.npz").train_images.dtype == np.int32
    np.savez(tmp_path / "d.npz", x_train=np.array([{}]), y_train=Y)
    np.savez(tmp_path / "e.npz", x_train=X, y_train=Y[1:])
    (tmp_path / "f.npz").write_bytes(b"PK nothing")
    np.savez_compressed(tmp_path / "h.npz", x_train=X, y_train=Y)
    damaged = bytearray((tmp_path / "h.npz").read_bytes())
    damaged[100:140] = b"\xff" * 40
    (tmp_path / "h.npz").write_bytes(damaged)
    with (tmp_path / "i.npz").open("wb") as file:
        np.save(file, X)
    for name, line in (
        ("c.npz", "dataset=c.npz: has the arrays x, fine, coarse; needs x_train and y_train, the labels"),
        ("j.npz", f"dataset=j.npz: y_train: of shape (20, 2); {ONE_COLUMN}"),
        ("k.npz", "dataset=k.npz: x_train: of |V2; NumPy files lose bfloat16: save it as float32"),
        ("~no.one/a.npz", "dataset=~no.one/a.npz: this home directory is not known"),
        ("~no.one/a", "dataset=~no.one/a: this home directory is not known"),
        ("d.npz", "dataset=d.npz: cannot be read as a .npz file of numbers"),
        ("e.npz", "dataset=e.npz: x_train, y_train: labels of int64 (19,)"),
        ("f.npz", "dataset=f.npz: cannot be read as a .npz file of numbers"),
        ("h.npz", "dataset=h.npz: cannot be read as a .npz file of numbers (Error -3"),
        ("i.npz", "dataset=i.npz: cannot be read as a .npz file of numbers (a single array"),
        ("g.npz", "dataset=g.npz: no such file"),
    ):
        with pytest.raises(BadInput) as caught:
            load(name)
        assert str(caught.value).startswith(line)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.mark.parametrize("tested", ["test", "val", None])
def test_folders_of_pictures(tmp_path, tested):
    for number, (image, label) in enumerate(zip(X, Y, strict=True)):
        folder = tmp_path / ("train" if tested else ".") / "dcba"[label]
        save(folder / f"{number:02}.png", image)
    if tested:
        save(tmp_path / tested / "c" / "0.PNG", X[0])
    (tmp_path / ("train/a" if tested else "a") / "notes.txt").touch()
    (tmp_path / ("train/.hidden" if tested else ".hidden")).mkdir()
    data = load(str(tmp_path))
    assert data.num_classes == 4
    assert data.notes[-1] == "4 classes: a, b, c, d"
    if tested:
        order = np.argsort(3 - Y, kind="stable")
        np.testing.assert_array_equal(data.train_images, X[order])
        np.testing.assert_array_equal(data.train_labels, 3 - Y[order])
        assert data.test_labels.tolist() == [2]
    else:
        assert (len(data.train_labels), len(data.test_labels)) == (18, 2)


def test_folders_that_are_no_dataset(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "cats").mkdir(parents=True)
    save(tmp_path / "b" / "cats" / "0.png", X[0])
    save(tmp_path / "b" / "dogs" / "1.png", X[0, :3])
    save(tmp_path / "c" / "cats" / "0.png", X[0])
    (tmp_path / "c" / "cats" / "1.png").write_bytes(b"no picture")
    (tmp_path / "d" / "test" / "cats").mkdir(parents=True)
    save(tmp_path / "e" / "train" / "cats" / "0.png", X[0])
    save(tmp_path / "e" / "test" / "cows" / "0.png", X[0])
    for name, reason in (
        ("empty", "needs a folder of pictures for each class, and has none"),
        ("a", r"no pictures in cats; add some \(.bmp, .jpeg, .jpg, .png"),
        ("b", r"dogs/1.png: shape \(3, 5, 3\), but others have \(4, 5, 3\); make copies"),
        ("c", r"cats/1.png: cannot be read as a picture \(Pillow does not know its format\); repair"),
        ("d", "has a folder test but no folder train"),
        ("e", "test has the class cows; train must have it too"),
    ):
        with pytest.raises(BadInput, match=rf"^dataset={tmp_path / name}: {reason}"):
            load(str(tmp_path / name))


def test_a_folder_here_is_named_with_a_dot(tmp_path, monkeypatch):
    save(tmp_path / "flowers" / "a" / "0.png", X[0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"; write \./flowers for the folder of pictures here$"):
        load("flowers", str(tmp_path / "tfds"))
    assert len(load("./flowers").train_labels) == 1


def lost_link(at):
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to("nowhere")


def cut_short(at):
    save(at, X[0].repeat(40, 0).repeat(40, 1))
    at.write_bytes(at.read_bytes()[:-200])


def denied(monkeypatch, method, place):
    """Root may read everything, so the refusal is simulated."""
    real = getattr(Path, method)

    def attempt(path, *more, **named):
        if path == place:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **named)

    monkeypatch.setattr(Path, method, attempt)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda at, patch: lost_link(at / "b/0.png"), "b/0.png is a link to nowhere, which is missing"),
        (lambda at, patch: lost_link(at / "c"), "c is a link to nowhere, which is missing"),
        (lambda at, patch: (at / "c").mkdir(), "no pictures in c; add some (.bmp"),
        (
            lambda at, patch: cut_short(at / "b/0.jpg"),
            "b/0.jpg: cannot be read as a picture (image file is tr",
        ),
        (lambda at, patch: cut_short(at / "b/0.png"), "b/0.png: cannot be read as a picture ("),
        (
            lambda at, patch: (at / "b/0.png").mkdir(parents=True),
            "b/0.png: cannot be read as a picture ([Err",
        ),
        (
            lambda at, patch: patch.setattr(Image, "MAX_IMAGE_PIXELS", 19),
            "a/0.png: pictures of 5x4 pixels; at",
        ),
        (
            lambda at, patch: patch.setattr(Image, "MAX_IMAGE_PIXELS", 9),
            "a/0.png: pictures of more than 9 pix",
        ),
        (lambda at, patch: denied(patch, "iterdir", at), "{at} cannot be read (Permission denied)"),
        (lambda at, patch: denied(patch, "iterdir", at / "a"), "{at}/a cannot be read (Permission denied)"),
        (lambda at, patch: denied(patch, "is_dir", at), "{at} cannot be read (Permission denied)"),
        (lambda at, patch: denied(patch, "read_bytes", at / "a/0.png"), "a/0.png: cannot be read as a pictu"),
    ],
)
def test_folders_with_something_amiss_are_refused_in_one_line(tmp_path, monkeypatch, spoil, reason):
    at = tmp_path / "set"
    save(at / "a" / "0.png", X[0])
    spoil(at, monkeypatch)
    with warnings.catch_warnings(record=True) as said, pytest.raises(BadInput) as caught:
        load(str(at))
    assert str(caught.value).startswith(f"dataset={at}: {reason.format(at=at)}")
    assert "\n" not in str(caught.value)
    assert not said


def test_what_is_tested_need_not_have_every_class_and_links_are_followed(tmp_path):
    save(tmp_path / "set" / "train" / "a" / "0.png", X[0])
    save(tmp_path / "elsewhere" / "0.png", X[1])
    (tmp_path / "set" / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "train" / ".cache").symlink_to("nowhere")
    save(tmp_path / "set" / "test" / "b" / "0.png", X[2])
    data = load(str(tmp_path / "set"))
    np.testing.assert_array_equal(data.train_images, X[:2])
    assert data.test_labels.tolist() == [1]


def test_a_label_key_is_for_sets_with_several_labels(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y)
    (tmp_path / "set").mkdir()
    for name in ("a.npz", "set"):
        place = f"{os.fspath(tmp_path)}/{name}"
        with pytest.raises(
            BadInput, match=f"^label_key=fine: only for TFDS sets; dataset={place} has one label"
        ):
            load(place, label_key="fine")
