"""The reference: two parties that exchange messages, one client at a time, one unit at a time.

Each party has its own units, variables and optimiser. The messages are those of the protocol. In each step,
smashed data and labels go up, and the gradient of the smashed data comes down. The client's variables go down
before a session and up after it. Nothing is compiled as a whole. Everything is plain data: Flax modules,
arrays, an optax optimiser. This file imports no code of the compiled round. Tests hold the two equal.

With a tail of n units (a U-shape) the client also holds the last n units, and no label leaves it. A step then
has four messages: smashed data up, features down, the features' gradient up, the smashed data's gradient
down. A cut of L - n or more leaves nothing to the server and equals cut L.

A codec acts on smashed data and their gradient if both sides hold units below the tail, so not at cut 0 or L.
At the tail it acts on features and their gradient at every cut below L - n. `up` acts on what goes up, `down`
on what comes down.

This file has the parts and the schemes `sfl` and `fl` (`sfl` with every cut L). `protocol_schemes` has the
other schemes.
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
from jaxtyping import Array, Float, Int, Key

MODEL_DOWN, MODEL_UP = "model_down", "model_up"
SMASHED_UP, LABELS_UP, GRADIENT_DOWN = "smashed_up", "labels_up", "gradient_down"
FEATURES_DOWN, GRADIENT_UP = "features_down", "gradient_up"  # with a tail
KINDS = (MODEL_DOWN, SMASHED_UP, LABELS_UP, FEATURES_DOWN, GRADIENT_UP, GRADIENT_DOWN, MODEL_UP)
SERVER, FORWARD, BACKWARD = "server", "forward", "backward"
# Folded into a step's key to make a codec's key, then the direction, then TAIL at the tail's boundary.
CODEC, UP, DOWN, TAIL = 2**31, 0, 1, 2**31
AUGMENT = 2**31 + 1  # folded into a step's key for the random change of its images


@dataclasses.dataclass(frozen=True)
class World:
    """What the clients of a round share.

    units: the whole network, Flax modules or what has their `apply`. variables: of each unit, by collection,
    in Flax's form. optimizer: with its learning rate. preprocess: stored images (B, H, W, C) -> the network's
    input. key: of the round. up, down: the codec for what goes up and for what comes down; each also takes a
    key.
    augment: changes the stored images of a step; it also takes a key. proximal: a copy's gradient gains this
    times its distance from the global parameters. clip_norm: the largest norm of a copy's gradient; 0 is any.
    """

    units: Sequence[Any]
    variables: Sequence[dict[str, Any]]
    optimizer: optax.GradientTransformation
    preprocess: Callable[[Array], Array]
    images: Array | np.ndarray
    labels: Int[Array, " N"]
    key: Key[Array, ""]
    up: Callable[[Array, Key[Array, ""]], Array] = lambda x, key: x
    down: Callable[[Array, Key[Array, ""]], Array] = lambda gradient, key: gradient
    augment: Callable[[Any, Key[Array, ""]], Any] = lambda images, key: images
    proximal: float = 0.0
    clip_norm: float = 0.0


@dataclasses.dataclass(frozen=True)
class ClientWork:
    """One client's work in a round. `batches`: the (S, B) sample indices of its own steps."""

    client: int
    cut: int
    weight: float
    batches: np.ndarray


class Transport:
    """Carries messages between the parties, in NumPy arrays.

    Attributes:
      messages: (kind, payload) in their order. Kinds are those of `KINDS`.
      bytes: sent bytes by kind.
      applied: samples that went through a unit, by holder (SERVER or a client's id), by direction (FORWARD or
        BACKWARD) and by the unit's number.
      pulled: how often FedProx's term was added to a unit's gradient, by holder and by the unit's number.
    """

    def __init__(self):
        self.messages: list[tuple[str, Any]] = []
        self.bytes: collections.Counter[str] = collections.Counter()
        self.applied: collections.Counter[tuple[str | int, str, int]] = collections.Counter()
        self.pulled: collections.Counter[tuple[str | int, int]] = collections.Counter()

    def send(self, kind: str, payload: Any) -> Any:
        """The payload as it arrives."""
        arrived = jax.tree.map(np.asarray, payload)
        self.messages.append((kind, arrived))
        self.bytes[kind] += sum(leaf.nbytes for leaf in jax.tree.leaves(arrived))
        return arrived


class Copy:
    """One party's copy of a unit: its variables and its optimiser's state (None: a fresh one).

    `forward` and `backward` compute what a step would change. `update` changes it.
    """

    def __init__(self, world: World, index: int, state: Any = None):
        self.unit, self.index, self.variables = world.units[index], index, dict(world.variables[index])
        self.preprocess, self.optimizer, self.world = world.preprocess, world.optimizer, world
        self.state = self.optimizer.init(self.variables["params"]) if state is None else state

    def forward(self, x: Any, step_key: Key[Array, ""]) -> Any:
        """The unit's output. Unit 0 takes stored images. Keeps what `backward` needs."""
        key = unit_key(step_key, self.index)
        kept = {name: tree for name, tree in self.variables.items() if name != "params"}

        def run(params, x):
            return apply_unit(self.unit, {"params": params} | kept, x, key, tuple(kept))

        x = self.preprocess(x) if self.index == 0 else x
        output, self.pullback, self.collections = jax.vjp(run, self.variables["params"], x, has_aux=True)
        return output

    def backward(self, gradient: Any) -> Any:
        """The gradient of the unit's input. Keeps the gradient of its parameters."""
        self.gradient, of_input = self.pullback(gradient)
        return of_input

    def update(self, holder: str | int, transport: Transport) -> None:
        """Takes the step. Parameters follow the gradient; other collections become those of `forward`.

        holder: who holds the copy, SERVER or a client's id.
        """
        transport.pulled[holder, self.index] += self.world.proximal > 0
        params = self.variables["params"]
        start = self.world.variables[self.index]["params"]
        gradient = _adjusted(self.gradient, params, start, self.world.proximal, self.world.clip_norm)
        params, self.state = _step(self.optimizer, gradient, self.state, params)
        self.variables = self.variables | self.collections | {"params": params}


class Party:
    """The holder of these copies of neighbouring units: SERVER or a client's id. There may be none."""

    def __init__(self, copies: Sequence[Copy], holder: str | int, transport: Transport):
        self.copies, self.holder, self.applied = copies, holder, transport.applied

    def forward(self, x: Any, step_key: Key[Array, ""]) -> Any:
        """The output of the last unit."""
        now: Any = x
        for copy in self.copies:
            self.count(FORWARD, copy, now)
            now = copy.forward(now, step_key)
        return now

    def backward(self, gradient: Any) -> Any:
        """The gradient of the first unit's input."""
        now: Any = gradient
        for copy in reversed(self.copies):
            self.count(BACKWARD, copy, now)
            now = copy.backward(now)
        return now

    def count(self, direction: str, copy: Copy, batch: Any) -> None:
        """Notes that a batch goes through a copy."""
        self.applied[self.holder, direction, copy.index] += len(jax.tree.leaves(batch)[0])


def server_span(units: int, cut: int, tail_units: int = 0) -> range:
    """The numbers of the server's units, in a network of `units` units."""
    top = units - tail_units
    return range(cut, top) if cut < top else range(units, units)


class Session:
    """One client's work in a round, with copies of all units, whoever holds them.

    A step is `up`, the server's forward pass, `top`, the server's backward pass, `down`. None of these
    changes a variable.

    Attributes:
      copies: of each unit. The server holds those in `span`, the client the others.
      losses: of the steps that were taken.
      diverged: whether it was left out after a bad step (in `protocol_schemes`).
    """

    def __init__(
        self, world: World, work: ClientWork, copies: Sequence[Copy], tail_units: int, transport: Transport
    ):
        self.world, self.work, self.transport, self.copies = world, work, transport, list(copies)
        self.span = server_span(len(world.units), work.cut, tail_units)
        self.losses: list[float] = []
        self.diverged = False

    @property
    def client(self) -> Party:
        """The copies that the client holds below the cut."""
        return Party(self.copies[: self.span.start], self.work.client, self.transport)

    @property
    def server(self) -> Party:
        """The copies that the server holds."""
        return Party(self.copies[self.span.start : self.span.stop], SERVER, self.transport)

    @property
    def tail(self) -> Party:
        """The copies that the client holds above the server's units."""
        return Party(self.copies[self.span.stop :], self.work.client, self.transport)

    @property
    def variables(self) -> list[dict[str, Any]]:
        """The variables of each unit."""
        return [copy.variables for copy in self.copies]

    def carry(self, kind: str) -> None:
        """Sends the variables of the client's units, below the cut and in the tail, in one message."""
        own = [*self.client.copies, *self.tail.copies]
        for copy, arrived in zip(
            own, self.transport.send(kind, [copy.variables for copy in own]), strict=True
        ):
            copy.variables = dict(arrived)

    def up(self, step: int) -> Any:
        """The input of the server's first unit at this step, or the logits if the server has no unit."""
        key = jax.random.fold_in(jax.random.fold_in(self.world.key, self.work.client), step)
        rows = self.work.batches[step]
        self.key, self.labels = key, self.world.labels[rows]
        images = self.world.augment(self.world.images[rows], jax.random.fold_in(key, AUGMENT))
        smashed = self.client.forward(images, key)
        if not self.span:
            return smashed
        if self.client.copies:
            smashed = _each(self.world.up, smashed, codec_key(key, UP))
        smashed = self.transport.send(SMASHED_UP, smashed)
        if not self.tail.copies:
            self.labels = self.transport.send(LABELS_UP, self.labels)
        return smashed

    def top(self, features: Any) -> Any:
        """The gradient of the output of the server's last unit. Keeps the loss."""
        if not self.tail.copies:
            self.loss, gradient = _loss_and_gradient(features, self.labels)
            return gradient
        key = jax.random.fold_in(codec_key(self.key, DOWN), TAIL)
        features = self.transport.send(FEATURES_DOWN, _each(self.world.down, features, key))
        logits = self.tail.forward(features, self.key)
        self.loss, gradient = _loss_and_gradient(logits, self.labels)
        key = jax.random.fold_in(codec_key(self.key, UP), TAIL)
        return self.transport.send(GRADIENT_UP, _each(self.world.up, self.tail.backward(gradient), key))

    def down(self, gradient: Any) -> None:
        """Sends the gradient of the input of the server's first unit to the client."""
        if self.span and self.client.copies:
            coded = _each(self.world.down, gradient, codec_key(self.key, DOWN))
            gradient = self.transport.send(GRADIENT_DOWN, coded)
        self.client.backward(gradient)

    def compute(self, step: int) -> None:
        """A step without its updates."""
        features = self.server.forward(self.up(step), self.key)
        self.down(self.server.backward(self.top(features)))

    def update(self, copies: Sequence[Copy]) -> None:
        """Counts the step and updates these copies."""
        self.losses.append(float(self.loss))
        for copy in copies:
            copy.update(SERVER if copy.index in self.span else self.work.client, self.transport)

    def mean_loss(self) -> float:
        """The mean loss of the steps that were taken; 0 for none."""
        return float(np.mean(self.losses)) if self.losses else 0.0


def run_session(
    world: World, work: ClientWork, transport: Transport | None = None, tail_units: int = 0
) -> tuple[list[dict[str, Any]], float]:
    """Returns (the variables of each unit after the session, the mean loss of its steps or 0 for none).

    The client holds the units before the cut and the tail. The server holds a replica of the others for this
    client. A step whose loss is not finite is the last one. A client that diverged does not send its model.
    """
    copies = [Copy(world, index) for index in range(len(world.units))]
    session = Session(world, work, copies, tail_units, transport or Transport())
    session.carry(MODEL_DOWN)
    for step in range(len(work.batches)):
        session.compute(step)
        session.update(copies)
        if not is_finite(session.loss):
            break
    if is_finite((session.variables, session.mean_loss())):
        session.carry(MODEL_UP)
    return session.variables, session.mean_loss()


def run_round(
    world: World,
    works: Sequence[ClientWork],
    skip_diverged: bool = False,
    transport: Transport | None = None,
    tail_units: int = 0,
) -> tuple[list[dict[str, Any]], float, list[int]]:
    """Returns (the weighted mean of each unit over the clients, their weighted mean loss, who diverged).

    A client with weight 0 did not come. A client whose loss or variables are not finite diverged and is in no
    mean. The variables stay unchanged if a client diverged without `skip_diverged`. They also do if nobody is
    left; the loss is then NaN.
    """
    came = [work for work in works if work.weight > 0]
    results = [(work, *run_session(world, work, transport, tail_units)) for work in came]
    sound = [one for one in results if is_finite(one[1:])]
    diverged = [work.client for work, *one in results if not is_finite(one)]
    return average(world, sound, diverged, skip_diverged)


def average(
    world: World,
    sound: Sequence[tuple[ClientWork, Sequence[dict[str, Any]], float]],
    diverged: list[int],
    skip_diverged: bool,
) -> tuple[list[dict[str, Any]], float, list[int]]:
    """What `run_round` returns at the end of a round, from (work, variables, loss) of the sound clients."""
    total = sum(work.weight for work, *_ in sound)
    weights = [work.weight / total for work, *_ in sound]
    loss = sum(w * loss for w, (*_, loss) in zip(weights, sound, strict=True)) if sound else np.nan
    if not sound or (diverged and not skip_diverged):
        return list(world.variables), loss, diverged
    return weighted_mean([list(variables) for _, variables, _ in sound], weights), loss, diverged


def weighted_mean(trees: Sequence[Any], weights: Sequence[float]) -> Any:
    """The sum of weight times tree, computed in float64. Integers are rounded."""

    def mean(*leaves):
        exact = sum(w * np.asarray(leaf, np.float64) for w, leaf in zip(weights, leaves, strict=True))
        is_integer = jnp.issubdtype(leaves[0].dtype, jnp.integer)
        return jnp.asarray(np.round(exact) if is_integer else exact, leaves[0].dtype)

    return jax.tree.map(mean, *trees)


def _each(codec, arrays, key):
    """Applies the codec to every array. Each array after the first has a key folded from its place."""
    leaves, structure = jax.tree.flatten(arrays)
    sent = [codec(leaf, jax.random.fold_in(key, n) if n else key) for n, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, sent)


def unit_key(step_key: Key[Array, ""], index: int) -> Key[Array, ""]:
    """The key from which unit `index` of the whole network draws."""
    return jax.random.fold_in(step_key, index)


def codec_key(step_key: Key[Array, ""], direction: int) -> Key[Array, ""]:
    """The key that the codec gets in one direction."""
    return jax.random.fold_in(jax.random.fold_in(step_key, CODEC), direction)


def mean_cross_entropy(
    logits: Float[Array, "B classes"], labels: Int[Array | np.ndarray, " B"]
) -> Float[Array, ""]:
    """The mean of -log softmax(logits) at the labels."""
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - picked).mean()


_loss_and_gradient = jax.jit(jax.value_and_grad(mean_cross_entropy))


@functools.partial(jax.jit, static_argnames=("unit", "mutable"))
def apply_unit(unit, variables, x, key, mutable):
    """(the unit's output in training, what it changes of the collections `mutable`)"""
    return unit.apply(variables, x, train=True, rngs={"params": key, "drop": key}, mutable=list(mutable))


@functools.partial(jax.jit, static_argnames="optimizer")
def _step(optimizer, gradients, state, params):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def _adjusted(gradient, params, start, proximal, clip_norm):
    """The gradient of a copy with FedProx's term, no longer than `clip_norm`."""
    moved = jax.tree.map(lambda g, p, s: g + proximal * (p - s), gradient, params, start)
    length = optax.tree.norm(moved)
    if not clip_norm or length <= clip_norm:
        return moved
    return jax.tree.map(lambda g: g * (clip_norm / length), moved)


def is_finite(tree: Any) -> bool:
    """Whether all numbers are finite."""
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))
