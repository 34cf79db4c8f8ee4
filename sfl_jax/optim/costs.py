"""What a round costs: the terms of every client's session, factored, and the same made dense.

Convention: FLOP = 2 x multiply-accumulates, backward work as traced (never "twice the forward").
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sfl_jax.errors import BadInput

Floats = NDArray[np.float64]
Cuts = NDArray[np.int32]
_FLOP_PER_MAC = 2
_TRAINING_FLOAT_BYTES = 4
_HEADROOM = 1e6  # for sums over clients, and for what is tried with faster ones
_PER_CUT = ("forward_flop", "backward_flop", "work_flop", "up_bits", "down_bits", "model_bits")


class Profile(Protocol):
    """Cost of every unit of a chain of L units, per sample; NumPy int64."""

    @property
    def forward_macs(self) -> NDArray[np.int64]: ...  # (L,)
    @property
    def backward_macs(self) -> NDArray[np.int64]: ...  # (L,)
    @property
    def parameters(self) -> NDArray[np.int64]: ...  # (L,)
    @property
    def state(self) -> NDArray[np.int64]: ...  # (L,)
    @property
    def activations(self) -> NDArray[np.int64]: ...  # (L,) floats kept for the backward pass
    @property
    def smashed(self) -> NDArray[np.int64]: ...  # (L+1,) floats that cross cut l; the image at 0, 0 at L


class Fleet(Protocol):
    """K clients: float64 rates, int64 samples; the last four only where an energy budget is set."""

    @property
    def flops(self) -> Floats: ...  # (K,) FLOP/s
    @property
    def uplink_bps(self) -> Floats: ...  # (K,) bit/s
    @property
    def downlink_bps(self) -> Floats: ...  # (K,) bit/s
    @property
    def memory_bytes(self) -> Floats: ...  # (K,)
    @property
    def samples(self) -> NDArray[np.int64]: ...  # (K,)
    @property
    def cycles_per_s(self) -> Floats | None: ...
    @property
    def kappa(self) -> Floats | None: ...  # J s^2 per cycle^3
    @property
    def transmit_w(self) -> Floats | None: ...
    @property
    def energy_j(self) -> Floats | None: ...  # budget of one round


class Work(NamedTuple):
    """What every client does in a round, and how large the messages are."""

    local_epochs: int = 1
    batch_size: int = 32
    bits_per_float: int = 32  # smashed data and its gradient
    model_bits_per_float: int = 32
    label_bits: int = 32
    image_bits: int = 8  # per image element where raw uint8 images go up (cut 0)
    min_cut: int = 1
    optimizer_slots: int = 1  # floats of optimiser state per parameter: 0 SGD, 1 momentum, 2 Adam


class Costs(NamedTuple):
    """Every (client, cut) pair: seconds off the server, FLOP on it, and whether it may be chosen."""

    fixed_s: Floats  # (K, C)
    server_flop: Floats  # (K, C)
    allowed: NDArray[np.bool_]  # (K, C)

    def column(self, cut):
        """Of all clients at one cut: fixed seconds, server FLOP per unit of `weight`, allowed; (K,) each."""
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
    """Where each client's session goes, in order of time; (K,) seconds each."""

    model_down: Floats
    client_forward: Floats
    smashed_up: Floats
    server: Floats
    gradient_down: Floats
    client_backward: Floats
    model_up: Floats

    @property
    def before_server(self) -> Floats:
        """Until the smashed data are at the server."""
        return self.model_down + self.client_forward + self.smashed_up

    @property
    def after_server(self) -> Floats:
        """From when the server has done its work."""
        return self.gradient_down + self.client_backward + self.model_up


class Energy(NamedTuple):
    """What a client spends and may spend in a round; (K,) each."""

    j_per_flop: Floats
    transmit_w: Floats
    budget_j: Floats


class Terms(NamedTuple):
    """A round's time, factored: per client (K,) rates and samples, per cut (C,) amounts per sample.

    Nothing here has K x C elements; `column` and `at` give what is needed of the product.
    """

    samples: Floats  # (K,) really processed in a round, all epochs together
    steps: Floats  # (K,) local steps of a round
    flops: Floats  # (K,)
    uplink_bps: Floats  # (K,)
    downlink_bps: Floats  # (K,)
    memory_bytes: Floats  # (K,)
    energy: Energy | None
    forward_flop: Floats  # (C,) on the client, per sample
    backward_flop: Floats  # (C,) on the client, per sample
    work_flop: Floats  # (C,) on the server, per sample
    up_bits: Floats  # (C,) smashed data and labels, per sample
    down_bits: Floats  # (C,) gradient of the smashed data, per sample
    model_bits: Floats  # (C,) client half, each way once a round
    needed_bytes: Floats  # (C,) memory of the client half while it trains
    permitted: NDArray[np.bool_]  # (C,) by min_cut

    @property
    def shape(self) -> tuple[int, int]:
        """(K, C)."""
        return len(self.samples), len(self.work_flop)

    @property
    def weight(self):
        return self.samples

    def column(self, cut):
        """Of all clients at one cut: fixed seconds, server FLOP per unit of `weight`, allowed; (K,) each."""
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
        """The terms of some clients (indices or a mask), say of a round's cohort."""
        per_client = {
            name: getattr(self, name)[clients]
            for name in ("samples", "steps", "flops", "uplink_bps", "downlink_bps", "memory_bytes")
        }
        energy = None if self.energy is None else Energy(*(part[clients] for part in self.energy))
        return self._replace(energy=energy, **per_client)

    def seconds(self, cuts, shares) -> Seconds:
        """Each client's seconds by term under a plan's cuts (K,) and shares (K,) FLOP/s."""
        down, forward, up, gradient, backward, model_up = self._off_server(np.asarray(cuts))
        work = self.samples * self.work_flop[np.asarray(cuts)]
        with np.errstate(divide="ignore", invalid="ignore"):
            server = np.where(work > 0, work / shares, 0.0)
        return Seconds(down, forward, up, server, gradient, backward, model_up)

    def joules(self, cut):
        """What each client spends at one cut, or at its own; (K,). 0 without an energy budget."""
        if self.energy is None:
            return 0.0 * self.samples
        flop = self.samples * (self.forward_flop[cut] + self.backward_flop[cut])
        up_bits = self.samples * self.up_bits[cut] + self.model_bits[cut]
        return self.energy.j_per_flop * flop + self.energy.transmit_w * (up_bits / self.uplink_bps)

    def _off_server(self, cut):
        return (
            self.model_bits[cut] / self.downlink_bps,
            self.samples * self.forward_flop[cut] / self.flops,
            self.samples * self.up_bits[cut] / self.uplink_bps,
            self.samples * self.down_bits[cut] / self.downlink_bps,
            self.samples * self.backward_flop[cut] / self.flops,
            self.model_bits[cut] / self.uplink_bps,
        )

    def _allowed(self, cut):
        allowed = self.permitted[cut] & (self.needed_bytes[cut] <= self.memory_bytes)
        return allowed if self.energy is None else allowed & (self.joules(cut) <= self.energy.budget_j)


def terms(profile: Profile, fleet: Fleet, work: Work) -> Terms:
    """The factored costs of a fleet that trains a profiled chain.

    An epoch is floor(D/B) batches; a client with D < B fills one batch. Labels go up wherever
    something is left to the server. BadInput names the rate, count or client that makes no sense.
    """
    _check_work(work, len(profile.forward_macs))
    _check_fleet(fleet)
    forward, backward = (
        _before(macs) * _FLOP_PER_MAC for macs in (profile.forward_macs, profile.backward_macs)
    )
    units = len(profile.forward_macs)
    sent = profile.smashed.astype(np.float64)
    up_bits = sent * work.bits_per_float + work.label_bits
    up_bits[0] = sent[0] * work.image_bits + work.label_bits
    up_bits[units] = 0.0
    down_bits = sent * work.bits_per_float
    down_bits[[0, units]] = 0.0
    parameters, state = _before(profile.parameters), _before(profile.state)
    # Parameters, their gradients and the optimiser's state; activations of one batch.
    floats = parameters * (2 + work.optimizer_slots) + state + work.batch_size * _before(profile.activations)
    made = Terms(
        samples=samples_processed(fleet.samples, work),
        steps=samples_processed(fleet.samples, work) / work.batch_size,
        flops=fleet.flops,
        uplink_bps=fleet.uplink_bps,
        downlink_bps=fleet.downlink_bps,
        memory_bytes=fleet.memory_bytes,
        energy=_energy(fleet),
        forward_flop=forward,
        backward_flop=backward,
        work_flop=(forward[-1] - forward) + (backward[-1] - backward),
        up_bits=up_bits,
        down_bits=down_bits,
        model_bits=(parameters + state) * work.model_bits_per_float,
        needed_bytes=floats * _TRAINING_FLOAT_BYTES,
        permitted=np.arange(units + 1) >= work.min_cut,
    )
    _check_range(made)
    return made


def samples_processed(samples: ArrayLike, work: Work) -> Floats:
    """Samples a client with `samples` of its own runs in a round, all epochs together; (K,)."""
    batches = np.maximum(np.asarray(samples) // work.batch_size, 1).astype(np.float64)
    return work.local_epochs * batches * work.batch_size


def _before(per_unit) -> Floats:
    """Sums over units [0, l) for l = 0..L."""
    return np.concatenate([[0], np.cumsum(per_unit)]).astype(np.float64)


def _energy(fleet: Fleet) -> Energy | None:
    if fleet.energy_j is None:
        return None
    parts = {name: getattr(fleet, name) for name in ("cycles_per_s", "kappa", "transmit_w")}
    missing = [name for name, value in parts.items() if value is None]
    if missing:
        raise BadInput(f"fleet: energy_j is given without {', '.join(missing)}; give all four or none")
    cycles_per_s, kappa, transmit_w = parts.values()
    # kappa * (cycles/s)^2 per cycle, and cycles/s over FLOP/s cycles per FLOP.
    with np.errstate(over="ignore", invalid="ignore"):  # said by _check_range
        return Energy(kappa * cycles_per_s**3 / fleet.flops, transmit_w, fleet.energy_j)


def _check_range(terms: Terms) -> None:
    """Numbers that are possible one by one can still make times or energies beyond float64."""
    most = terms._replace(**{name: getattr(terms, name).max(keepdims=True) for name in _PER_CUT})
    with np.errstate(over="ignore", invalid="ignore"):
        fixed_s, server_flop, _ = most.at(0)
        spent = fixed_s + server_flop + most.joules(0)
        spent = _HEADROOM * (spent + terms.flops + terms.uplink_bps + terms.downlink_bps)
    if not np.isfinite(spent).all():
        client = int(np.argmin(np.isfinite(spent)))
        raise BadInput(
            f"fleet: client {client} has samples, rates or power that make times or energies beyond float64"
        )


def _check_work(work: Work, units: int) -> None:
    least = dict.fromkeys(
        ("local_epochs", "batch_size", "bits_per_float", "model_bits_per_float", "image_bits"), 1
    )
    for name, smallest in (least | {"label_bits": 0, "optimizer_slots": 0, "min_cut": 0}).items():
        if not getattr(work, name) >= smallest:
            raise BadInput(f"{name}={getattr(work, name)}: choose at least {smallest}")
    if work.min_cut > units:
        raise BadInput(f"min_cut={work.min_cut}: the chain has {units} units; choose 0 to {units}")


def _check_fleet(fleet: Fleet) -> None:
    rules = dict.fromkeys(("flops", "uplink_bps", "downlink_bps", "samples"), "above 0") | {
        "memory_bytes": "0 or more"
    }
    for name, rule in rules.items():
        if getattr(fleet, name) is None:
            raise BadInput(f"fleet: {name} is missing; costs need it of every client")
        values = np.asarray(getattr(fleet, name))
        bad = ~(values > 0) if rule == "above 0" else ~(values >= 0)
        if bad.any():
            client = int(np.argmax(bad))
            raise BadInput(f"fleet: client {client} has {name}={values[client]}; it must be {rule}")
