"""What happens at the cut: a codec changes smashed data on the way up and their gradient on the way down."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Key

# Folded into a step's key to make the codec's key: a number that no unit has, then the direction.
CODEC, UP, DOWN = 2**31, 0, 1
TAIL = 2**31  # folded into the keys of the second boundary, where the tail begins
CLIENTS = "clients"  # the name of the axis of a chunk's clients


@dataclasses.dataclass(frozen=True)
class CutCodec:
    """A codec for both directions: `up` for smashed data (B, ...), `down` for their gradient. Both keep the
    shape.

    Both also take a key, folded from the key of the client's step and the direction.
    """

    up: Callable[[Array, Key[Array, ""]], Array]
    down: Callable[[Array, Key[Array, ""]], Array]


CutCodecs = CutCodec | None | tuple[CutCodec | None, ...]  # a tuple: the codecs that a plan may choose from


def hook(
    codecs: CutCodecs,
    tail: int,
    cut: Int[Array | np.ndarray, ""] | int,
    codec: Int[Array | np.ndarray, ""] | int | None,
    key: Key[Array, ""],
    axis: str | None = None,
) -> Callable[[int, Any], Any] | None:
    """What `Chain.apply` calls between two units. None if no codec does anything.

    Args:
      codecs: one codec, or a tuple. None is the identity, which adds nothing to the program.
      tail: the first unit of the tail; L without a tail. A client with a cut from there on holds everything.
      cut: the client's cut. codec: which codec of a tuple the client uses.
      key: the key of the client's step.
      axis: the name of the axis of clients that are computed together. With it, a codec does no work at
        boundaries where none of them cuts.
    """
    several = codecs if isinstance(codecs, tuple) else (codecs,)
    if all(one is None for one in several):
        return None

    def at_boundary(unit, x):
        if unit == 0:  # images go up as they are
            return x
        for number, one in enumerate(several):
            if one is None:
                continue
            uses = jnp.asarray(cut < tail)
            if codec is not None:
                uses &= codec == number
            up, down = (_fold(_fold(key, CODEC), direction) for direction in (UP, DOWN))
            if unit == tail:  # features come down, and their gradient goes up
                turned = CutCodec(one.down, one.up)
                x = _send(turned, uses, x, _fold(down, TAIL), _fold(up, TAIL), axis)
            elif unit < tail:
                x = _send(one, uses & (cut == unit), x, up, down, axis)
        return x

    return at_boundary


_fold = jax.random.fold_in


def _send(codec, here, x, key, answer_key, axis):
    """`x` through the codec where `here` is true."""

    # The keys are arguments, because a custom gradient may not close over traced values.
    @jax.custom_vjp
    def send(x, here, key, answer_key):
        return _chosen(codec.up, here, x, key)

    def answer(kept, gradient):
        here, answer_key = kept
        return _chosen(codec.down, here, gradient, answer_key), None, None, None

    send.defvjp(
        lambda x, here, key, answer_key: (_chosen(codec.up, here, x, key), (here, answer_key)), answer
    )
    # With a conditional, a boundary where nobody cuts costs nothing. On a GPU it would cost more, because
    # the host waits for its predicate.
    anybody = here if axis is None else lax.pmax(here.astype(jnp.int32), axis) > 0
    if jax.default_backend() != "cpu":
        return send(x, here, key, answer_key)
    return lax.cond(anybody, send, lambda x, *_: x, x, here, key, answer_key)


def _chosen(function, here, tree, key):
    """Applies `function` to every array where `here` is true. Each array after the first has its own key."""
    leaves, structure = jax.tree.flatten(tree)
    keys = [key, *(jax.random.fold_in(key, place) for place in range(1, len(leaves)))]
    sent = [jnp.where(here, function(leaf, own), leaf) for leaf, own in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, sent)
