"""Local optimisers whose step can wait until the parameters are read again.

A step taken right after its gradient reads the old moments for two results: the new moments and the new
parameters. XLA knows no order for the two, so it copies all moments in every step. A step taken at the start
of the next one reads only the new moments. Then each array is overwritten in place after its last reading.
This saves a tenth of the time of a B0 step with Adam on two cores. The numbers are optax's.

The convention is optax's too: updates are added to the parameters, and contain the learning rate and the
sign. The rate of a round is a factor on the updates; 1 leaves them unchanged.

`--optimizer` takes the members of `registry.OPTIMIZERS`: functions of a momentum and `weight_decay` that
return a `LocalOptimizer` with learning rate 1.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sfl_jax.errors import BadInput
from sfl_jax.federated.elementwise import may_join
from sfl_jax.federated.packing import Layout

PROBE_STEPS = 20  # the most steps of a probe: some optimisers begin with steps of size 0
# Changes of other units that must have no influence: zero, so large that an epsilon vanishes, not finite.
OTHERS = (lambda x: 0 * x, lambda x: 1e12 * x, lambda x: x * np.nan)
# Parameters of two units, used if those of the network are not given.
PROBE = ({"kernel": np.zeros((2, 2), np.float32), "bias": np.zeros(2, np.float32)},) * 2


class LocalOptimizer(NamedTuple):
    """An optax transformation whose updates can be computed from its new state.

    init, update: optax's own. updates_of: (new state, parameters before the step) -> the updates. may_join:
    whether units with these layouts may have their leaves joined, because the transformation treats all
    numbers alike. slots: how many numbers it keeps for each parameter.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    updates_of: Callable[[Any, Any], Any]
    may_join: Callable[[tuple[Layout, ...]], bool]
    slots: int = 0


def sgd(momentum: float = 0.0, weight_decay: float = 0.0) -> LocalOptimizer:
    """Stochastic gradient descent with learning rate 1 and heavy-ball momentum. The decay goes through it."""
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    if not momentum:
        return _keeping_updates(optax.chain(decay, optax.scale(-1.0)))
    whole = optax.chain(decay, optax.trace(momentum), optax.scale(-1.0))

    def updates_of(state, params):
        return jax.tree.map(jnp.negative, state[1].trace)

    return LocalOptimizer(whole.init, whole.update, updates_of, lambda layouts: True, slots=1)


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0) -> LocalOptimizer:
    """Adam with learning rate 1 and decoupled weight decay.

    Sources: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101.
    """
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    whole = optax.chain(optax.scale_by_adam(b1, b2, eps), decay, optax.scale(-1.0))

    def updates_of(state, params):
        first, second = state[0].mu, state[0].nu
        mean = optax.tree.bias_correction(first, b1, state[0].count)
        square = optax.tree.bias_correction(second, b2, state[0].count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return jax.tree.map(jnp.negative, decay.update(updates, state[1], params)[0])

    return LocalOptimizer(whole.init, whole.update, updates_of, lambda layouts: True, slots=2)


def of_optax(transformation: optax.GradientTransformation, params: Any = None) -> LocalOptimizer:
    """Wraps any other optax transformation with its learning rate, for example `of_optax(optax.adamw(1e-3))`.

    It is tried on a few small arrays first. `params` (`Variables.params`) gives their names and axes, which
    an optimiser with a mask may need.

    Raises:
      BadInput: it cannot be run, or its updates point uphill, or what it does to one unit depends on the
        gradients of another. A clip by the global norm does the last. Client and server know only the
        gradients of their own units, so such an optimiser would give other numbers than in training without a
        cut.
    """
    like = PROBE if params is None else params
    _check(transformation, like)
    return _keeping_updates(transformation)._replace(slots=_slots(transformation, like))


def check_local(optimizer: Any) -> None:
    """Raises BadInput if this is not an optimiser for local steps."""
    if not isinstance(optimizer, LocalOptimizer):
        raise BadInput(
            f"optimizer: {type(optimizer).__name__}; must be sgd(...), adam(...) or of_optax(...) of "
            "sfl_jax.federated.optimizers; of_optax takes any optimiser of optax"
        )


def check_server(optimizer: Any) -> None:
    """Raises BadInput if this is not an optimiser for the server's step: an optax transformation or None."""
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise BadInput(
            f"server_optimizer: {type(optimizer).__name__}; must be None or an optimiser of optax, such as "
            "optax.sgd(1.0, momentum=0.5)"
        )


def _keeping_updates(transformation):
    """A local optimiser that keeps its updates in its state until they are applied."""

    def init(params):
        state = transformation.init(params)
        updates, _ = jax.eval_shape(transformation.update, params, state, params)
        return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), updates)

    def update(gradients, state, params):
        updates, own = transformation.update(gradients, state[0], params)
        return updates, (own, updates)

    is_alike = functools.partial(may_join, transformation)
    return LocalOptimizer(init, update, lambda state, params: state[1], is_alike)


def _slots(transformation, like) -> int:
    """How many numbers a transformation keeps for each parameter, rounded up."""
    state, params = jax.eval_shape(transformation.init, tuple(like)), tuple(like)
    kept, own = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if leaf.shape) for tree in (state, params)
    )
    return -(-kept // own) if own else 0


def _check(transformation, like):
    rng = np.random.default_rng(0)

    def numbers(leaf, size):
        return jnp.asarray(size * rng.normal(size=(2,) * len(leaf.shape)), leaf.dtype)

    # The parameters are small, so that weight decay is smaller than a step.
    params, gradients = (jax.tree.map(functools.partial(numbers, size=s), tuple(like)) for s in (1e-3, 1.0))
    # The last unit, because random numbers are dealt out from the first on.
    own = max((unit for unit, leaves in enumerate(gradients) if jax.tree.leaves(leaves)), default=0)
    later = [jax.tree.map(functools.partial(numbers, size=1.0), tuple(like)) for _ in range(PROBE_STEPS - 1)]
    steps = [gradients, *later]

    def of_own(change):
        """The updates of one unit while the gradients and parameters of the others are changed."""
        parts = [
            tuple(leaves if unit == own else change(leaves) for unit, leaves in enumerate(tree))
            for tree in (params, *steps)
        ]
        return _own_updates(transformation, parts[0], parts[1:], own)

    try:
        updates = _first_updates(transformation, params, gradients)
        expected = of_own(lambda leaves: leaves)
        found = [of_own(functools.partial(jax.tree.map, change)) for change in OTHERS]
    except Exception as error:
        raise BadInput(
            f"optimizer: cannot run on gradients and parameters alone ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); one that reads names needs of_optax(..., params)"
        ) from error
    downhill = -sum(np.vdot(u, g) for u, g in _pairs(updates, gradients))
    if not downhill >= 0:  # also refuses NaN
        raise BadInput(
            "optimizer: its updates point uphill, and optax adds them to the parameters; give it a learning "
            "rate, like optax.adamw(1e-3), or optax.scale(-rate) at the end of its chain"
        )
    with contextlib.suppress(Exception):  # an optimiser with labels needs every unit
        found.append(of_own(lambda _: {}))
    if any(not np.array_equal(a, b) for other in found for a, b in _pairs(expected, other)):
        raise BadInput(
            "optimizer: its update of one unit depends on the gradients of others, like a clip by the global "
            "norm, but client and server know only the gradients of their own units; optax.clip and "
            "optax.adaptive_grad_clip work unit by unit"
        )


def _first_updates(transformation, params, gradients):
    """The first updates that are not 0, with the same gradients in every step."""
    step, state = jax.jit(transformation.update), transformation.init(params)
    updates: Any = None
    for _ in range(PROBE_STEPS):
        updates, state = step(gradients, state, params)
        if any(np.any(leaf) for leaf in jax.tree.leaves(updates)):
            break
    return updates


def _own_updates(transformation, params, steps, own):
    """The updates of the unit `own` over steps with these gradients."""
    step, state, updates = jax.jit(transformation.update), transformation.init(params), []
    for gradients in steps:
        update, state = step(gradients, state, params)
        updates.append(update[own])
    return updates


def _pairs(tree, other):
    return zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (tree, other)), strict=True)
