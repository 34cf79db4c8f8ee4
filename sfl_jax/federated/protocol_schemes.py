"""The protocol of the schemes in which clients share a copy of some units: `sfl_v2`, `sl`, `psl`.

Every copy starts a round from the global model. A copy of a unit belongs to one client or is shared, and has
its own optimiser state. `shared_state` has the states of the shared copies by unit of the whole network
(None: fresh ones). The result has their states after the round, so that they can be kept. A unit that nobody
shared keeps the state that came in. A round that leaves the variables unchanged leaves the states unchanged,
too.

At the end of a round each unit becomes a mean over the clients of the copy that each used, weighted by the
clients' weights. So a shared copy gets the weights of all clients that used it. The loss of the round is the
mean, with the same weights, of each client's mean loss of a step.

A client with weight 0 did not come: it takes no step, and the weights of the others add up to 1. A step is
bad if its loss or the gradient of a parameter is not finite. A bad step changes nothing. Its client is left
out of the rest of the round, of the mean and of the loss. The messages of its bad step were sent. Its model
is not, except in `sl`, where it hands on its half. Like in `run_round`, the variables stay unchanged if a
client diverged without `skip_diverged`, or if nobody is left.
"""

from collections.abc import Sequence
from copy import copy as twin
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sfl_jax.federated import protocol
from sfl_jax.federated.protocol import (
    MODEL_DOWN,
    MODEL_UP,
    SERVER,
    ClientWork,
    Copy,
    Party,
    Session,
    Transport,
    World,
)

# Folded into the round's key, then the step, to make the key of units that work on a joined batch.
JOINED = 2**31 - 1


class Result(NamedTuple):
    """The result of a round.

    variables: of each unit. loss: NaN if nobody is left. diverged: ids of clients in the order of the cohort.
    shared_state: the optimiser state of the shared copies, by unit.
    """

    variables: list[dict[str, Any]]
    loss: float
    diverged: list[int]
    shared_state: list[Any]


def run_sfl_v2(
    world: World,
    works: Sequence[ClientWork],
    order: Sequence[int],
    by: str = "client",
    shared_state: Sequence[Any] | None = None,
    tail_units: int = 0,
    skip_diverged: bool = False,
    transport: Transport | None = None,
) -> Result:
    """SplitFed V2: own copies of the clients' units, and one shared copy of each unit at the server.

    The server's copies take a step after each client's batch. `order` is a permutation of the positions in
    `works`. by="client": in this order, each client takes all its steps. by="step": at step s, all clients
    that have one take it in this order. Then step s + 1 comes.
    """
    shared, transport = _shared_copies(world, shared_state), transport or Transport()
    sessions = {}
    for k in _present(works, order):
        span = protocol.server_span(len(shared), works[k].cut, tail_units)
        copies = [one if one.index in span else Copy(world, one.index) for one in shared]
        sessions[k] = Session(world, works[k], copies, tail_units, transport)
        sessions[k].carry(MODEL_DOWN)
    for k, step in _turns(works, list(sessions), by):
        _take_turn(sessions[k], step)
    for session in sessions.values():
        if not session.diverged:
            session.carry(MODEL_UP)
    return _outcome(world, sessions, shared, shared_state, skip_diverged)


def run_sl(
    world: World,
    works: Sequence[ClientWork],
    order: Sequence[int],
    shared_state: Sequence[Any] | None = None,
    tail_units: int = 0,
    skip_diverged: bool = False,
    transport: Transport | None = None,
) -> Result:
    """Split learning: one copy of every unit, handed from client to client in `order`.

    The client's units come down before its steps and go up after them. Their optimiser state goes with them;
    nobody counts its bytes. The result is that of SGD over the clients' batches one after another. With
    the identity codec it does not depend on the cuts.
    """
    shared, transport = _shared_copies(world, shared_state), transport or Transport()
    sessions = {}
    for k in _present(works, order):
        sessions[k] = Session(world, works[k], shared, tail_units, transport)
        sessions[k].carry(MODEL_DOWN)
        for step in range(len(works[k].batches)):
            _take_turn(sessions[k], step)
        sessions[k].carry(MODEL_UP)
    return _outcome(world, sessions, shared, shared_state, skip_diverged)


def run_psl(
    world: World,
    works: Sequence[ClientWork],
    max_cut: int,
    server_batch: str = "separate",
    shared_state: Sequence[Any] | None = None,
    tail_units: int = 0,
    skip_diverged: bool = False,
    transport: Transport | None = None,
) -> Result:
    """Parallel split learning: all clients step together. The server's units from `max_cut` on are shared.

    Below `max_cut` each client has its own copies: its own units, and a replica at the server of the units
    from its cut to `max_cut`. Its tail is its own, too. Own copies learn from the mean loss of their client's
    batch. At step s, the clients take part that have such a step. The shared copies take one step, with the
    mean gradient over all samples of these clients.

    server_batch="separate": each batch goes through the shared copies by itself, with its client's keys. Each
    batch gives new statistics from the same old ones. The mean over the clients is kept. "joined": the
    batches go through as one, in the order of the cohort. The step key of the shared units is then
    fold_in(fold_in(world.key, JOINED), s). The gradient that comes back to a client is rescaled from the mean
    over all samples to the mean over its own. A step that is bad for a client is repeated without this
    client, messages included. If no client can be blamed, all diverged.
    """
    if deep := [work.client for work in works if work.weight > 0 and work.cut > max_cut]:
        raise ValueError(f"max_cut={max_cut}: clients {deep} have larger cuts; choose smaller cuts")
    shared, transport = _shared_copies(world, shared_state), transport or Transport()
    top = len(shared) - tail_units
    common = shared[min(max_cut, top) : top]
    sessions = {}
    for k in _present(works, range(len(works))):
        copies = [one if one in common else Copy(world, one.index) for one in shared]
        sessions[k] = Session(world, works[k], copies, tail_units, transport)
        sessions[k].carry(MODEL_DOWN)
    compute = {"separate": _compute_separate, "joined": _compute_joined}[server_batch]
    for step in range(max((len(work.batches) for work in works), default=0)):
        active = [s for s in sessions.values() if not s.diverged and step < len(s.work.batches)]
        sound = compute(world, active, common, step)
        for session in active:
            session.diverged = session not in sound
        for session in sound:
            session.update(_own(session, common))
        for one in common if sound else ():
            one.update(SERVER, transport)
    for session in sessions.values():
        if not session.diverged:
            session.carry(MODEL_UP)
    return _outcome(world, sessions, shared, shared_state, skip_diverged)


def _compute_separate(world, sessions, common, step):
    """A step without its updates. Each batch goes through the shared copies alone. Returns sound sessions."""
    sound, visits = [], []
    for session in sessions:
        visited = {one.index: twin(one) for one in common}
        own, session.copies = session.copies, [visited.get(one.index, one) for one in session.copies]
        session.compute(step)
        if _is_sound(session, session.copies):
            sound.append(session)
            visits.append(visited)
        session.copies = own
    by_samples = _parts([len(session.work.batches[step]) for session in sound])
    for one in common if sound else ():
        visitors = [visited[one.index] for visited in visits]
        one.gradient = protocol.weighted_mean([visitor.gradient for visitor in visitors], by_samples)
        new = [visitor.collections for visitor in visitors]
        one.collections = protocol.weighted_mean(new, _parts([1] * len(new)))
    return sound


def _compute_joined(world, sessions, common, step):
    """A step without its updates. All batches go through the shared copies as one. Returns sound sessions."""
    if not common or not sessions:
        return _compute_separate(world, sessions, common, step)
    key = jax.random.fold_in(jax.random.fold_in(world.key, JOINED), step)
    transport, first = sessions[0].transport, common[0].index
    shared = Party(common, SERVER, transport)
    replicas = [Party(session.copies[session.span.start : first], SERVER, transport) for session in sessions]
    rows = [len(session.work.batches[step]) for session in sessions]
    parts = _parts(rows)

    def of_each(function, *arguments):
        return [function(*one) for one in zip(sessions, *arguments, strict=True)]

    def unless(bad):
        """Repeats the step without the bad sessions."""
        rest = [session for session, is_bad in zip(sessions, bad, strict=True) if not is_bad]
        return _compute_joined(world, rest, common, step)

    entering = of_each(lambda session, replica: replica.forward(session.up(step), session.key), replicas)
    # A bad client spoils the statistics of all, so it must be found before the batches are joined.
    seen = entering if first else map(world.preprocess, entering)
    if any(bad := [not protocol.is_finite(one) for one in seen]):
        return unless(bad)
    leaving = _divide(shared.forward(_join(entering), key), rows)
    gradients = of_each(Session.top, leaving)
    if any(bad := of_each(lambda session, g: not protocol.is_finite((session.loss, g)), gradients)):
        return unless(bad)
    of_joined = _divide(shared.backward(_join(map(_times, gradients, parts))), rows)
    of_own = map(_times, of_joined, [1 / part for part in parts])
    of_each(lambda session, replica, g: session.down(replica.backward(g)), replicas, of_own)
    if any(bad := of_each(lambda session: not _is_sound(session, _own(session, common)))):
        return unless(bad)
    return sessions if protocol.is_finite([one.gradient for one in common]) else []


def _own(session, common):
    return [one for one in session.copies if one not in common]


def _shared_copies(world, shared_state):
    states = [None] * len(world.units) if shared_state is None else shared_state
    return [Copy(world, index, state) for index, state in enumerate(states)]


def _present(works, order):
    return [k for k in order if works[k].weight > 0]


def _turns(works, order, by):
    """Pairs of position and step, in the order of time."""
    by_client = [(k, step) for k in order for step in range(len(works[k].batches))]
    # The sort is stable, so the clients of a step keep their order.
    return {"client": by_client, "step": sorted(by_client, key=lambda turn: turn[1])}[by]


def _take_turn(session, step):
    """One step with its updates, unless the client diverged."""
    if session.diverged:
        return
    session.compute(step)
    session.diverged = not _is_sound(session, session.copies)
    if not session.diverged:
        session.update(session.copies)


def _is_sound(session, copies):
    return protocol.is_finite((session.loss, [one.gradient for one in copies]))


def _outcome(world, sessions, shared, shared_state, skip_diverged):
    """The end of a round. Clients are summed in the order of the cohort."""
    ended = [sessions[k] for k in sorted(sessions)]
    sound = [(x.work, x.variables, x.mean_loss()) for x in ended if not x.diverged]
    diverged = [x.work.client for x in ended if x.diverged]
    variables, loss, diverged = protocol.average(world, sound, diverged, skip_diverged)
    is_kept = sound and (skip_diverged or not diverged)
    states = shared if is_kept else _shared_copies(world, shared_state)
    return Result(variables, loss, diverged, [one.state for one in states])


def _parts(numbers):
    return [number / sum(numbers) for number in numbers]


def _times(tree, factor):
    return jax.tree.map(lambda x: factor * x, tree)


def _join(trees):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _divide(tree, rows):
    """The inverse of `_join`, for parts with these numbers of rows."""
    ends = [sum(rows[: n + 1]) for n in range(len(rows))]
    return [
        jax.tree.map(lambda x, e=end, n=number: x[e - n : e], tree)
        for end, number in zip(ends, rows, strict=True)
    ]
