"""Turns stored pixels into a network's input."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sfl_jax.errors import BadInput

BORDER = 0.25  # an image is padded if the wanted size is at most this part larger; otherwise it is resized


def borders(image_size: int, height: int, width: int) -> list[tuple[int, int]] | None:
    """The black frame, (before, after) by axis, around images of this size; None if they are resized."""
    missing = image_size - height, image_size - width
    if not all(0 <= more <= BORDER * size for more, size in zip(missing, (height, width), strict=True)):
        return None
    return [(more // 2, more - more // 2) for more in missing]


def squeezed(image_size: int, height: int, width: int) -> list[str]:
    """A line that says so if resizing changes the images' proportions."""
    if height == width or borders(image_size, height, width):
        return []
    square = f"{image_size}x{image_size}"
    return [f"image_size={image_size}: images of {height}x{width} are squeezed to {square}"]


def scaled(images: Array) -> Array:
    """Samples for a network: uint8 becomes -1 to 1; floats and tokens are unchanged."""
    if images.dtype != jnp.uint8:
        return images
    return images.astype(jnp.result_type(float)) / 127.5 - 1.0


def preprocessing(
    image_size: int, divisor: tuple[float, ...] = (127.5,), offset: tuple[float, ...] = (-1.0,)
) -> Callable[[Shaped[Array, "B H W C"]], Float[Array, "B S S C"]]:
    """A function for use under jit: pixel / divisor + offset, in square images of side `image_size`.

    `divisor` and `offset` have one number, or one per channel; by default pixels become -1 to 1. A slightly
    smaller image gets a black border (28x28 to 32x32 keeps every pixel). Other images are resized bilinearly,
    with anti-aliasing if they shrink; proportions are not kept.

    Floats are not scaled. The function raises BadInput for integers other than uint8: their range is unknown.
    """

    def preprocess(images):
        is_scaled = images.dtype == jnp.uint8
        if not is_scaled and not jnp.issubdtype(images.dtype, jnp.floating):
            raise BadInput(f"images of {images.dtype}: must be uint8 (0 to 255) or floats")
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
