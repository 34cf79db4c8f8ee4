"""What crosses the cut: smashed data go up through a link, and their gradient comes down through it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Key

# Folded into the key of a step for the link: a number that no unit has, then the direction.
LINK, UP, DOWN = 2**31, 0, 1
TAIL = 2**31  # folded into the keys of the second boundary, before the units that end at the client again
CLIENTS = "clients"  # the axis of a chunk's clients


@dataclasses.dataclass(frozen=True)
class Link:
    """What happens at the cut: `up` to smashed data (B, ...), `down` to its gradient, of the same shape.

    Both also take a key, which is that of the client's step and of the direction.
    """

    up: Callable[[Array, Key[Array, ""]], Array]
    down: Callable[[Array, Key[Array, ""]], Array]


Links = Link | None | tuple[Link | None, ...]  # several: one for each codec that a plan may choose


def hook(
    links: Links,
    tail: int,
    cut: Int[Array | np.ndarray, ""] | int,
    codec: Int[Array | np.ndarray, ""] | int | None,
    key: Key[Array, ""],
    axis: str | None = None,
) -> Callable[[int, Any], Any] | None:
    """What `Chain.apply` calls between two units. None where nothing happens at any cut.

    Args:
      links: one, or one for each codec; None is the identity, which leaves no trace in the program.
      tail: the first of the units that end at the client again; L where there are none. A client of a cut
        from there on holds everything.
      cut: of the client. codec: which of several links it uses.
      key: of the client's step.
      axis: the name of the axis of the clients that are computed together. It spares the work of a link at
        boundaries where none of them cuts.
    """
    several = links if isinstance(links, tuple) else (links,)
    if all(link is None for link in several):
        return None

    def at_boundary(unit, x):
        if unit == 0:  # images go up as they are
            return x
        for number, link in enumerate(several):
            if link is None:
                continue
            uses = jnp.asarray(cut < tail)
            if codec is not None:
                uses &= codec == number
            up, down = (_fold(_fold(key, LINK), direction) for direction in (UP, DOWN))
            if unit == tail:  # features come down, and their gradient goes up
                turned = Link(link.down, link.up)
                x = _send(turned, uses, x, _fold(down, TAIL), _fold(up, TAIL), axis)
            elif unit < tail:
                x = _send(link, uses & (cut == unit), x, up, down, axis)
        return x

    return at_boundary


_fold = jax.random.fold_in


def _send(link, here, x, key, answer_key, axis):
    """`x` through the link where `here` is true."""

    # The keys are arguments: JAX does not let a custom gradient close over what it traces.
    @jax.custom_vjp
    def send(x, here, key, answer_key):
        return _chosen(link.up, here, x, key)

    def answer(kept, gradient):
        here, answer_key = kept
        return _chosen(link.down, here, gradient, answer_key), None, None, None

    send.defvjp(lambda x, here, key, answer_key: (_chosen(link.up, here, x, key), (here, answer_key)), answer)
    # A conditional of one client, or of a chunk, does no work where nobody cuts. On a GPU it would cost
    # more: the host waits for its predicate.
    anybody = here if axis is None else lax.pmax(here.astype(jnp.int32), axis) > 0
    if jax.default_backend() != "cpu":
        return send(x, here, key, answer_key)
    return lax.cond(anybody, send, lambda x, *_: x, x, here, key, answer_key)


def _chosen(function, here, tree, key):
    """`function` of every array where `here` is true. From the second array on, each has its own key."""
    leaves, structure = jax.tree.flatten(tree)
    keys = [key, *(jax.random.fold_in(key, place) for place in range(1, len(leaves)))]
    sent = [jnp.where(here, function(leaf, own), leaf) for leaf, own in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, sent)
