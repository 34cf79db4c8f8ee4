"""From stored pixels to what a network takes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sfl_jax.errors import BadInput

BORDER = 0.25  # of the image's own size: a frame up to so much wider is zero-padded, anything else is resized


def borders(image_size: int, height: int, width: int) -> list[tuple[int, int]] | None:
    """The black frame, (before, after) by axis, around such images; None where they are resized instead."""
    missing = image_size - height, image_size - width
    if not all(0 <= more <= BORDER * size for more, size in zip(missing, (height, width), strict=True)):
        return None
    return [(more // 2, more - more // 2) for more in missing]


def squeezed(image_size: int, height: int, width: int) -> list[str]:
    """A line where images lose their proportions."""
    if height == width or borders(image_size, height, width):
        return []
    square = f"{image_size}x{image_size}"
    return [f"image_size={image_size}: images of {height}x{width} are squeezed to {square}"]


def scaled(images: Array) -> Array:
    """Samples as a network takes them: uint8 becomes -1 to 1; floats, and tokens, stay as they are."""
    if images.dtype != jnp.uint8:
        return images
    return images.astype(jnp.result_type(float)) / 127.5 - 1.0


def preprocessing(
    image_size: int, divisor: tuple[float, ...] = (127.5,), offset: tuple[float, ...] = (-1.0,)
) -> Callable[[Shaped[Array, "B H W C"]], Float[Array, "B S S C"]]:
    """A function for use under jit: pixel / divisor + offset, in images of side `image_size`.

    `divisor` and `offset` have one number or one per channel; by default pixels become -1 to 1.
    A small border is added by padding with black (28x28 to 32x32 keeps every pixel as it is); otherwise the
    image is resized bilinearly, with anti-aliasing where it shrinks, to a square whatever its proportions.

    Floats are not scaled. The function raises BadInput for integers other than uint8, whose range cannot be
    known.
    """

    def preprocess(images):
        is_scaled = images.dtype == jnp.uint8
        if not is_scaled and not jnp.issubdtype(images.dtype, jnp.floating):
            raise BadInput(f"images of {images.dtype}: must be uint8, 0 to 255, or floats")
        _, height, width, channels = images.shape
        if border := borders(image_size, height, width):
            images = jnp.pad(images, ((0, 0), *border, (0, 0)))
        dtype = jnp.result_type(float)
        scaled = images.astype(dtype)
        if is_scaled:
            scaled = scaled / jnp.asarray(divisor, dtype) + jnp.asarray(offset, dtype)
        if scaled.shape[1:3] == (image_size, image_size):
            return scaled
        return jax.image.resize(scaled, (len(images), image_size, image_size, channels), "bilinear")

    return preprocess
