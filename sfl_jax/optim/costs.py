"""What a round costs: `Terms` (factored) and `Costs` (dense).

A column is what a client can choose: a cut, or an option (a cut and a codec). `work.py` makes terms.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Cuts = NDArray[np.int32]


class Costs(NamedTuple):
    """Each (client, cut) pair: seconds off the server, FLOP on the server, and whether it may be chosen."""

    fixed_s: Floats  # (K, C)
    server_flop: Floats  # (K, C)
    allowed: NDArray[np.bool_]  # (K, C)

    def column(self, cut):
        """All clients at one cut: fixed seconds, server FLOP per unit of `weight`, allowed; (K,) each."""
        return self.fixed_s[:, cut], self.server_flop[:, cut], self.allowed[:, cut]

    @property
    def weight(self):
        return 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(K, C)."""
        return self.fixed_s.shape[0], self.fixed_s.shape[1]

    def at(self, cuts):
        """(fixed_s, server_flop, allowed) of each client at its own cut; (K,) each."""
        clients = np.arange(len(cuts))
        return self.fixed_s[clients, cuts], self.server_flop[clients, cuts], self.allowed[clients, cuts]

    def take(self, clients) -> "Costs":
        """The costs of some clients (indices or a mask)."""
        return Costs(self.fixed_s[clients], self.server_flop[clients], self.allowed[clients])


class Seconds(NamedTuple):
    """The seconds of each client's session by term, in order of time; (K,) each."""

    model_down: Floats
    client_forward: Floats
    smashed_up: Floats
    server: Floats
    gradient_down: Floats
    client_backward: Floats
    model_up: Floats

    @property
    def before_server(self) -> Floats:
        """Seconds until the smashed data are at the server; (K,)."""
        return self.model_down + self.client_forward + self.smashed_up

    @property
    def after_server(self) -> Floats:
        """Seconds after the server's work; (K,)."""
        return self.gradient_down + self.client_backward + self.model_up


class Energy(NamedTuple):
    """A client's power, and its energy budget of a round; (K,) each."""

    j_per_flop: Floats
    transmit_w: Floats
    budget_j: Floats


class Latency(NamedTuple):
    """How long messages travel: each takes half of its client's round-trip time, beside its bits."""

    rtt_s: Floats  # (K,)
    up_messages: Floats  # (C,) a step
    down_messages: Floats  # (C,) a step
    model_messages: Floats  # (C,) a round, in each direction


class Devices(NamedTuple):
    """Measured seconds of client halves, instead of FLOP over FLOP/s."""

    row: NDArray[np.int32]  # (K,) the row of the tables for each client; 0 for clients with FLOP/s
    slowdown: Floats  # (K,) factor on the measured seconds; 0 for clients with FLOP/s
    compute_w: Floats  # (K,) power while computing, for energy budgets
    forward_s: Floats  # (M, C) on the client, per sample
    backward_s: Floats  # (M, C) on the client, per sample


class CutsAndCodecs(NamedTuple):
    """The cut and the codec of each column; (C,) int32 each, sorted. Cuts 0 and L have codec 0."""

    cut: Cuts
    codec: Cuts  # index among the codec names


class Terms(NamedTuple):
    """A round's time, factored: rates and samples per client (K,), amounts per sample per column (C,).

    A column is a cut, or an option if there are several codecs; the last column is cut L. Methods take
    columns, which `columns` finds. Nothing here has K x C elements; `column` and `at` compute what is needed.
    """

    samples: Floats  # (K,) processed in a round, all epochs together
    steps: Floats  # (K,) local steps of a round
    flops: Floats  # (K,); inf for clients with a row of `devices`
    uplink_bps: Floats  # (K,)
    downlink_bps: Floats  # (K,)
    memory_bytes: Floats  # (K,)
    energy: Energy | None
    forward_flop: Floats  # (C,) on the client, per sample
    backward_flop: Floats  # (C,) on the client, per sample
    work_flop: Floats  # (C,) on the server, per sample
    up_bits: Floats  # (C,) smashed data and labels, per sample
    down_bits: Floats  # (C,) gradient of the smashed data, per sample
    model_bits: Floats  # (C,) client half, sent once a round in each direction
    needed_bytes: Floats  # (C,) memory of the client half in training
    server_bytes: Floats  # (C,) memory of the server half of one client in training
    permitted: NDArray[np.bool_]  # (C,) by min_cut and max_cut
    options: CutsAndCodecs | None = None  # None: column l is cut l
    latency: Latency | None = None
    devices: Devices | None = None
    broadcast_bps: Floats | None = None  # (K,) at which the model comes down; None: downlink_bps

    @property
    def shape(self) -> tuple[int, int]:
        """(K, C)."""
        return len(self.samples), len(self.work_flop)

    @property
    def weight(self):
        return self.samples

    @property
    def has_codecs(self) -> bool:
        """Whether a cut has more than one column."""
        return self.options is not None and len(self.options.cut) > int(self.options.cut[-1]) + 1

    def columns(self, cuts: ArrayLike, codecs: ArrayLike = 0) -> NDArray[np.int32]:
        """The columns of cuts and codecs, arrays of any shape. The codec does not matter at cuts 0 and L."""
        if self.options is None or not self.has_codecs:
            return np.asarray(cuts, np.int32)
        cut, codec = self.options
        places = np.zeros((cut[-1] + 1, codec.max() + 1), np.int32)
        places[cut, codec] = np.arange(len(cut))
        places[-1] = len(cut) - 1
        return places[np.asarray(cuts), np.asarray(codecs)]

    def chosen(self, columns: ArrayLike) -> CutsAndCodecs:
        """The cuts and codecs of columns, an array of any shape."""
        columns = np.asarray(columns, np.int32)
        if self.options is None:
            return CutsAndCodecs(columns, np.zeros_like(columns))
        return CutsAndCodecs(self.options.cut[columns], self.options.codec[columns])

    def column(self, cut):
        """All clients at one cut: fixed seconds, server FLOP per unit of `weight`, allowed; (K,) each."""
        parts = self._off_server(cut)
        fixed_s = parts[0] + parts[1] + parts[2] + parts[3] + parts[4] + parts[5]
        return fixed_s, self.work_flop[cut], self._allowed(cut)

    def at(self, cuts):
        """(fixed_s, server_flop, allowed) of each client at its own cut; (K,) each."""
        fixed_s, per_sample, allowed = self.column(cuts)
        return fixed_s, self.samples * per_sample, allowed

    def costs(self) -> Costs:
        """The dense (K, C) form."""
        columns = [self.at(np.full(self.shape[0], cut)) for cut in range(self.shape[1])]
        fixed_s, server_flop, allowed = (np.stack(parts, axis=1) for parts in zip(*columns, strict=True))
        return Costs(fixed_s, server_flop, allowed)

    def take(self, clients) -> "Terms":
        """The terms of some clients (indices or a mask), for example a round's cohort."""
        per_client = {
            name: getattr(self, name)[clients]
            for name in ("samples", "steps", "flops", "uplink_bps", "downlink_bps", "memory_bytes")
        }
        energy = None if self.energy is None else Energy(*(part[clients] for part in self.energy))
        latency, devices, broadcast = self.latency, self.devices, self.broadcast_bps
        if latency is not None:
            latency = latency._replace(rtt_s=latency.rtt_s[clients])
        if devices is not None:
            own = {name: getattr(devices, name)[clients] for name in ("row", "slowdown", "compute_w")}
            devices = devices._replace(**own)
        broadcast = None if broadcast is None else broadcast[clients]
        return self._replace(
            energy=energy, latency=latency, devices=devices, broadcast_bps=broadcast, **per_client
        )

    def faster(self, compute: Any = 1.0, uplink: Any = 1.0, downlink: Any = 1.0) -> "Terms":
        """The terms of clients whose compute and links are this many times as fast; () or (K,) each.

        Round-trip times and the rate of a broadcast stay.
        """
        devices = self.devices
        if devices is not None:
            devices = devices._replace(slowdown=devices.slowdown / compute)
        return self._replace(
            flops=self.flops * compute, devices=devices, uplink_bps=self.uplink_bps * uplink,
            downlink_bps=self.downlink_bps * downlink,
        )  # fmt: skip

    def compute_s(self, cut):
        """Seconds (K,) in which each client computes forward and backward in a round, at one cut or its own.

        Every term of compute, in plans and clocks, comes from here or from its two parts.
        """
        return self._client_s(self.forward_flop, "forward_s", cut) + self._client_s(
            self.backward_flop, "backward_s", cut
        )

    def travel_s(self, cut):
        """Seconds (K,) for which messages travel in a round, at one cut or each client's own."""
        if self.latency is None:
            return 0.0 * self.samples
        rtt_s, up, down, model = self.latency
        return rtt_s * (model[cut] + 0.5 * self.steps * (up[cut] + down[cut]))

    def seconds(self, cuts, shares) -> Seconds:
        """Each client's seconds by term under a plan's cuts (K,) and shares (K,) FLOP/s."""
        down, forward, up, gradient, backward, model_up = self._off_server(np.asarray(cuts))
        work = self.samples * self.work_flop[np.asarray(cuts)]
        with np.errstate(divide="ignore", invalid="ignore"):
            server = np.where(work > 0, work / shares, 0.0)
        return Seconds(down, forward, up, server, gradient, backward, model_up)

    def joules(self, cut):
        """Joules (K,) each client spends in a round, at one cut or its own; 0 without an energy budget."""
        if self.energy is None:
            return 0.0 * self.samples
        flop = self.samples * (self.forward_flop[cut] + self.backward_flop[cut])
        up_bits = self.samples * self.up_bits[cut] + self.model_bits[cut]
        joules = self.energy.j_per_flop * flop + self.energy.transmit_w * (up_bits / self.uplink_bps)
        return joules if self.devices is None else joules + self.devices.compute_w * self._measured_s(cut)

    def _off_server(self, cut):
        model_bps = self.downlink_bps if self.broadcast_bps is None else self.broadcast_bps
        parts = (
            self.model_bits[cut] / model_bps,
            self._client_s(self.forward_flop, "forward_s", cut),
            self.samples * self.up_bits[cut] / self.uplink_bps,
            self.samples * self.down_bits[cut] / self.downlink_bps,
            self._client_s(self.backward_flop, "backward_s", cut),
            self.model_bits[cut] / self.uplink_bps,
        )
        if self.latency is None:
            return parts
        down, forward, up, gradient, backward, model_up = parts
        half_s = 0.5 * self.latency.rtt_s
        once_s, steps_s = half_s * self.latency.model_messages[cut], half_s * self.steps
        up = up + steps_s * self.latency.up_messages[cut]
        gradient = gradient + steps_s * self.latency.down_messages[cut]
        return down + once_s, forward, up, gradient, backward, model_up + once_s

    def _client_s(self, flop, name: str, cut):
        """Seconds (K,) of one direction of the client's half: FLOP over FLOP/s, or what was measured."""
        counted_s = self.samples * flop[cut] / self.flops
        if self.devices is None:
            return counted_s
        table = getattr(self.devices, name)
        return counted_s + self.samples * self.devices.slowdown * table[self.devices.row, cut]

    def _measured_s(self, cut):
        """Seconds (K,) of measured compute; 0 for clients with FLOP/s."""
        assert self.devices is not None
        table = self.devices.forward_s + self.devices.backward_s
        return self.samples * self.devices.slowdown * table[self.devices.row, cut]

    def _allowed(self, cut):
        allowed = self.permitted[cut] & (self.needed_bytes[cut] <= self.memory_bytes)
        return allowed if self.energy is None else allowed & (self.joules(cut) <= self.energy.budget_j)
