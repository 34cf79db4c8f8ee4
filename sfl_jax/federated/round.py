"""A round: the sessions of a cohort in vmapped chunks, and the weighted mean of what they learned."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from sfl_jax.federated import reestimation
from sfl_jax.federated.elementwise import may_join
from sfl_jax.federated.packing import Packed, PackedVariables, pack
from sfl_jax.federated.session import Assignment, Samples, Training, run_session, together
from sfl_jax.models import Variables


class Model(NamedTuple):
    """What a run keeps from round to round.

    packed: the global variables. server_state: the state of `Training.server_optimizer`. kept: what the
    scheme keeps, for example optimiser states of units with a single copy.
    """

    packed: PackedVariables
    server_state: Any = ()
    kept: Any = ()

    @classmethod
    def of(cls, variables: Variables, server_state: Any = ()) -> "Model":
        return cls(PackedVariables.of(variables), server_state)

    @property
    def variables(self) -> Variables:
        """The variables in the form that the chain takes."""
        return self.packed.unpack()


class Diverged(NamedTuple):
    """Who diverged. client: the id in the client's place, -1 for every other client. steps: how many steps it
    took, the bad one included; 0 for every other client.
    """

    client: Int[Array | np.ndarray, " K"]
    steps: Int[Array | np.ndarray, " K"]

    @classmethod
    def where(cls, is_bad: Bool[Array, " K"], client: Any, steps: Any) -> "Diverged":
        return cls(jnp.where(is_bad, client, -1), jnp.where(is_bad, steps, 0))


class Outcome(NamedTuple):
    """How a round went.

    loss, diverged: see `run_round`. came: how many clients took part.
    """

    loss: Float[Array, ""]
    diverged: Diverged
    came: Int[Array, ""]

    def is_last(self, training: Training) -> Any:
        """Whether the run ends after this round. Returns a bool of JAX or NumPy, like the outcome's arrays.

        It ends if a client's numbers are not finite and may not be skipped, or if the server's step is not
        finite.
        """
        diverged = (self.diverged.client >= 0).sum()
        of_server = (self.loss != self.loss) & (diverged < self.came)  # only NaN differs from itself
        return of_server if training.skip_diverged else of_server | (diverged > 0)


class Sums(NamedTuple):
    """Weighted sums over clients. `weight` is the sum of their weights."""

    variables: PackedVariables
    loss: Float[Array, ""]
    weight: Float[Array, ""]


def run_round(
    training: Training,
    clients_per_chunk: int,
    axis_name: str | None,
    model: Model,
    samples: Samples,
    assignments: Assignment,
    round_key: Key[Array, ""],
    learning_rate: Float[Array, ""],
    previous: Outcome | None = None,
) -> tuple[Model, Float[Array, ""], Diverged]:
    """One round. Returns (the new model, the weighted mean of the clients' losses, who diverged).

    A client diverged if its loss or its variables are not finite. Its bad step is the first whose loss is not
    finite, or else its last. A diverged client is never in the mean.

    The model stays unchanged in these cases:
    - a client diverged, and `training.skip_diverged` is False;
    - the server's step is not finite, or nobody came; then the loss is also NaN;
    - `previous` ended the run. A round may be sent before anybody has read the outcome of the one before.

    Under `axis_name` the arguments are one device's part, and the results are those of all devices.
    """
    sums, diverged, rows = sum_of_sessions(
        training, clients_per_chunk, model.packed, samples, assignments, round_key, learning_rate, model.kept
    )
    kept, of_own = model.kept, diverged.client >= 0
    if training.personal is not None:
        counts = jnp.asarray((assignments.weight > 0) & (diverged.client < 0))
        clients = jnp.asarray(assignments.client)
        kept = training.personal.stored(kept, clients, counts, rows, axis_name)
    if axis_name is not None:
        # Ids and steps are sent as a sum too, so that the devices exchange one kind of message once.
        here = jnp.stack([diverged.client + 1, diverged.steps])
        everywhere = jnp.zeros((2, lax.axis_size(axis_name), here.shape[1]), here.dtype)
        own = everywhere.at[:, lax.axis_index(axis_name)].set(here)
        sums, (ids, steps) = lax.psum((sums, own.reshape(2, -1)), axis_name)
        diverged = Diverged(ids - 1, steps)
    totals, like = (sums.variables, sums.loss), (model.packed, sums.loss)
    mean, loss = jax.tree.map(lambda x, old: narrow(x / sums.weight.astype(x.dtype), old), totals, like)
    finish = None
    if training.reestimates:
        rest = samples, assignments, of_own, round_key
        finish = functools.partial(_reestimated, training, clients_per_chunk, axis_name, *rest)
    return taken(training, model, Model(mean, kept=kept), loss, diverged, previous, finish)


def _reestimated(training, size, axis_name, samples, assignments, diverged, round_key, packed):
    rest = samples, assignments, diverged, round_key
    return reestimation.reestimated(training, size, axis_name, packed, *rest)


def taken(
    training: Training,
    model: Model,
    trained: Model,
    loss: Float[Array, ""],
    diverged: Diverged,
    previous: Outcome | None,
    finish: Callable[[PackedVariables], PackedVariables] | None = None,
) -> tuple[Model, Float[Array, ""], Diverged]:
    """What `run_round` returns for a round from `model`, whose clients' mean is `trained`.

    finish: changes the variables after the server's step.
    """
    new = _server_step(training.server_optimizer, model, trained.packed)._replace(kept=trained.kept)
    if finish is not None:
        new = new._replace(packed=finish(new.packed))
    sound = _finite(new)
    is_taken = sound if training.skip_diverged else sound & (diverged.client < 0).all()
    if previous is not None:
        is_taken &= ~previous.is_last(training)
    # Not a select: XLA would compile one for every leaf, with everything that it depends on.
    new = lax.cond(is_taken, lambda: new, lambda: model)
    return new, jnp.where(sound, loss, jnp.nan), diverged


def start_model(training: Training, variables: Variables, numpy: Any = jnp) -> Model:
    """The model before the first round; `numpy`: see `pack`."""
    model, optimizer = Model(PackedVariables.of(variables, numpy)), training.server_optimizer
    if training.scheme is not None:
        model = model._replace(kept=training.scheme.start(training, variables))
    elif training.personal is not None:
        model = model._replace(kept=training.personal.bank(model.packed))
    if optimizer is None:
        return model
    # As one program: by itself every array of the state would be one.
    return model._replace(server_state=jax.jit(optimizer.init)(_for_server(optimizer, model.packed.params)))


def _server_step(optimizer, model, mean):
    if optimizer is None:
        return model._replace(packed=mean)
    params, target = (_for_server(optimizer, packed.params) for packed in (model.packed, mean))
    gradients = jax.tree.map(jnp.subtract, params, target)
    updates, state = optimizer.update(gradients, model.server_state, params)
    params: Any = optax.apply_updates(params, updates)
    packed = mean._replace(params=params if isinstance(params, Packed) else pack(params))
    return Model(packed, state, model.kept)


def _for_server(optimizer, params: Packed) -> Any:
    """The parameters in the form that the server's optimiser takes."""
    return params if may_join(optimizer, params.layouts) else params.unpack()


def sum_of_sessions(
    training: Training,
    clients_per_chunk: int,
    start: PackedVariables,
    samples: Samples,
    assignments: Assignment,
    round_key: Key[Array, ""],
    learning_rate: Float[Array, ""],
    bank: Any = (),
) -> tuple[Sums, Diverged, Any]:
    """Returns (the weighted sums of variables and losses over K clients, who diverged, rows).

    Who diverged is as in `run_round`. rows: what each client keeps of its own, (K, ...) arrays, if
    `training.personal` is set. bank: what all clients kept before the round.

    Chunks of `clients_per_chunk` vmapped sessions run one after the other. It must divide K. So memory is
    that of one chunk and of the (K, S, B) sample indices. Sums are in float32 or wider. They overflow if a
    weight times a variable does, so weights should be at most 1, see `normalised`. An integer may be too
    large for a float, so its differences from `start` are added up. A client that diverged, or with weight 0,
    has no influence, whatever its numbers are.
    """
    chunks = jax.tree.map(lambda x: x.reshape(-1, clients_per_chunk, *x.shape[1:]), assignments)

    personal = training.personal

    def run_chunk(sums, chunk):
        rows = jax.tree.map(lambda x: x[chunk.client], bank) if personal else ()
        rest = round_key, learning_rate
        if clients_per_chunk == 1:
            own, row = jax.tree.map(lambda x: x[0], (chunk, rows))
            result = run_session(training.alone(), start, samples, own, *rest, rows=row)
            trained, loss, taken = jax.tree.map(lambda x: x[None], result)
        else:
            trained, loss, taken = run_session(training, start, samples, chunk, *rest, together, rows)
        weight = jax.vmap(_if_finite)(chunk.weight, (trained, loss))
        new = Sums(jax.tree.map(change, trained, start), loss, weight=jnp.ones_like(weight))
        diverged = Diverged.where(weight != chunk.weight, chunk.client, taken)
        sums = jax.tree.map(lambda total, x: total + _weighted_sum(weight, x), sums, new)
        return sums, (diverged, jax.vmap(personal.row)(trained) if personal else ())

    like = Sums(start, jnp.zeros((), jnp.result_type(float)), jnp.zeros((), assignments.weight.dtype))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), like)
    sums, (diverged, rows) = lax.scan(run_chunk, zeros, chunks)
    return sums, *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (diverged, rows))


def normalised(weights: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Divides the weights of a round by a power of two, so that their sum is at least 1/2 and less than 1.

    This changes no bit of a weighted mean. It keeps its sums finite if its numbers are.
    """
    _, exponent = np.frexp(np.sum(weights, dtype=np.float64))
    return np.ldexp(weights, -exponent).astype(weights.dtype)


@jax.jit  # traced once for each shape
def _weighted_sum(weights, values):
    values = values.astype(wide(values.dtype))
    weights = weights.astype(values.dtype).reshape(-1, *(1,) * (values.ndim - 1))
    # Masks by value and not by weight: LLVM would make a loop for each set of weights above 0.
    weighted = weights * jnp.where(jnp.isfinite(values), values, 0)
    # Unrolled, because XLA:CPU compiles equal sums once, but each reduction separately.
    return functools.reduce(jnp.add, (weighted[k] for k in range(len(weighted))))


def wide(type):
    """The type in which numbers of `type` are added up."""
    return jnp.promote_types(type, jnp.float32)


def change(after, before):
    """The part of a variable that is averaged. For an integer this is its change: floats cannot hold all
    integers.
    """
    signed = _signed(before.dtype)
    return after if signed is None else after.astype(signed) - before.astype(signed)


def narrow(mean, before):
    """The inverse of `change`: the variable with this mean, in its type. Integers and bools are rounded."""
    signed = _signed(before.dtype)
    if signed is None:
        return (mean > 0.5 if before.dtype == bool else mean).astype(before.dtype)
    return (before.astype(signed) + jnp.round(mean).astype(signed)).astype(before.dtype)


def _signed(type):
    """The integer type that holds the changes of a variable. None if the variable is no integer."""
    is_integer = jnp.issubdtype(type, jnp.integer)
    return jax.dtypes.canonicalize_dtype(jnp.promote_types(type, jnp.int32)) if is_integer else None


def _if_finite(weight, tree):
    """The weight if all numbers are finite, else 0."""
    return jnp.where(_are_finite(tree), weight, 0).min()


def _finite(tree):
    """Whether all numbers are."""
    return _are_finite(tree).all()


def _are_finite(tree):
    """Whether all numbers are, for each type: one kernel for all leaves of a type, and not one for each
    shape.

    A product by 0 is not used as a test, although it gives NaN for a number that is not finite. XLA turns 0 *
    (10 * x) into 0 * x, which is 0 even if 10 * x overflows. The reductions here also stop XLA from computing
    the leaves again for every number that depends on the result.
    """
    by_type: dict[Any, list[Any]] = {}
    for leaf in jax.tree.leaves(tree):
        by_type.setdefault(leaf.dtype, []).append(leaf.reshape(-1))
    return jnp.stack([jnp.isfinite(jnp.concatenate(leaves)).all() for leaves in by_type.values()])
