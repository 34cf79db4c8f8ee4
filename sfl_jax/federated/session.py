"""One client's local training through its cut: a pure function of variables, samples and keys.

One pass walks the units of the whole chain once. Unit i belongs to the client where i < cut and to that
client's replica on the server otherwise; a link acts where i == cut. Since the cut is data, changing it
compiles nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, Shaped

from sfl_jax.federated import crossing, gradients
from sfl_jax.federated.crossing import Links
from sfl_jax.federated.optimizers import LocalOptimizer, check_local, check_server
from sfl_jax.federated.packing import Packed, PackedVariables, pack
from sfl_jax.federated.personal import Personal
from sfl_jax.models import Chain, Variables

Loss = Callable[[Array, Array], Array]  # logits (B, classes), labels (B,) -> (B,)
Augment = Callable[[Array, Array], Array]  # stored images (B, ...), key -> the same shape and type
AUGMENT = 2**31 + 1  # folded into the key of a step; no unit has this number, and no link


def cross_entropy(logits: Float[Array, "B classes"], labels: Int[Array, " B"]) -> Float[Array, " B"]:
    """Cross-entropy of each sample, in the default float type or wider, whatever the logits' type."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.result_type(float)))
    return optax.softmax_cross_entropy_with_integer_labels(wide, labels)


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
    turn: when it is served, counted from 0, where a scheme serves clients one after the other.
    codec: which of the links of `Training` it uses, where there are several.
    """

    client: Int[Array | np.ndarray, "*K"]
    cut: Int[Array | np.ndarray, "*K"]
    weight: Float[Array | np.ndarray, "*K"]
    steps: Int[Array | np.ndarray, "*K"]
    batches: Int[Array | np.ndarray, "*K S B"]
    turn: Int[Array | np.ndarray, "*K"] | None = None
    codec: Int[Array | np.ndarray, "*K"] | None = None


class Scheme(Protocol):
    """How a round is trained; static under jit."""

    def start(self, training: Any, variables: Variables) -> Any:
        """What survives a round beside the variables, before the first."""
        ...

    def run_round(self, *arguments: Any) -> Any:
        """As `round.run_round`."""
        ...


@dataclasses.dataclass(frozen=True)
class Training:
    """What stays the same for a whole run; static under jit.

    Attributes:
      optimizer: of the local steps; the rate of a round is a factor on its updates.
      preprocess: uint8 images (B, H, W, C) -> float images of the network's size.
      link: acts where something crosses: not at cut 0, where images go up as they are, nor at cut L. None is
        the identity, which leaves no trace in the compiled program. Of several, each client uses the one that
        its `Assignment.codec` says.
      server_optimizer: takes variables - mean as a gradient, once a round (Reddi et al., arXiv 2003.00295);
        None takes the mean itself, which is federated averaging.
      skip_diverged: whether a round goes on without the clients whose numbers are not finite; otherwise it
        changes nothing.
      loss: of each sample.
      scheme: whose copy of a unit a step uses, and in which order; None is SplitFed V1.
      tail_units: the last units that the client holds too, so that labels never leave it.
      augment: changes the stored images of a local step at random, before `preprocess`.
      proximal, clip_norm: see `gradients.adjusted`.
      personal: what each client keeps of its own from round to round; None is nothing.
      reestimates: whether the clients estimate the batch-norm statistics of the new model after each round.

    Raises:
      BadInput: an optimiser that is none, or a number outside of its range.
    """

    chain: Chain
    optimizer: LocalOptimizer
    preprocess: Callable[[Array], Array]
    link: Links = None
    server_optimizer: optax.GradientTransformation | None = None
    skip_diverged: bool = False
    loss: Loss = cross_entropy
    scheme: Scheme | None = None
    tail_units: int = 0
    augment: Augment | None = None
    proximal: float = 0.0
    clip_norm: float = 0.0
    personal: Personal | None = None
    reestimates: bool = False

    @property
    def tail(self) -> int:
        """The first of the units that end at the client again; L where there are none."""
        return len(self.chain) - self.tail_units

    def alone(self) -> "Training":
        """The same, for clients that are computed one at a time."""
        return dataclasses.replace(self, chain=self.chain.alone())

    def __post_init__(self):
        check_local(self.optimizer)
        check_server(self.server_optimizer)
        gradients.check(self.proximal, self.clip_norm)

    def adjusted(self, gradient: Any, params: Any, start: Any) -> Any:
        """The gradient of one unit as the optimiser takes it, see `gradients.adjusted`."""
        return gradients.adjusted(gradient, params, start, self.proximal, self.clip_norm)


together = functools.partial(jax.vmap, axis_name=crossing.CLIENTS)


def run_session(
    training: Training,
    start: PackedVariables,
    samples: Samples,
    assignment: Assignment,
    round_key: Key[Array, ""],
    learning_rate: Float[Array, ""],
    each: Callable[..., Any] = lambda of_one: of_one,
    rows: Any = (),
) -> tuple[PackedVariables, Float[Array, "*K"]]:
    """(the variables after the client's steps from `start`, mean training loss of these steps).

    With `each=together` those of all clients of `assignment`, step by step together: there are as many as in
    the longest session. Steps beyond a client's own change nothing, bitwise. rows: what each client keeps of
    its own, see `Training.personal`.
    """
    optimizer, loop_steps = training.optimizer, assignment.steps.max()
    axis = crossing.CLIENTS if each is together else None

    def first(row):
        """The client's variables before its first step."""
        own = start if training.personal is None else training.personal.merged(start, row)
        return own.params if optimizer.may_join(own.params.layouts) else own.params.unpack(), own.batch_stats

    def begin(row):
        params, stats = first(row)
        return params, stats, optimizer.init(params), jnp.zeros((), jnp.result_type(float))

    def moved(one, params, state, steps_done):
        """The parameters after the last of so many steps, if that was one of the client's own."""
        own = (steps_done > 0) & (steps_done <= one.steps)
        updates = optimizer.updates_of(state, params)
        return jax.tree.map(
            lambda p, u: jnp.where(own, p + (learning_rate * u).astype(p.dtype), p), params, updates
        )

    def step(one: Assignment, row, carry, index):
        params, old_stats, state, loss_sum = carry
        params = moved(one, params, state, index)
        images, labels, key = batch(training, samples, one, index, round_key)

        def loss_of(params):
            units = params.unpack() if isinstance(params, Packed) else params
            now = Variables(units, old_stats.unpack())
            return batch_loss(training, now, images, labels, one.cut, key, one.codec, axis)

        (loss, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        gradient = by_unit(training.adjusted, gradient, params, first(row)[0])
        _, state = optimizer.update(gradient, state, params)
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
        return each(lambda one, row, own: step(one, row, own, index))(assignment, rows, carry)

    # All clients begin alike where they keep nothing of their own.
    begun = each(begin)(rows) if training.personal else each(lambda _: begin(()))(assignment)
    return each(end)(assignment, lax.fori_loop(0, loop_steps, steps_of_all, begun))


def batch(
    training: Training,
    samples: Samples,
    one: Assignment,
    index: Int[Array, ""],
    round_key: Key[Array, ""],
) -> tuple[Array, Array, Key[Array, ""]]:
    """(images as they enter the network, labels, key) of a client's step `index`."""
    rows = one.batches[index]
    key = jax.random.fold_in(jax.random.fold_in(round_key, one.client), index)
    images = samples.images[rows]
    if training.augment is not None:
        images = training.augment(images, jax.random.fold_in(key, AUGMENT))
    return training.preprocess(images), samples.labels[rows], key


def by_unit(function: Callable[..., Any], *trees: Any) -> Any:
    """`function` of each unit of trees that are packed, or have a pytree for each unit."""
    if isinstance(trees[0], Packed):
        arrays = tuple(map(function, *(tree.arrays for tree in trees)))
        return dataclasses.replace(trees[0], arrays=arrays)
    return tuple(map(function, *trees))


def batch_loss(training, variables, images, labels, cut, key, codec=None, axis=None):
    """(mean loss of a client's batch, new batch-norm statistics); codec, axis: see `crossing.hook`."""
    at_boundary = crossing.hook(training.link, training.tail, cut, codec, key, axis)
    logits, updated = training.chain.apply(variables, images, train=True, key=key, at_boundary=at_boundary)
    return training.loss(logits, labels).mean(), updated.batch_stats
