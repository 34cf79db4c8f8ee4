"""Random changes of training images, for use under jit: a fresh draw for each image of each local step.

They act on images as they are stored, before `images.preprocessing`. A client changes its own images, so that
nothing more crosses the cut.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from sfl_jax.errors import BadInput

Augment = Callable[[Any, Any], Any]  # images (B, H, W, C), key -> images of the same shape and type
# What suits a dataset. Letters and digits must not be mirrored.
SUITED = {
    "mnist": "shift:2", "emnist": "shift:2", "kmnist": "shift:2", "fashion_mnist": "shift:2+flip",
    "cifar10": "shift:4+flip", "cifar10_jpeg": "shift:4+flip", "cifar100": "shift:4+flip",
    "svhn_cropped": "shift:4",
}  # fmt: skip


def augmentation(text: str, dataset: str = "") -> Augment | None:
    """What a text such as "shift:2+flip" names; several are applied from left to right.

    shift:N moves an image by up to N pixels each way and fills with zeros. flip mirrors it left to right with
    probability 1/2. crop:P cuts out a window with at least the part P of the area and resizes it to the
    whole. "none" changes nothing and returns None. "auto" takes what suits the dataset, see `SUITED`.

    Raises:
      BadInput: another word, a number outside of its range, or "auto" for an unknown dataset.
    """
    if text == "auto":
        name = dataset.split("/")[0].split(":")[0]
        if name not in SUITED:
            raise BadInput(
                f"augment=auto: knows {', '.join(SUITED)}; not dataset={dataset}: name the changes"
            )
        text = SUITED[name]
    if text == "none":
        return None
    return functools.partial(_all, steps=tuple(map(_step, text.split("+"))))


def check_images(augment: Augment | None, shape: Sequence[int]) -> None:
    """Raises BadInput where samples of this shape are no images (H, W, C)."""
    if augment is not None and len(shape) != 3:
        raise BadInput(f"augment: needs images (H, W, C); samples have the shape {tuple(shape)}")


def shift(images: Shaped[Array, "B H W C"], key: Key[Array, ""], pixels: int) -> Shaped[Array, "B H W C"]:
    """Each image moved by -pixels to pixels, up and down and sideways, with zeros where nothing was."""
    moves = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    _, height, width, _ = images.shape
    rows = moves[:, :1] + np.arange(height)  # (B, H)
    columns = moves[:, 1:] + np.arange(width)
    return padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def flip(images: Shaped[Array, "B H W C"], key: Key[Array, ""]) -> Shaped[Array, "B H W C"]:
    """Each image mirrored left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def crop(images: Shaped[Array, "B H W C"], key: Key[Array, ""], least: float) -> Shaped[Array, "B H W C"]:
    """A window of each image, with `least` to 1 of its area, resized linearly to the whole."""
    area_key, place_key = jax.random.split(key)
    side = jnp.sqrt(jax.random.uniform(area_key, (len(images), 1), minval=least))  # part of a side
    corner = (1 - side) * jax.random.uniform(place_key, (len(images), 2))
    size = np.array(images.shape[1:3])

    def resized(image, side, corner):
        floats = image.astype(jnp.promote_types(image.dtype, jnp.float32))
        scale = jnp.broadcast_to(1 / side, (2,))
        return jax.image.scale_and_translate(
            floats, image.shape, (0, 1), scale, -corner * size * scale, "linear", antialias=False
        )

    cropped = jax.vmap(resized)(images, side, corner)
    is_integer = jnp.issubdtype(images.dtype, jnp.integer)
    return (jnp.round(cropped) if is_integer else cropped).astype(images.dtype)


def _all(images, key, steps):
    for number, step in enumerate(steps):
        images = step(images, jax.random.fold_in(key, number))
    return images


def _step(text: str) -> Augment:
    name, _, number = text.partition(":")
    if name == "flip" and not number:
        return flip
    if name == "shift" and number.isdecimal() and 1 <= int(number) <= 64:
        return functools.partial(shift, pixels=int(number))
    if name == "crop" and _is_part(number):
        return functools.partial(crop, least=float(number))
    raise BadInput(f"augment={text}: must be none, auto, shift:1 to shift:64, flip or crop:PART (0.05 to 1)")


def _is_part(text: str) -> bool:
    try:
        return 0.05 <= float(text) <= 1
    except ValueError:
        return False
