"""Random damage to bytes, and loops over it."""

import time

from sfl_jax.errors import BadInput


def damaged(rng, data):
    """Bytes that differ from `data`: cut, zeroed, flipped, overwritten; a piece removed, added or copied."""
    while True:
        changed = _changed(rng, bytearray(data))
        if changed != data:
            return changed


def _changed(rng, data):
    size = len(data)
    if not size or rng.random() < 0.02:
        return rng.randbytes(rng.randrange(100))
    # Most damage is near an end, where formats keep their headers.
    at = rng.choice(
        [rng.randrange(size), rng.randrange(min(size, 4096)), size - 1 - rng.randrange(min(size, 4096))]
    )
    piece = slice(at, min(at + rng.choice([1, 1, 8, 64, 512]), size))
    width = piece.stop - piece.start
    way = rng.randrange(8)
    if way == 0:
        del data[at:]
    elif way == 1:
        data[piece] = bytes(width)
    elif way == 2:
        data = bytearray(size)
    elif way == 3:
        data[at] ^= 1 << rng.randrange(8)
    elif way == 4:
        data[piece] = rng.randbytes(width)
    elif way == 5:
        del data[piece]
    elif way == 6:
        data[at:at] = rng.randbytes(width)
    else:
        start = rng.randrange(size - width + 1)
        data[piece] = data[start : start + width]
    return bytes(data)


def tries(count, seconds, about):
    """Yields 0, 1, ... up to `count`; stops after `seconds`, but not before a tenth. Prints how many."""
    start, number = time.monotonic(), 0
    while number < count and (number < count / 10 or time.monotonic() - start < seconds):
        yield number
        number += 1
    print(f"{about}: {number} inputs in {time.monotonic() - start:.0f} s")


def attempt(take, *given):
    """(what `take` returns, None), or (None, the line of its refusal)."""
    try:
        return take(*given), None
    except BadInput as error:
        said = str(error)
    assert len(said.splitlines()) == 1, said
    return None, said
