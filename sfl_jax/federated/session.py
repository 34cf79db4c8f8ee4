"""One client's local training through its cut: a pure function of variables, samples and keys.

One pass walks the units of the whole chain once. Unit i belongs to the client where i < cut and to that
client's replica on the server otherwise; a link acts where i == cut. Since the cut is data, changing it
compiles nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, Shaped

from sfl_jax.federated.optimizers import LocalOptimizer, check_local, check_server
from sfl_jax.federated.packing import Packed, PackedVariables, pack
from sfl_jax.models import Chain, Variables

# Folded into the key of a step for the link: a number that no unit has, then the direction.
LINK, UP, DOWN = 2**31, 0, 1


Loss = Callable[[Array, Array], Array]  # logits (B, classes), labels (B,) -> (B,)


def cross_entropy(logits: Float[Array, "B classes"], labels: Int[Array, " B"]) -> Float[Array, " B"]:
    """Cross-entropy of each sample, in the default float type or wider, whatever the logits' type."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.result_type(float)))
    return optax.softmax_cross_entropy_with_integer_labels(wide, labels)


class Link(NamedTuple):
    """What happens at the cut: `up` to smashed data (B, ...), `down` to its gradient, of the same shape.

    Both also take a key, which is that of the client's step and of the direction.
    """

    up: Callable[[Array, Key[Array, ""]], Array]
    down: Callable[[Array, Key[Array, ""]], Array]


class Samples(NamedTuple):
    """All training samples, resident on a device: images (N, H, W, C), labels (N,)."""

    images: Shaped[Array | np.ndarray, "*chunks_N_sample"]
    labels: Int[Array | np.ndarray, "*chunks N"]


class Assignment(NamedTuple):
    """What one client does in a round; with a leading axis, what K clients do.

    client: id, from which its keys are folded.
    cut: 0..L.
    weight: its part of the mean; 0 leaves it out exactly.
    steps: local steps that it runs, at most S.
    batches: (S, B) sample indices of every step.
    """

    client: Int[Array | np.ndarray, "*K"]
    cut: Int[Array | np.ndarray, "*K"]
    weight: Float[Array | np.ndarray, "*K"]
    steps: Int[Array | np.ndarray, "*K"]
    batches: Int[Array | np.ndarray, "*K S B"]


@dataclasses.dataclass(frozen=True)
class Training:
    """What stays the same for a whole run; static under jit.

    optimizer: of the local steps; the rate of a round is a factor on its updates.
    preprocess: uint8 images (B, H, W, C) -> float images of the network's size. link: acts where something
    crosses: not at cut 0, where images go up as they are, nor at cut L. None is the identity, which leaves no
    trace in the compiled program. server_optimizer: takes variables - mean as a gradient,
    once a round (Reddi et al., arXiv 2003.00295); None takes
      the mean itself, which is federated averaging. skip_diverged: whether a round goes on without the
      clients whose numbers are not finite; otherwise it changes nothing. loss: of each sample.

    Raises BadInput where an optimiser is none.
    """

    chain: Chain
    optimizer: LocalOptimizer
    preprocess: Callable[[Array], Array]
    link: Link | None = None
    server_optimizer: optax.GradientTransformation | None = None
    skip_diverged: bool = False
    loss: Loss = cross_entropy

    def __post_init__(self):
        check_local(self.optimizer)
        check_server(self.server_optimizer)


def run_session(
    training: Training,
    start: PackedVariables,
    samples: Samples,
    assignment: Assignment,
    round_key: Key[Array, ""],
    learning_rate: Float[Array, ""],
    each: Callable[..., Any] = lambda of_one: of_one,
) -> tuple[PackedVariables, Float[Array, "*K"]]:
    """(the variables after the client's steps from `start`, mean training loss of these steps).

    With `each=jax.vmap` those of all clients of `assignment`, step by step together: there are as many as in
    the longest session. Steps beyond a client's own change nothing, bitwise.
    """
    optimizer, loop_steps = training.optimizer, assignment.steps.max()
    first = start.params if optimizer.may_join(start.params.layouts) else start.params.unpack()

    def begin(one):
        state = optimizer.init(first)
        return first, start.batch_stats, state, jnp.zeros((), jnp.result_type(float))

    def moved(one, params, state, steps_done):
        """The parameters after the last of so many steps, if that was one of the client's own."""
        own = (steps_done > 0) & (steps_done <= one.steps)
        updates = optimizer.updates_of(state, params)
        return jax.tree.map(
            lambda p, u: jnp.where(own, p + (learning_rate * u).astype(p.dtype), p), params, updates
        )

    def step(one: Assignment, carry, index):
        params, old_stats, state, loss_sum = carry
        params = moved(one, params, state, index)
        batch = one.batches[index]
        images, labels = training.preprocess(samples.images[batch]), samples.labels[batch]
        key = jax.random.fold_in(jax.random.fold_in(round_key, one.client), index)

        def loss_of(params):
            units = params.unpack() if isinstance(params, Packed) else params
            now = Variables(units, old_stats.unpack())
            return batch_loss(training, now, images, labels, one.cut, key)

        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        _, state = optimizer.update(gradients, state, params)
        own = index < one.steps
        stats = jax.tree.map(lambda n, o: jnp.where(own, n, o), pack(stats), old_stats)
        # The state need not stay as it was after the client's last step: nothing reads it any more.
        return params, stats, state, jnp.where(own, loss_sum + loss, loss_sum)

    def end(one, carry):
        params, stats, state, loss_sum = carry
        params = moved(one, params, state, loop_steps)
        after = PackedVariables(params if isinstance(params, Packed) else pack(params), stats)
        return after, loss_sum / jnp.maximum(one.steps, 1)

    # The loop is around `each`: inside, JAX would trace its body anew until it knows what is mapped.
    def steps_of_all(index, carry):
        return each(lambda one, own: step(one, own, index))(assignment, carry)

    return each(end)(assignment, lax.fori_loop(0, loop_steps, steps_of_all, each(begin)(assignment)))


def batch_loss(training, variables, images, labels, cut, key):
    """(mean loss of the batch, new batch-norm statistics)."""
    logits, updated = training.chain.apply(
        variables, images, train=True, key=key, at_boundary=_crossing(training.link, cut, key)
    )
    return training.loss(logits, labels).mean(), updated.batch_stats


def _over_leaves(function, tree, key):
    """`function` of every array that crosses; from the second on, each has a key of its own."""
    leaves, structure = jax.tree.flatten(tree)
    keys = [key, *(jax.random.fold_in(key, place) for place in range(1, len(leaves)))]
    return jax.tree.unflatten(structure, map(function, leaves, keys))


def _crossing(link, cut, key):
    """A hook for `Chain.apply`: what enters unit `cut` goes through the link, and so does its gradient."""
    if link is None:
        return None

    # The keys are arguments: JAX does not let a custom gradient close over what it traces.
    @jax.custom_vjp
    def send(x, up_key, down_key):
        return _over_leaves(link.up, x, up_key)

    def answer(down_key, gradient):
        return _over_leaves(link.down, gradient, down_key), None, None

    send.defvjp(lambda x, up_key, down_key: (_over_leaves(link.up, x, up_key), down_key), answer)
    up_key, down_key = (
        jax.random.fold_in(jax.random.fold_in(key, LINK), direction) for direction in (UP, DOWN)
    )

    def at_boundary(unit, x):
        return x if unit == 0 else lax.cond(unit == cut, send, lambda x, *_: x, x, up_key, down_key)

    return at_boundary
