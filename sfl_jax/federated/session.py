"""One client's local training through its cut: a pure function of variables, samples and keys.

One pass walks the units of the whole chain once. Unit i belongs to the client if i < cut, and to the client's
server replica if not. A codec acts where i == cut. The cut is data, so changing it compiles nothing.
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
from sfl_jax.federated.crossing import CutCodecs
from sfl_jax.federated.optimizers import LocalOptimizer, check_local, check_server
from sfl_jax.federated.packing import Packed, PackedVariables, pack
from sfl_jax.federated.personal import Personal
from sfl_jax.models import Chain, Variables

Loss = Callable[[Array, Array], Array]  # logits (B, classes), labels (B,) -> (B,)
Augment = Callable[[Array, Array], Array]  # stored images (B, ...), key -> the same shape and type
AUGMENT = 2**31 + 1  # folded into the key of a step; no unit has this number, and no link


def cross_entropy(logits: Float[Array, "B classes"], labels: Int[Array, " B"]) -> Float[Array, " B"]:
    """The cross-entropy of each sample, in the default float type or wider, for logits of any type."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.result_type(float)))
    return optax.softmax_cross_entropy_with_integer_labels(wide, labels)


class Samples(NamedTuple):
    """Training samples: images (N, H, W, C), labels (N,). They stay on a device, or on the host in NumPy."""

    images: Shaped[Array | np.ndarray, "*chunks_N_sample"]
    labels: Int[Array | np.ndarray, "*chunks N"]


class Assignment(NamedTuple):
    """One client's work in a round. With a leading axis: that of K clients.

    client: the id, from which its keys are folded.
    cut: 0..L.
    weight: its weight in the mean. 0 leaves it out exactly.
    steps: its local steps, at most S.
    batches: (S, B) sample indices of every step.
    turn: its place in the order, from 0, if the scheme serves clients one after the other.
    codec: its place in `Training.codecs`, if there are several.
    """

    client: Int[Array | np.ndarray, "*K"]
    cut: Int[Array | np.ndarray, "*K"]
    weight: Float[Array | np.ndarray, "*K"]
    steps: Int[Array | np.ndarray, "*K"]
    batches: Int[Array | np.ndarray, "*K S B"]
    turn: Int[Array | np.ndarray, "*K"] | None = None
    codec: Int[Array | np.ndarray, "*K"] | None = None


class Scheme(Protocol):
    """How a round is trained. Static under jit."""

    def start(self, training: Any, variables: Variables) -> Any:
        """What the scheme keeps from round to round beside the variables, before the first round."""
        ...

    def run_round(self, *arguments: Any) -> Any:
        """Like `round.run_round`."""
        ...


@dataclasses.dataclass(frozen=True)
class Training:
    """What stays the same in a whole run. Static under jit.

    Attributes:
      optimizer: of the local steps. A round's learning rate is a factor on its updates.
      preprocess: uint8 images (B, H, W, C) -> float images of the network's size.
      codecs: act on what crosses the cut. Nothing crosses at cut L, and at cut 0 images go up unchanged. None
        is the identity, which adds nothing to the compiled program. From a tuple each client uses the one at
        `Assignment.codec`.
      server_optimizer: steps once a round, with variables - mean as its gradient (Reddi et al., arXiv
        2003.00295). None takes the mean itself, which is federated averaging.
      skip_diverged: whether a round leaves out clients whose numbers are not finite. If False, such a round
        changes nothing.
      loss: of each sample.
      scheme: whose copy of a unit a step uses, and in which order. None is SplitFed V1.
      tail_units: how many last units the client also holds, so that labels never leave it.
      augment: changes the stored images of a local step at random, before `preprocess`.
      proximal, clip_norm: see `gradients.adjusted`.
      personal: what each client keeps of its own from round to round; None is nothing.
      reestimates: whether the clients estimate the batch-norm statistics of the new model after each round.

    Raises:
      BadInput: an optimiser is not valid, or a number is outside its range.
    """

    chain: Chain
    optimizer: LocalOptimizer
    preprocess: Callable[[Array], Array]
    codecs: CutCodecs = None
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
        """The first unit of the tail; L without a tail."""
        return len(self.chain) - self.tail_units

    def alone(self) -> "Training":
        """The same training for clients that are computed one at a time."""
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
) -> tuple[PackedVariables, Float[Array, "*K"], Int[Array, "*K"]]:
    """Returns (the variables after the client's steps from `start`, the mean training loss of these steps,
    the number of steps up to the first whose loss is not finite, this one included).

    With `each=together` it returns those of all clients of `assignment`, which take each step together. The
    loop has as many steps as the longest session. Steps beyond a client's own change no bit. rows: what each
    client keeps of its own, see `Training.personal`.
    """
    optimizer, loop_steps = training.optimizer, assignment.steps.max()
    axis = crossing.CLIENTS if each is together else None

    def first(row):
        """The client's variables before its first step."""
        own = start if training.personal is None else training.personal.merged(start, row)
        return own.params if optimizer.may_join(own.params.layouts) else own.params.unpack(), own.batch_stats

    def begin(row):
        params, stats = first(row)
        return params, stats, optimizer.init(params), jnp.zeros((), jnp.result_type(float)), jnp.int32(0)

    def moved(one, params, state, steps_done):
        """The parameters after the last of `steps_done` steps, if it was one of the client's own steps."""
        own = (steps_done > 0) & (steps_done <= one.steps)
        updates = optimizer.updates_of(state, params)
        return jax.tree.map(
            lambda p, u: jnp.where(own, p + (learning_rate * u).astype(p.dtype), p), params, updates
        )

    def step(one: Assignment, row, carry, index):
        params, old_stats, state, loss_sum, taken = carry
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
        taken += own & jnp.isfinite(loss_sum)
        # The state is not masked after the client's last step, because nothing reads it then.
        return params, stats, state, jnp.where(own, loss_sum + loss, loss_sum), taken

    def end(one, carry):
        params, stats, state, loss_sum, taken = carry
        params = moved(one, params, state, loop_steps)
        after = PackedVariables(params if isinstance(params, Packed) else pack(params), stats)
        return after, loss_sum / jnp.maximum(one.steps, 1), taken

    # The loop is outside of `each`. Inside, JAX would trace its body again until it knows what is mapped.
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
    """(mean loss of a client's batch, new batch-norm statistics). codec, axis: see `crossing.hook`."""
    at_boundary = crossing.hook(training.codecs, training.tail, cut, codec, key, axis)
    logits, updated = training.chain.apply(variables, images, train=True, key=key, at_boundary=at_boundary)
    return training.loss(logits, labels).mean(), updated.batch_stats
