"""The protocol at the end of a round in which clients estimate the batch-norm statistics of the new model.

Each client gets the parameters of its units and takes its first batches once more. It sends the smashed
data, which no codec touches, and the server applies its units. Whoever holds a unit takes the mean statistics
of the batches. The client sends those of its units. The new statistics are the weighted mean over the
clients. Nobody applies a unit after the last one that has statistics.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sfl_jax.federated import protocol
from sfl_jax.federated.protocol import (
    FEATURES_DOWN,
    FORWARD,
    MODEL_DOWN,
    MODEL_UP,
    SMASHED_UP,
    ClientWork,
    Copy,
    Party,
    Session,
    Transport,
    World,
)

STATISTICS = "batch_stats"


def estimate_statistics(
    world: World,
    works: Sequence[ClientWork],
    batches: int,
    tail_units: int = 0,
    transport: Transport | None = None,
) -> list[dict[str, Any]]:
    """Returns the variables of `world`, the new model, with statistics of their own.

    works: those of the clients that take part; a client with weight 0 does not. batches: how many a client
    takes at most.
    """
    transport, came = transport or Transport(), [work for work in works if work.weight > 0]
    has = [index for index, variables in enumerate(world.variables) if variables.get(STATISTICS)]
    if not has or not came:
        return list(world.variables)
    copies = [Copy(world, index) for index in range(max(has) + 1)]
    means = [
        _of_client(world, work, batches, Session(world, work, copies, tail_units, transport)) for work in came
    ]
    total = sum(work.weight for work in came)
    mean = protocol.weighted_mean(means, [work.weight / total for work in came])
    return [
        variables | ({STATISTICS: mean[index]} if index in mean else {})
        for index, variables in enumerate(world.variables)
    ]


def _of_client(world, work, batches, session):
    """The mean statistics of the client's batches, by the number of the unit."""
    parties, transport = (session.client, session.server, session.tail), session.transport
    own = [*session.client.copies, *session.tail.copies]
    if own:
        transport.send(MODEL_DOWN, [copy.variables["params"] for copy in own])
    every = []
    for step in range(min(batches, len(work.batches))):
        key = jax.random.fold_in(jax.random.fold_in(world.key, work.client), step)
        x, found = world.images[work.batches[step]], {}
        for party, kind in zip(parties, (None, SMASHED_UP, FEATURES_DOWN), strict=True):
            if party.copies:
                x = _through(party, x if kind is None else transport.send(kind, x), key, found)
        every.append(found)
    mean = protocol.weighted_mean(every, [1 / len(every)] * len(every))
    if sent := {copy.index: mean[copy.index] for copy in own if copy.index in mean}:
        mean |= transport.send(MODEL_UP, sent)
    return mean


def _through(party: Party, x: Any, key: Any, found: dict[int, Any]) -> Any:
    """The output of the party's last unit. Adds the statistics of each unit to `found`."""
    for copy in party.copies:
        party.count(FORWARD, copy, x)
        x = copy.preprocess(x) if copy.index == 0 else x
        x, found_here = _statistics(copy, x, protocol.unit_key(key, copy.index))
        found |= {copy.index: found_here} if found_here is not None else {}
    return x


def _statistics(copy, x, key):
    """(the output, the statistics of this batch alone, which two values of the running statistics tell)"""

    def applied(value):
        old = copy.variables.get(STATISTICS, {})
        stats = {STATISTICS: jax.tree.map(lambda leaf: jnp.full_like(leaf, value), old)}
        return protocol.apply_unit(copy.unit, copy.variables | stats, x, key, tuple(stats))

    (output, zero), (_, one) = applied(0), applied(1)
    if not copy.variables.get(STATISTICS):
        return output, None
    return output, jax.tree.map(lambda a, b: a / (1 - (b - a)), zero[STATISTICS], one[STATISTICS])
