"""The end of a round in which clients estimate the batch-norm statistics of the new model.

A client gets the new parameters of its units and runs a few batches forward. It sends the smashed data, which
no codec touches, and the server runs its units. Statistics belong to whoever holds the unit; a client sends
those of its units. Nothing after the last unit with statistics runs.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from sfl_jax.optim.costs import Costs, Devices, Latency, Terms
from sfl_jax.optim.solve import solve
from sfl_jax.optim.work import FLOP_PER_MAC, Device, Profile, Work

_FLOAT_BITS = 32


class Estimation(NamedTuple):
    """What the estimation costs. `model_bits` are the parameters in `down`, and the statistics in `up`."""

    down: Terms
    up: Terms

    def seconds(
        self, columns: NDArray[np.integer], server_flops: float, present: Bool[np.ndarray, " K"]
    ) -> float:
        """How long it takes at these columns (K,), with the best shares of the server."""
        fixed_s, flop, _ = self._costs()
        chosen = np.arange(self.down.shape[1]) == columns[:, None]
        served = chosen & np.isfinite(fixed_s)  # an absent client may have no part of a band
        costs = Costs(np.where(served, fixed_s, 0.0), flop, served)
        return solve(costs, server_flops, "exact", present=present).round_s

    def bound_s(self, server_flops: float, present: Bool[np.ndarray, " K"]) -> float:
        """Seconds that it takes at least, at any columns."""
        return solve(self._costs(), server_flops, "exact", present=present).bound_s

    def _costs(self) -> Costs:
        """What each client spends in each column, off the server and on it."""
        clients, count = self.down.shape
        at_no_cost = np.full(clients, np.inf)  # shares with which the server takes no time
        columns = []
        for column in range(count):
            every = np.full(clients, column)
            down, up = (terms.seconds(every, at_no_cost) for terms in self)
            s = down.model_down + down.client_forward + down.smashed_up + down.gradient_down + up.model_up
            columns.append((s, *self.down.at(every)[1:]))
        return Costs(*(np.stack(parts, axis=1) for parts in zip(*columns, strict=True)))


def estimation(
    profile: Profile, terms: Terms, work: Work, devices: Mapping[str, Device], batches: int
) -> Estimation:
    """What it costs the clients of `terms`, each of which runs up to `batches` of its batches.

    work: its batch size, sizes of numbers and tail units count. devices: those of the fleet, in its order.
    """
    units = np.arange(len(profile.forward_macs))
    cut, top = terms.chosen(np.arange(terms.shape[1])).cut, len(units) - work.tail_units
    last = 1 + int(np.flatnonzero(profile.state).max(initial=-1))
    runs = units < last
    at_server = (units >= cut[:, None]) & (units < top)
    own = runs & ~at_server
    forward = FLOP_PER_MAC * profile.forward_macs.astype(float)
    goes_up = (runs & at_server).any(axis=1).astype(float)
    comes_down = ((cut < top) & (last > top)).astype(float)
    smashed = profile.smashed[cut] * np.where(cut > 0, _FLOAT_BITS, work.image_bits)
    steps = np.minimum(terms.steps, batches)
    down = terms._replace(
        samples=steps * work.batch_size, steps=steps, forward_flop=own @ forward,
        backward_flop=np.zeros(len(cut)), work_flop=(runs & at_server) @ forward,
        up_bits=goes_up * smashed, down_bits=comes_down * profile.smashed[top] * _FLOAT_BITS,
        model_bits=(own @ profile.parameters * work.model_bits_per_float).astype(float), tail=None,
        devices=terms.devices and _forward(terms.devices, own, devices),
        latency=terms.latency
        and Latency(terms.latency.rtt_s, goes_up, comes_down, own.any(axis=1).astype(float)),
    )  # fmt: skip
    statistics = own @ profile.state
    up = down._replace(
        model_bits=(statistics * work.model_bits_per_float).astype(float),
        latency=down.latency and down.latency._replace(model_messages=(statistics > 0).astype(float)),
    )
    return Estimation(down, up)


def _forward(measured: Devices, own, devices: Mapping[str, Device]) -> Devices:
    """The measured seconds with those of the forward pass of the units that run."""
    forward_s = np.stack([own @ device.forward_s / device.batch_size for device in devices.values()])
    return measured._replace(forward_s=forward_s, backward_s=0.0 * forward_s)
