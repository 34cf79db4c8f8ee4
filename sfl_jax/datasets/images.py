"""From stored pixels to what a network takes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

BORDER = 0.25  # of the image's own size: a frame up to so much wider is zero-padded, anything else is resized


def preprocessing(
    image_size: int, divisor: tuple[float, ...] = (127.5,), offset: tuple[float, ...] = (-1.0,)
) -> Callable[[UInt8[Array, "B H W C"]], Float[Array, "B S S C"]]:
    """A function for use under jit: pixel / divisor + offset, in images of side `image_size`.

    `divisor` and `offset` have one number or one per channel; by default pixels become -1 to 1.
    A small border is added by padding with black (28x28 to 32x32 keeps every pixel as it is); otherwise the
    image is resized bilinearly, with anti-aliasing where it shrinks.
    """

    def preprocess(images):
        *_, height, width, channels = images.shape
        borders = image_size - height, image_size - width
        if all(0 <= border <= BORDER * size for border, size in zip(borders, (height, width), strict=True)):
            padding = [(border // 2, border - border // 2) for border in borders]
            images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
        dtype = jnp.result_type(float)
        scaled = images.astype(dtype) / jnp.asarray(divisor, dtype) + jnp.asarray(offset, dtype)
        if scaled.shape[1:3] == (image_size, image_size):
            return scaled
        return jax.image.resize(scaled, (len(images), image_size, image_size, channels), "bilinear")

    return preprocess
