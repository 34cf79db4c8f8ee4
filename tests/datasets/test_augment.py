"""Random changes of images: each result is one of those that NumPy makes, and all of these come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfl_jax.datasets import augment
from sfl_jax.datasets.augment import augmentation, check_images
from sfl_jax.errors import BadInput

IMAGES = np.random.default_rng(0).integers(1, 256, (64, 5, 6, 2), np.uint8)


def changed(text, key=3, images=IMAGES):
    result = jax.jit(augmentation(text))(images, jax.random.key(key))
    assert result.shape == images.shape
    assert result.dtype == images.dtype
    return np.asarray(result)


def shifts(image, most):
    """The image moved by -most to most pixels both ways, by the move."""
    padded = np.pad(image, ((most, most), (most, most), (0, 0)))
    height, width, _ = image.shape
    places = range(2 * most + 1)
    return {(i, j): padded[i : i + height, j : j + width] for i in places for j in places}


def test_shift_makes_every_move_and_no_other():
    seen = set()
    for key in range(3):
        for image, result in zip(IMAGES, changed("shift:1", key), strict=True):
            moves = [move for move, x in shifts(image, 1).items() if np.array_equal(x, result)]
            assert len(moves) == 1
            seen |= set(moves)
    assert len(seen) == 9


def test_flip_mirrors_about_half_of_the_images():
    result = changed("flip")
    mirrored = (result == IMAGES[:, :, ::-1]).all((1, 2, 3))
    assert ((result == IMAGES).all((1, 2, 3)) | mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_a_crop_is_a_window_resized():
    np.testing.assert_array_equal(changed("crop:1"), IMAGES)
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32)[None, :, None, None], (64, 32, 32, 1))
    result = changed("crop:0.25", images=ramp)
    # Inside, a window of a ramp is a ramp of a smaller slope: the part of the side that it has.
    inside = np.diff(result[:, 4:-4, 16, 0], axis=1)
    assert np.ptp(inside, axis=1).max() < 1e-3
    slopes = inside.mean(1)
    assert 0.5 <= slopes.min() < 0.6
    assert 0.9 < slopes.max() <= 1
    assert result.min() >= 0
    assert result.max() <= 31


def test_another_key_gives_another_change_and_several_follow_each_other():
    assert not np.array_equal(changed("shift:2", 1), changed("shift:2", 2))
    key, images = jax.random.key(3), jnp.asarray(IMAGES)
    both = augmentation("shift:2+flip")(images, key)
    shifted = augment.shift(images, jax.random.fold_in(key, 0), 2)
    np.testing.assert_array_equal(both, augment.flip(shifted, jax.random.fold_in(key, 1)))


@pytest.mark.parametrize(("dataset", "same"), [("mnist", "shift:2"), ("cifar10:3.0.2", "shift:4+flip")])
def test_auto_is_what_suits_the_dataset(dataset, same):
    images = jnp.asarray(np.repeat(IMAGES, 3, axis=1))
    key = jax.random.key(0)
    np.testing.assert_array_equal(augmentation("auto", dataset)(images, key), augmentation(same)(images, key))
    assert augmentation("none", dataset) is None


@pytest.mark.parametrize(
    ("text", "dataset"),
    [("shift", ""), ("shift:0", ""), ("shift:65", ""), ("flip:2", ""), ("crop:0", ""), ("crop:x", ""),
     ("turn", ""), ("", ""), ("shift:2+", ""), ("auto", "./mine")],
)  # fmt: skip
def test_what_is_no_change_is_refused_in_a_line(text, dataset):
    with pytest.raises(BadInput, match=r"^augment="):
        augmentation(text, dataset)


def test_samples_that_are_no_images_are_refused():
    with pytest.raises(BadInput, match="needs images"):
        check_images(augmentation("flip"), (12,))
    check_images(None, (12,))
