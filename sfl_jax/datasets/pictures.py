"""Decodes a stored picture to 8 bits per channel, as TensorFlow does."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# The channels of the modes that Pillow converts with their full range. It clips others at 255.
_CHANNELS = {"1": 1, "L": 1, "LA": 2, "P": 3, "PA": 4, "RGB": 3, "RGBA": 4, "CMYK": 3, "YCbCr": 3}
_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


class Unusable(ValueError):
    """A picture that cannot be used; the message says what it is and what is allowed."""


def picture(encoded: bytes, channels: int | None) -> UInt8[np.ndarray, "H W C"]:
    """The pixels of a PNG, a JPEG or another format of Pillow. channels: None or 0 keeps the picture's own.

    Of 16 bits the upper 8 are used; fewer than 8 are scaled to 0..255. Palettes become colours, grey is
    repeated for colour, alpha is dropped or added as `channels` needs.

    Raises:
      Unusable: floats, 32-bit integers, an impossible number of channels, or too many pixels.
    """
    from PIL import Image

    most = Image.MAX_IMAGE_PIXELS
    try:
        opened = Image.open(io.BytesIO(encoded))
    except Image.DecompressionBombError as error:  # more than twice as many
        raise Unusable(f"pictures of more than {most} pixels; make them smaller") from error
    with opened as image:
        if most is not None and image.width * image.height > most:
            size = f"{image.width}x{image.height} pixels"
            raise Unusable(f"pictures of {size}; at most {most} in all; make them smaller")
        # Pillow up to version 10 opens a 16-bit PNG in a mode of 32 bits.
        if image.mode in _16_BITS or (image.mode == "I" and image.format == "PNG"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode not in _CHANNELS:
            raise Unusable(f"pictures of mode {image.mode}; store them with 8 or 16 bits per channel")
        mode = _MODES.get(channels or _CHANNELS[image.mode])
        if mode is None:
            raise Unusable(f"pictures of {channels} channels; must be 1 to 4")
        array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array if array.ndim == 3 else array[..., None]


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """In this context Pillow does not warn of large pictures, which `picture` refuses. Not for threads."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
