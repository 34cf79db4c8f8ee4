"""The certificate of a network: at every cut, two parties that exchange messages take the step of the whole.

One step of SGD is computed in float64 in two ways. The whole network takes it as one program. Two parties
take it unit by unit, by the messages of `protocol`, at each cut. Both draw the same dropout.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from sfl_jax.federated import protocol
from sfl_jax.models import Chain, Variables, units

LIMIT = 1e-10  # the largest difference that rounding may explain
RATE, CLIENT = 0.05, 0


class Row(NamedTuple):
    """A cut. loss: of the step by two parties.

    loss_difference: from the loss of the whole, relative to it. difference: the largest distance of a
    variable from that of the whole after the step, relative to the largest movement of its unit.
    messages: how many arrays or sets of arrays were sent in this step.
    """

    cut: int
    loss: float
    loss_difference: float
    difference: float
    messages: int

    @property
    def holds(self) -> bool:
        """Whether the cut changes nothing but rounding. A number that is not finite fails."""
        return self.difference <= LIMIT and self.loss_difference <= LIMIT


def certify(
    chain: Chain,
    shape: Sequence[int],
    batch_size: int = 4,
    classes: int = 10,
    seed: int = 0,
    tail_units: int = 0,
    say: Callable[[str], Any] = lambda text: None,
) -> Iterator[Row]:
    """A row for each cut 0..L of a network, on random images (batch_size, *shape) and labels below `classes`.

    tail_units: how many last units the client holds too. say: called with what is computed.

    Takes the time of a step for each cut, and that of compiling the whole and each kind of unit once.
    """
    with jax.enable_x64(True):
        key = jax.random.key(seed)
        images = jax.random.normal(jax.random.fold_in(key, 1), (batch_size, *shape), jnp.float64)
        labels = jnp.arange(batch_size) % classes
        variables = jax.tree.map(_doubled, chain.init(key, images))
        start = [chain.unit_variables(variables, index) for index in range(len(chain))]
        say("compiling the whole network")
        whole, loss = _whole_step(chain, variables, images, labels, key)
        world = protocol.World(
            list(map(_Party, chain.units)),
            start,
            optax.sgd(RATE),
            _unchanged,
            np.asarray(images),
            labels,
            key,
        )
    for cut in range(len(chain) + 1):
        say(f"cut {cut} of {len(chain)}" + (": compiling its units" if cut == 0 else ""))
        work = protocol.ClientWork(CLIENT, cut, 1.0, np.arange(batch_size)[None])
        transport = _Counting()
        with jax.enable_x64(True):
            parted, parted_loss = protocol.run_session(world, work, transport, tail_units)
            apart = float(np.max([*map(distance, parted, whole, start)]))  # NaN if one is, unlike max()
        yield Row(cut, parted_loss, _part(abs(parted_loss - loss), abs(loss)), apart, transport.count)


@dataclasses.dataclass(frozen=True)
class _Party:
    """A unit as the protocol calls it: a user's unit may take other arguments and random streams."""

    unit: nn.Module

    def apply(self, variables: Any, x: Any, train: bool, rngs: dict[str, Any], mutable: list[str]) -> Any:
        streams = units.streams(self.unit, rngs["params"])
        return self.unit.apply(variables, x, rngs=streams, mutable=mutable, **units.mode(self.unit, train))


class _Counting(protocol.Transport):
    """Keeps no message: those of a large network would fill the memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def send(self, kind: str, payload: Any) -> Any:
        arrived = super().send(kind, payload)
        self.messages.clear()
        self.count += kind not in (protocol.MODEL_DOWN, protocol.MODEL_UP)
        return arrived


def _whole_step(chain, variables, images, labels, key):
    """(the variables of each unit after a step, its loss), of the whole network as one program."""
    own_key = jax.random.fold_in(jax.random.fold_in(key, CLIENT), 0)

    def loss_of(params):
        logits, new = chain.apply(Variables(params, variables.batch_stats), images, train=True, key=own_key)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]), new.batch_stats

    @jax.jit
    def step(params):
        (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        moved = jax.tree.map(lambda p, g: p - RATE * g, params, gradient)
        return Variables(moved, batch_stats), loss

    moved, loss = step(variables.params)
    return [chain.unit_variables(moved, index) for index in range(len(chain))], float(loss)


def distance(parted: Any, whole: Any, start: Any) -> float:
    """The largest distance of two results of a step in one unit, over the largest movement from `start`.

    0 if both are equal, whatever moved. NaN if a number of either is.
    """
    return _part(_largest(parted, whole), _largest(whole, start))


def _part(distance: float, whole: float) -> float:
    """A distance relative to a number that may be 0."""
    if distance == 0:
        return 0.0
    return distance / whole if whole else np.inf


def _largest(a: Any, b: Any) -> float:
    """The largest distance between two trees, NaN if a distance is."""
    found = jax.tree.map(lambda x, y: np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0.0), a, b)
    return float(np.max(np.array([0.0, *jax.tree.leaves(found)])))


def _unchanged(images):
    return images


def _doubled(x):
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
