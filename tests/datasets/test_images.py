"""Pixels as a network's images: padded or resized under jit, compared with Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sfl_jax.datasets.images import preprocessing, squeezed
from sfl_jax.errors import BadInput

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 28, 20, 3), np.uint8)


def resized(image, size):
    """Bilinear, with anti-aliasing if it shrinks, channel by channel."""
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(image.shape[-1])]
    return np.stack([np.asarray(c.resize((size, size), Image.Resampling.BILINEAR)) for c in channels], -1)


@pytest.mark.parametrize("size", [12, 64, 224])
def test_other_sizes_are_resized_bilinearly_under_jit(size):
    made = np.asarray(jax.jit(preprocessing(size))(IMAGES))
    assert (made.shape, made.dtype) == ((2, size, size, 3), np.float32)
    pixels = np.stack([resized(image, size) for image in IMAGES])
    np.testing.assert_allclose(made, pixels / 127.5 - 1, atol=1e-4)
    assert np.abs(made[:, :, ::-1] - (pixels / 127.5 - 1)).max() > 0.1


@pytest.mark.parametrize(("size", "before"), [(28, 0), (32, 2), (35, 3)])
def test_a_small_border_is_black_and_keeps_every_pixel(size, before):
    square = IMAGES[:, :, :1].repeat(28, 2)
    made = np.asarray(jax.jit(preprocessing(size))(square))
    inside = made[:, before : before + 28, before : before + 28]
    np.testing.assert_allclose(inside, square / 127.5 - 1, atol=1e-6)
    assert (made == -1).sum() >= 2 * 3 * (size**2 - 28**2)


def test_channels_have_scales_of_their_own():
    divisor, offset = (100.0, 200.0, 50.0), (-1.0, 0.0, 1.0)
    made = jax.jit(preprocessing(28, divisor, offset))(IMAGES[:, :, :1].repeat(28, 2))
    np.testing.assert_allclose(made, IMAGES[:, :, :1].repeat(28, 2) / divisor + offset, atol=1e-5)


def test_floats_are_taken_as_they_are():
    floats = IMAGES.astype(np.float32) / 7
    made = jax.jit(preprocessing(32))(floats)
    assert made.shape == (2, 32, 32, 3)
    same = jax.jit(preprocessing(28))(floats[:, :, :1].repeat(28, 2))
    np.testing.assert_array_equal(same, floats[:, :, :1].repeat(28, 2))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_pixels_of_another_range_are_not_divided_as_if_they_were_bytes(dtype):
    with pytest.raises(BadInput, match=f"^images of {np.dtype(dtype)}: must be uint8 .0 to 255. or floats$"):
        preprocessing(28)(jnp.ones((2, 28, 28, 1), dtype))


@pytest.mark.parametrize("shape", [(28, 28), (30, 26), (32, 32), (100, 100), (32, 28)])
def test_what_is_padded_or_resized_evenly_needs_no_word(shape):
    assert squeezed(32, *shape) == []


@pytest.mark.parametrize(("height", "width"), [(32, 96), (28, 20), (33, 32), (16, 32)])
def test_images_that_lose_their_proportions_are_said_to(height, width):
    line = f"image_size=32: images of {height}x{width} are squeezed to 32x32"
    assert squeezed(32, height, width) == [line]
