"""What each codec sends: bits for plans and clocks, and codecs at the cut for training."""

from collections.abc import Mapping, Sequence

import numpy as np

from sfl_jax import codecs, models, optim
from sfl_jax.codecs import Codec, Float32
from sfl_jax.federated.crossing import CutCodec, CutCodecs


def pairs(
    up: str | Codec | Sequence[str | Codec], down: str | Codec | None = None
) -> tuple[tuple[Codec, Codec], ...]:
    """Returns the choices of (codec of smashed data, codec of their gradient). Equal choices appear once.

    down: the gradient's codec in every choice. None takes the codec of the smashed data.
    """
    several = (up,) if isinstance(up, str | Codec) else tuple(up)
    made = dict.fromkeys(codecs.create(one) for one in several)
    return tuple((one, one if down is None else codecs.create(down)) for one in made)


def wires(chosen: Sequence[tuple[Codec, Codec]], profile: models.Profile) -> Mapping[str, optim.Wire]:
    """The bits of one sample at each cut, by the name of the codec of smashed data."""

    def bits(codec):
        return np.array([sum(map(codec.bits, shapes)) for shapes in profile.shapes], np.float64)

    return {str(up): optim.Wire(bits(up), bits(down)) for up, down in chosen}


def cut_codecs(chosen: Sequence[tuple[Codec, Codec]]) -> CutCodecs:
    """What training applies at the cut: one codec, a tuple of codecs, or None for the identity."""
    first, *others = (_cut_codec(*pair) for pair in chosen)
    return (first, *others) if others else first


def _cut_codec(up, down):
    if isinstance(up, Float32) and isinstance(down, Float32):
        return None
    return CutCodec(*(_unchanged if isinstance(codec, Float32) else codec.transmit for codec in (up, down)))


def _unchanged(x, key):
    return x
