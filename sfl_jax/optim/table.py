"""The table of clients and cuts as solvers sweep it: one cut at a time, for all clients at once.

A solver needs only a running best over a client's cuts. So a sweep is one fused pass over the clients and
makes no K x C array. Cuts are unrolled in blocks, which bounds the compile time.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from sfl_jax.optim.costs import Costs, Terms

FEW = 8
MANY = 1 << 17  # from this many clients on, guessing the round and dropping cuts first saves time
# One cut: fixed seconds (K,), work per weight (K,) or (), allowed (K,).
Column = tuple[jax.Array, jax.Array, jax.Array]


class Dense(NamedTuple):
    """`Costs`, unchanged."""

    costs: Costs

    @property
    def number(self) -> int:
        return self.costs.shape[1]

    def columns(self, first, number: int) -> Iterator[tuple[jax.Array, Column]]:
        parts = [lax.dynamic_slice_in_dim(part, first, number, axis=1) for part in self.costs]
        for index in range(number):
            fixed_s, work, allowed = (part[:, index] for part in parts)
            yield first + index, (fixed_s, work, allowed)


class Measured(NamedTuple):
    """Seconds that are looked up by client and cut."""

    column: ArrayLike  # (K,) int32: the column of `seconds` of each client
    factor: ArrayLike  # (K,)
    compute_w: ArrayLike  # (K,)
    seconds: jax.Array  # (C, M)


class Factored(NamedTuple):
    """`Terms` with one coefficient per kind of amount: compute, bits up, bits down, bits of the model.

    With round-trip times, messages of steps and of the model are amounts too.
    """

    coefficients: tuple[ArrayLike, ...]  # N of (K,)
    memory_bytes: ArrayLike  # (K,)
    joules: tuple[ArrayLike, ...] | None  # per FLOP, per bit up, per bit of the model, budget; (K,) each
    rows: jax.Array  # (C, 2 + N): server work, needed bytes (inf where min_cut forbids), the amounts
    cuts: jax.Array  # (C,) int32: the cut of each row
    number: int | jax.Array  # how many rows are swept, from the first
    measured: Measured | None

    def columns(self, first, number: int) -> Iterator[tuple[jax.Array, Column]]:
        rows = lax.dynamic_slice_in_dim(self.rows, first, number)
        for index in range(number):
            work, needed_bytes, *amounts = rows[index]
            spent = [each * amount for each, amount in zip(self.coefficients, amounts, strict=True)]
            fixed_s = jnp.asarray(functools.reduce(operator.add, spent))
            allowed = needed_bytes <= self.memory_bytes
            compute_j = 0.0
            if self.measured is not None:
                own, factor, compute_w, seconds = self.measured
                seconds = factor * lax.dynamic_index_in_dim(seconds, first + index, keepdims=False)[own]
                fixed_s, compute_j = fixed_s + seconds, compute_w * seconds
            if self.joules is not None:
                flop, up_bits, _, model_bits, *_ = amounts
                per_flop, per_bit, per_model_bit, budget = self.joules
                joules = per_flop * flop + per_bit * up_bits + per_model_bit * model_bits
                allowed &= joules + compute_j <= budget
            yield self.cuts[first + index], (fixed_s, work, allowed)


class Needed(NamedTuple):
    """The cuts that a sweep needs. Their number is traced, so it may change without recompiling."""

    order: ArrayLike  # (C,) int32, all cuts, the needed ones first
    number: ArrayLike  # () int32


def table(costs: Costs | Terms, needed: Needed | None = None) -> Dense | Factored:
    """The input of `sweep`, with all cuts, or for Terms some; made once, outside of a solver's loop."""
    if isinstance(costs, Costs):
        return Dense(costs)
    samples, per_bit_up, per_bit_down = costs.samples, 1 / costs.uplink_bps, 1 / costs.downlink_bps
    amounts = [costs.forward_flop + costs.backward_flop, costs.up_bits, costs.down_bits, costs.model_bits]
    per_model_bit = per_bit_up + (per_bit_down if costs.broadcast_bps is None else 1 / costs.broadcast_bps)
    coefficients = [samples / costs.flops, samples * per_bit_up, samples * per_bit_down, per_model_bit]
    if costs.latency is not None:
        rtt_s, up, down, model = costs.latency
        amounts += [up + down, model]
        coefficients += [0.5 * rtt_s * costs.steps, rtt_s]
    measured = None
    if costs.devices is not None:
        devices = costs.devices
        seconds = jnp.transpose(devices.forward_s + devices.backward_s)
        measured = Measured(devices.row, samples * devices.slowdown, devices.compute_w, seconds)
    joules = None
    if costs.energy is not None:
        airtime_j = costs.energy.transmit_w * per_bit_up
        joules = (samples * costs.energy.j_per_flop, samples * airtime_j, airtime_j, costs.energy.budget_j)
    needed_bytes = jnp.where(costs.permitted, costs.needed_bytes, jnp.inf)
    rows, count = jnp.stack([costs.work_flop, needed_bytes, *amounts], axis=1), costs.shape[1]
    cuts, number = jnp.arange(count, dtype=jnp.int32), count
    if needed is not None:
        cuts, number = jnp.asarray(needed.order), jnp.asarray(needed.number)
        rows = rows[cuts].at[:, 1].set(jnp.where(jnp.arange(count) < number, needed_bytes[cuts], jnp.inf))
        measured = measured and measured._replace(seconds=measured.seconds[cuts])
    return Factored(tuple(coefficients), costs.memory_bytes, joules, rows, cuts, number, measured)


def sweep(swept: Dense | Factored, count: int, step: Callable, start, block: int | None = None):
    """Runs step(cut, column, state) over the cuts in order and returns the last state; `count` is C.

    block: how many cuts are unrolled. By default all cuts of a usual network, since a loop carries its state
    through memory. FEW compiles faster: use it for sweeps that run once or over few clients.
    """
    block = min(block or (count if count <= 64 else 32), count)

    def through(index, state):
        # The last block is moved back to fit. The cuts that it repeats are marked as not allowed.
        first = jnp.minimum(index * block, count - block)
        for offset, (cut, (fixed_s, work, allowed)) in enumerate(swept.columns(first, block)):
            column = fixed_s, work, allowed & (first + offset >= index * block)
            state = step(cut.astype(jnp.int32), column, state)
        return state

    return lax.fori_loop(0, -(-swept.number // block), through, start) if block < count else through(0, start)


def least(
    swept: Dense | Factored, shape: tuple[int, int], value: Callable[..., jax.Array], block: int | None = None
):
    """Each client's least value(cut, column) (K,) over cuts, and the first cut with it; L if all are inf."""
    clients, count = shape

    def step(cut, column, best):
        best_value, best_cut = best
        this = value(cut, column)
        better = this < best_value
        return jnp.where(better, this, best_value), jnp.where(better, cut, best_cut)

    start = jnp.full(clients, jnp.inf), jnp.full(clients, count - 1, jnp.int32)
    return sweep(swept, count, step, start, block)
