"""Copies of units with an optimiser state for each unit, and one local step on them.

With unequal cuts, different clients step different units of the server's copy. So Adam's count of steps
differs by unit, and each unit needs its own state.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sfl_jax.errors import BadInput
from sfl_jax.federated.packing import Packed, PackedVariables, pack
from sfl_jax.federated.session import Assignment, Samples, Training, batch, batch_loss
from sfl_jax.models import Variables


class Copy(NamedTuple):
    """A copy of one unit: packed parameters and statistics, and its optimiser's state.

    With a leading axis it holds the copies of several clients.
    """

    params: tuple[Array, ...]
    stats: tuple[Array, ...]
    state: Any


Copies = tuple[Copy, ...]  # one copy for each unit


def states(training: Training, packed: PackedVariables) -> tuple[Any, ...]:
    """A fresh optimiser state for each unit. BadInput if the optimiser needs all units together."""
    try:
        return tuple(
            training.optimizer.init(_for_optimizer(training, packed, place, arrays))
            for place, arrays in enumerate(packed.params.arrays)
        )
    except Exception as error:
        raise BadInput(
            "optimizer: cannot start with one unit alone, and this scheme gives each unit its own state "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def copies(packed: PackedVariables, of_units: Sequence[Any]) -> Copies:
    """Copies of the global variables with these optimiser states, one for each unit."""
    return tuple(map(Copy, packed.params.arrays, packed.batch_stats.arrays, of_units))


def variables(of_units: Sequence[Copy | tuple[Any, ...]], like: PackedVariables) -> PackedVariables:
    """The variables that these copies hold. Reads only the first two fields of a copy."""
    params, stats = (tuple(unit[field] for unit in of_units) for field in (0, 1))
    return PackedVariables(Packed(params, like.params.layouts), Packed(stats, like.batch_stats.layouts))


def step(
    training: Training,
    like: PackedVariables,
    units: Copies,
    samples: Samples,
    one: Assignment,
    index: Int[Array, ""],
    round_key: Key[Array, ""],
    rate: Float[Array, ""],
) -> tuple[Copies, Float[Array, ""], Bool[Array, ""]]:
    """Returns (the copies after a client's step, its loss, whether all its numbers are finite).

    A step with numbers that are not finite changes nothing, and its loss is 0.
    """
    images, labels, key = batch(training, samples, one, index, round_key)
    held = variables(units, like)

    def loss_of(params):
        now = Variables(params.unpack(), held.batch_stats.unpack())
        return batch_loss(training, now, images, labels, one.cut, key, one.codec)

    (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(held.params)
    changes = zip(units, gradients.arrays, pack(stats).arrays, strict=True)
    new = tuple(
        moved(training, like, place, unit, own, rate)._replace(stats=own_stats)
        for place, (unit, own, own_stats) in enumerate(changes)
    )
    is_sound = all_finite((loss, gradients, stats))
    return chosen(is_sound, new, units), jnp.where(is_sound, loss, 0), is_sound


def moved(
    training: Training, like: PackedVariables, place: int, unit: Copy, gradients: Any, rate: Float[Array, ""]
) -> Copy:
    """The copy of unit `place` after one optimiser step along packed gradients."""
    gradients = training.adjusted(gradients, unit.params, like.params.arrays[place])
    now, own = (_for_optimizer(training, like, place, arrays) for arrays in (unit.params, gradients))
    updates, state = training.optimizer.update(own, unit.state, now)
    new: Any = jax.tree.map(lambda p, u: p + (rate * u).astype(p.dtype), now, updates)
    arrays = new.arrays[0] if isinstance(new, Packed) else pack((new[place],)).arrays[0]
    return unit._replace(params=arrays, state=state)


def chosen(condition: Bool[Array, "*K"], new: Any, old: Any) -> Any:
    """`new` where the condition holds, else `old`. The condition may have one entry for each client."""

    def of_leaf(a, b):
        return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b)

    return jax.tree.map(of_leaf, new, old)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _for_optimizer(training, like, place, arrays) -> Any:
    """Packed arrays of unit `place`, in the form that the optimiser takes.

    An optimiser that looks at single leaves or names gets a tuple of trees. Only that of this unit is not
    empty.
    """
    layouts = like.params.layouts
    packed = Packed((arrays,), (layouts[place],))
    if training.optimizer.may_join(layouts):
        return packed
    return tuple(packed.unpack()[0] if unit == place else {} for unit in range(len(layouts)))
