"""Whole sessions, one client after the other. The server's half has one copy for all clients."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from sfl_jax.federated.round import Diverged, Model, Outcome, change, narrow, taken, wide
from sfl_jax.federated.session import Assignment, Samples, Training
from sfl_jax.schemes.copies import chosen, copies, states, step, variables
from sfl_jax.schemes.scheme import is_own


def run_round(
    training: Training,
    model: Model,
    samples: Samples,
    work: Assignment,
    round_key: Key[Array, ""],
    rate: Float[Array, ""],
    previous: Outcome | None,
    has_own: bool,
    keeps: bool,
) -> Any:
    """A round of sessions in turn. Returns what `federated.round.run_round` returns.

    has_own: whether each client has its own copies of the units that it holds, averaged at the end of the
    round. If False, every unit has one copy. keeps: whether the optimiser states of single copies are kept
    for the next round. Memory: three models for any number of clients.
    """
    training = training.alone()
    like, units = model.packed, range(len(training.chain))
    fresh = copies(like, states(training, like))
    server = copies(like, model.kept) if keeps else fresh
    assert work.turn is not None
    order, clients = jnp.argsort(work.turn), len(work.client)

    def of_client(place, carry):
        server, sums, own_weight, loss_sum, is_sound, taken_of = carry
        one = jax.tree.map(lambda x: x[order[place]], work)
        own = [is_own(training, one.cut, unit) & has_own for unit in units]
        begun = tuple(chosen(*of) for of in zip(own, fresh, server, strict=True))

        def goes_on(carry):
            index, _, _, sound = carry
            return sound & (index < one.steps)

        def of_step(carry):
            index, now, loss_sum, _ = carry
            now, loss, sound = step(training, like, now, samples, one, index, round_key, rate)
            return index + 1, now, loss_sum + loss, sound

        zero = jnp.zeros((), jnp.result_type(float))
        begin = jnp.zeros_like(one.steps), begun, zero, jnp.array(True)
        count, done, loss, sound = lax.while_loop(goes_on, of_step, begin)
        weight = jnp.where(sound, one.weight, 0)
        server = tuple(chosen(*of) for of in zip(own, server, done, strict=True))
        if has_own:
            parts = [jnp.where(mine, weight, 0) for mine in own]
            after = zip(sums, variables_of(done, like), parts, strict=True)
            sums = tuple(jax.tree.map(lambda t, x, w=w: t + w * x.astype(t.dtype), s, x) for s, x, w in after)
            own_weight = own_weight + jnp.stack(parts)
        loss_sum = loss_sum + weight * loss / jnp.maximum(one.steps, 1)
        is_sound, taken_of = is_sound.at[order[place]].set(sound), taken_of.at[order[place]].set(count)
        return server, sums, own_weight, loss_sum, is_sound, taken_of

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), variables_of(fresh, like))
    zero = jnp.zeros((), jnp.result_type(float))
    begin = server, zeros if has_own else (), jnp.zeros(len(units), work.weight.dtype), zero
    begin = *begin, jnp.ones(clients, bool), jnp.zeros(clients, work.steps.dtype)
    server, sums, own_weight, loss_sum, is_sound, taken_of = lax.fori_loop(0, clients, of_client, begin)
    total = jnp.where(is_sound, work.weight, 0).sum()
    mean = tuple(unit[:2] for unit in server)
    if has_own:
        mean = tuple(
            mixed(*of, total)
            for of in zip(sums, own_weight, variables_of(server, like), by_unit(like), strict=True)
        )
    diverged = Diverged.where(~is_sound, work.client, taken_of)
    trained = Model(variables(mean, like), kept=tuple(unit.state for unit in server) if keeps else ())
    return taken(training, model, trained, loss_sum / total, diverged, previous)


def by_unit(like):
    """(packed parameters, packed statistics) of each unit."""
    return tuple(zip(like.params.arrays, like.batch_stats.arrays, strict=True))


def variables_of(units, like):
    """The numbers of each unit that are averaged. For an integer this is its change since the round began."""
    return tuple(
        jax.tree.map(change, unit[:2], before) for unit, before in zip(units, by_unit(like), strict=True)
    )


def mixed(own, own_weight, shared, before, total):
    """The mean of a unit: the weighted sum of the clients' own copies, and the shared copy for the others."""

    def of_leaf(own, shared, before):
        rest = (total - own_weight).astype(own.dtype)
        return narrow((own + rest * shared.astype(own.dtype)) / total.astype(own.dtype), before)

    return jax.tree.map(of_leaf, own, shared, before)
