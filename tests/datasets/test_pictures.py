"""Pictures of every colour type and depth, compared with TensorFlow's rules and with TFDS."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sfl_jax.datasets.pictures import Unusable, picture

HEIGHT, WIDTH = 3, 16
PALETTE = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
GREY, RGB, PALETTED, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
SAMPLES = {GREY: 1, RGB: 3, PALETTED: 1, GREY_ALPHA: 2, RGBA: 4}
PNGS = [
    *((GREY, depth) for depth in (1, 2, 4, 8, 16)),
    *((PALETTED, depth) for depth in (1, 2, 4, 8)),
    *((kind, depth) for kind in (RGB, GREY_ALPHA, RGBA) for depth in (8, 16)),
]


def values(kind, depth):
    shape = HEIGHT, WIDTH, SAMPLES[kind]
    return np.random.default_rng(depth).integers(0, 2**depth, shape, np.uint16)


def png(kind, depth):
    """Writes a PNG by hand, since Pillow cannot write all kinds."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = values(kind, depth).reshape(HEIGHT, -1)
    if depth == 16:
        rows = rows.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(HEIGHT, -1), axis=-1)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, kind, 0, 0, 0)
    colours = chunk(b"PLTE", PALETTE[: 2**depth].tobytes()) if kind == PALETTED else b""
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = chunk(b"IHDR", header), colours, chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def expected(kind, depth, channels):
    """libpng as TensorFlow uses it: 16 bits lose the lower 8, fewer than 8 bits are scaled."""
    own = values(kind, depth)
    if kind == PALETTED:
        own = PALETTE[own[..., 0]]
    elif depth == 16:
        own = own >> 8
    else:
        own = own * (255 // (2**depth - 1))
    opaque = np.full((HEIGHT, WIDTH, 1), 255)
    colours = own[..., : 3 if own.shape[-1] > 2 else 1]
    alpha = own[..., -1:] if own.shape[-1] in (2, 4) else opaque
    if channels < 3 and colours.shape[-1] == 3:
        colours = np.rint(colours @ (0.299, 0.587, 0.114))[..., None]
    elif channels > 2:
        colours = np.broadcast_to(colours, (HEIGHT, WIDTH, 3))
    return np.concatenate([colours, alpha], -1) if channels in (2, 4) else colours


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "depth"), PNGS)
def test_every_png_keeps_its_range(kind, depth, channels):
    got = picture(png(kind, depth), channels)
    assert got.dtype == np.uint8
    luma = channels < 3 and kind in (RGB, PALETTED, RGBA)  # rounded in integers
    assert got.shape == (HEIGHT, WIDTH, channels)
    np.testing.assert_allclose(got, expected(kind, depth, channels), rtol=0, atol=1 if luma else 0)


@pytest.mark.parametrize(
    ("kind", "depth", "channels"),
    [
        (GREY, 2, 1),
        (GREY, 4, 1),
        (GREY, 8, 1),
        (GREY, 8, 3),
        (RGB, 8, 3),
        (RGB, 16, 3),
        (RGBA, 8, 4),
        (RGBA, 16, 4),
    ],
)
def test_tfds_decodes_the_same_where_it_can(kind, depth, channels):
    """Without TensorFlow, TFDS takes the lower byte of 16-bit grey and a palette's indices as colours."""
    decoder = tfds.features.Image(shape=(None, None, channels))
    np.testing.assert_array_equal(
        picture(png(kind, depth), channels), decoder.decode_example_np(png(kind, depth))
    )


@pytest.mark.parametrize(
    ("kind", "channels"), [(GREY, 1), (GREY_ALPHA, 2), (RGB, 3), (PALETTED, 3), (RGBA, 4)]
)
@pytest.mark.parametrize("unsaid", [None, 0])
def test_a_picture_has_its_own_channels_where_none_are_said(kind, channels, unsaid):
    np.testing.assert_array_equal(picture(png(kind, 8), unsaid), expected(kind, 8, channels))


def stored(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_16_bits_in_other_orders_and_modes(monkeypatch):
    grey = values(GREY, 16)[..., 0]
    for order in "<>":
        tiff = stored(Image.fromarray(grey.astype(f"{order}u2")), "TIFF")
        np.testing.assert_array_equal(picture(tiff, 3), expected(GREY, 16, 3))
    # Pillow 10 opens such a PNG in a mode of 32 bits.
    as_before = Image.fromarray(grey.astype(np.int32))
    as_before.format = "PNG"
    monkeypatch.setattr(Image, "open", lambda _: as_before)
    np.testing.assert_array_equal(picture(b"", 1), expected(GREY, 16, 1))


@pytest.mark.parametrize(
    ("array", "channels", "words"),
    [
        (np.ones((2, 2), np.float32), 1, "pictures of mode F; store them with 8 or 16 bits per channel"),
        (np.ones((2, 2), np.float32), 3, "pictures of mode F; "),
        (np.ones((2, 2), np.int32), 1, "pictures of mode I; "),
        (np.ones((2, 2), np.uint8), 5, "pictures of 5 channels; must be 1 to 4"),
    ],
)
def test_what_would_be_clipped_is_refused_by_name(array, channels, words):
    with pytest.raises(Unusable, match=f"^{words}"):
        picture(stored(Image.fromarray(array), "TIFF"), channels)
