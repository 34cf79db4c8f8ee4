"""The reference: two parties that exchange messages, one client at a time, one unit at a time.

Each party has its own units, with their own variables and their own optimiser. What crosses is what the
protocol sends: smashed data and labels up, the gradient of the smashed data down, once a step; the client's
variables down before a session and up after it. Nothing is compiled as a whole, and everything is plain data:
Flax modules, arrays, an optimiser used as optax says. It imports no code of the compiled round, which tests
hold equal to it.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

MODEL_DOWN, MODEL_UP = "model_down", "model_up"
SMASHED_UP, LABELS_UP, GRADIENT_DOWN = "smashed_up", "labels_up", "gradient_down"
KINDS = (MODEL_DOWN, SMASHED_UP, LABELS_UP, GRADIENT_DOWN, MODEL_UP)  # of messages
# Folded into the key of a step for the link, then the direction.
LINK, UP, DOWN = 2**31, 0, 1


@dataclasses.dataclass(frozen=True)
class World:
    """What the clients of a round share.

    units: of the whole network. variables: of each unit, by collection, as Flax takes them.
    optimizer: with its learning rate. preprocess: images (B, H, W, C) as they lie there to the network's
    input. key: of the round. up, down: what the link does to smashed data and to their gradient, given a key
    too.
    """

    units: Sequence[nn.Module]
    variables: Sequence[dict[str, Any]]
    optimizer: optax.GradientTransformation
    preprocess: Callable[[Array], Array]
    images: Array | np.ndarray
    labels: Int[Array, " N"]
    key: Key[Array, ""]
    up: Callable[[Array, Key[Array, ""]], Array] = lambda x, key: x
    down: Callable[[Array, Key[Array, ""]], Array] = lambda gradient, key: gradient


@dataclasses.dataclass(frozen=True)
class Work:
    """What one client does in a round: `batches` are the (S, B) sample indices of its own steps."""

    client: int
    cut: int
    weight: float
    batches: np.ndarray


class Wire:
    """Carries messages between the parties, as NumPy arrays.

    Attributes:
      messages: (kind, payload) in their order; kinds are those of `KINDS`.
      bytes: how many went over it, by kind.
    """

    def __init__(self):
        self.messages: list[tuple[str, Any]] = []
        self.bytes: collections.Counter[str] = collections.Counter()

    def send(self, kind: str, payload: Any) -> Any:
        """The payload as it arrives."""
        arrived = jax.tree.map(np.asarray, payload)
        self.messages.append((kind, arrived))
        self.bytes[kind] += sum(leaf.nbytes for leaf in jax.tree.leaves(arrived))
        return arrived


class Copy:
    """One party's copy of a unit: its variables and the state of its optimiser."""

    def __init__(self, world: World, index: int):
        self.unit, self.index, self.variables = world.units[index], index, dict(world.variables[index])
        self.optimizer = world.optimizer
        self.state = self.optimizer.init(self.variables["params"])

    def forward(self, x: Any, step_key: Key[Array, ""]) -> Any:
        """The unit's output. Keeps what `backward` needs, and the new state of the unit."""
        key = unit_key(step_key, self.index)
        kept = {name: tree for name, tree in self.variables.items() if name != "params"}

        def run(params, x):
            return _apply(self.unit, {"params": params} | kept, x, key, tuple(kept))

        output, self.pullback, new = jax.vjp(run, self.variables["params"], x, has_aux=True)
        self.variables |= new
        return output

    def backward(self, gradient: Any) -> Any:
        """The gradient of the unit's input; takes a step of its parameters."""
        params = self.variables["params"]
        own, of_input = self.pullback(gradient)
        self.variables["params"], self.state = _step(self.optimizer, own, self.state, params)
        return of_input


class Party:
    """Who holds the units [first, last)."""

    def __init__(self, world: World, first: int, last: int):
        self.copies = [Copy(world, index) for index in range(first, last)]
        self.preprocess = world.preprocess

    @property
    def variables(self) -> list[dict[str, Any]]:
        """Those of its units."""
        return [copy.variables for copy in self.copies]

    def receive(self, variables: Sequence[dict[str, Any]]) -> None:
        """Take the variables of its units from a message."""
        for copy, own in zip(self.copies, variables, strict=True):
            copy.variables = dict(own)

    def forward(self, x: Any, step_key: Key[Array, ""]) -> Any:
        """The output of the last unit. Unit 0 takes images as they lie there."""
        now: Any = x
        for copy in self.copies:
            now = copy.forward(self.preprocess(now) if copy.index == 0 else now, step_key)
        return now

    def backward(self, gradient: Any) -> Any:
        """The gradient of what entered the first unit; every unit takes its step."""
        now: Any = gradient
        for copy in reversed(self.copies):
            now = copy.backward(now)
        return now

    def finish(self, logits: Array, labels: Int[Array | np.ndarray, " B"]) -> tuple[Array, float]:
        """Takes a step from logits; (the gradient of what entered the first unit, the loss)."""
        loss, gradient = jax.value_and_grad(mean_cross_entropy)(logits, labels)
        return self.backward(gradient), float(loss)


def run_session(world: World, work: Work, wire: Wire | None = None) -> tuple[list[dict[str, Any]], float]:
    """(the variables of each unit after the session, the mean loss of its steps, 0 of none).

    The client holds the units before the cut. The server holds a replica of the others for this client.
    """
    wire, last = wire or Wire(), len(world.units)
    client, server = Party(world, 0, work.cut), Party(world, work.cut, last)
    client.receive(wire.send(MODEL_DOWN, client.variables))
    losses = []
    for step, rows in enumerate(work.batches):
        key = jax.random.fold_in(jax.random.fold_in(world.key, work.client), step)
        images, labels = world.images[rows], world.labels[rows]
        if work.cut == last:
            _, loss = client.finish(client.forward(images, key), labels)
        elif work.cut == 0:
            stored, known = wire.send(SMASHED_UP, images), wire.send(LABELS_UP, labels)
            _, loss = server.finish(server.forward(stored, key), known)
        else:
            coded = _each(world.up, client.forward(images, key), link_key(key, UP))
            smashed, known = wire.send(SMASHED_UP, coded), wire.send(LABELS_UP, labels)
            gradient, loss = server.finish(server.forward(smashed, key), known)
            coded = wire.send(GRADIENT_DOWN, gradient)
            client.backward(_each(world.down, coded, link_key(key, DOWN)))
        losses.append(loss)
    variables = wire.send(MODEL_UP, client.variables) + server.variables
    return variables, float(np.mean(losses)) if losses else 0.0


def run_round(
    world: World, works: Sequence[Work], skip_diverged: bool = False, wire: Wire | None = None
) -> tuple[list[dict[str, Any]], float, list[int]]:
    """(the weighted mean of each unit over the clients, that of their losses, the clients that diverged).

    A client of weight 0 did not come. One whose loss or variables are not finite is in no mean; without
    `skip_diverged` the variables then stay as they were, as they do where nobody is left, with loss NaN.
    """
    came = [work for work in works if work.weight > 0]
    results = [(work, *run_session(world, work, wire)) for work in came]
    sound = [one for one in results if _is_finite(one[1:])]
    diverged = [work.client for work, *one in results if not _is_finite(one)]
    total = sum(work.weight for work, *_ in sound)
    loss = sum(work.weight * loss for work, _, loss in sound) / total if sound else np.nan
    if not sound or (diverged and not skip_diverged):
        return list(world.variables), loss, diverged

    def mean(*leaves):
        exact = sum(
            work.weight / total * np.asarray(leaf, np.float64)
            for (work, *_), leaf in zip(sound, leaves, strict=True)
        )
        is_integer = jnp.issubdtype(leaves[0].dtype, jnp.integer)
        return jnp.asarray(np.round(exact) if is_integer else exact, leaves[0].dtype)

    return jax.tree.map(mean, *(variables for _, variables, _ in sound)), loss, diverged


def _each(link, arrays, key):
    """The link on every array that crosses; all but the first have a key folded from its place."""
    leaves, structure = jax.tree.flatten(arrays)
    sent = [link(leaf, jax.random.fold_in(key, n) if n else key) for n, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, sent)


def unit_key(step_key: Key[Array, ""], index: int) -> Key[Array, ""]:
    """The key from which unit `index` of the whole network draws."""
    return jax.random.fold_in(step_key, index)


def link_key(step_key: Key[Array, ""], direction: int) -> Key[Array, ""]:
    """The key that the link gets in one direction."""
    return jax.random.fold_in(jax.random.fold_in(step_key, LINK), direction)


def mean_cross_entropy(
    logits: Float[Array, "B classes"], labels: Int[Array | np.ndarray, " B"]
) -> Float[Array, ""]:
    """The mean of -log softmax(logits) at the labels."""
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - picked).mean()


@functools.partial(jax.jit, static_argnames=("unit", "mutable"))
def _apply(unit, variables, x, key, mutable):
    return unit.apply(variables, x, train=True, rngs={"params": key, "drop": key}, mutable=list(mutable))


@functools.partial(jax.jit, static_argnames="optimizer")
def _step(optimizer, gradients, state, params):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def _is_finite(tree):
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))
