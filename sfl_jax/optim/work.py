"""What every client does in a round, and the terms of a fleet that does it with a profiled chain.

Convention: FLOP = 2 x multiply-accumulates. Backward work is traced, not assumed to be twice the forward
work.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import CutsAndCodecs, Devices, Energy, Floats, Latency, Tail, Terms

FLOP_PER_MAC = 2
PROXIMAL_FLOP = 3  # a parameter and step: FedProx subtracts, multiplies and adds
_TRAINING_FLOAT_BYTES = 4
_HEADROOM = 1e6  # for sums over clients, and for trials with faster clients
_PER_CUT = ("forward_flop", "backward_flop", "work_flop", "up_bits", "down_bits", "model_bits")


class Profile(Protocol):
    """The costs of each unit of a chain of L units, per sample; NumPy int64."""

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
    def smashed(self) -> NDArray[np.int64]: ...  # (L+1,) floats that cross cut l: the image at 0, none at L


class Device(Protocol):
    """What was measured on one device: seconds of each unit for one batch."""

    @property
    def batch_size(self) -> int: ...
    @property
    def forward_s(self) -> Floats: ...  # (L,)
    @property
    def backward_s(self) -> Floats: ...  # (L,)


class Fleet(Protocol):
    """K clients: float64 rates, int64 samples. The others are needed only for what they are about."""

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
    @property
    def rtt_s(self) -> Floats | None: ...  # round-trip time; None: messages travel in no time
    @property
    def device(self) -> NDArray[np.str_] | None: ...  # (K,) name among devices; "" for a client with flops
    @property
    def slowdown(self) -> Floats | None: ...  # (K,) factor on the device's seconds
    @property
    def devices(self) -> Mapping[str, Device]: ...


class Work(NamedTuple):
    """What every client does in a round, and the sizes of messages."""

    local_epochs: int = 1
    batch_size: int = 32
    bits_per_float: int = 32  # smashed data and its gradient, if no codec is given
    model_bits_per_float: int = 32
    label_bits: int = 32
    image_bits: int = 8  # per image element, if raw uint8 images go up (cut 0)
    min_cut: int = 1
    max_cut: int | None = None  # None: the number of units
    tail_units: int = 0  # how many of the last units the client holds too
    optimizer_slots: int = 1  # floats of optimiser state per parameter: 0 SGD, 1 momentum, 2 Adam
    proximal: bool = False  # whether a step adds FedProx's term to the gradient of each parameter
    step_once: range = range(0)  # units that take one step for all clients; their term is nobody's


class Wire(NamedTuple):
    """Bits per sample of the smashed data and of its gradient after a codec; (L+1,) each, by cut.

    The entries of cuts 0 and L are ignored: nothing is encoded there.
    """

    up_bits: NDArray[np.float64]
    down_bits: NDArray[np.float64]


class UnitBytes(NamedTuple):
    """Bytes of each unit while it trains; (L,) each.

    copies: parameters, their gradients, the optimiser's state, and other state such as statistics.
    activations: what one batch leaves for the backward pass.
    """

    copies: Floats
    activations: Floats


def unit_bytes(profile: Profile, work: Work) -> UnitBytes:
    """The memory of each unit in training: the one formula for clients, the server, plans and the ledger."""
    copies = profile.parameters * (2 + work.optimizer_slots) + profile.state
    activations = profile.activations * work.batch_size
    return UnitBytes(*(_TRAINING_FLOAT_BYTES * floats.astype(np.float64) for floats in (copies, activations)))


def proximal_flop(profile: Profile, work: Work) -> Floats:
    """The FLOP of FedProx's term in a client's step, by unit (L,); 0 for units that step once for all."""
    alone = ~np.isin(np.arange(len(profile.parameters)), work.step_once)
    return (PROXIMAL_FLOP * profile.parameters * alone).astype(np.float64)


def terms(profile: Profile, fleet: Fleet, work: Work, wires: Mapping[str, Wire] | None = None) -> Terms:
    """The factored costs of a fleet that trains a profiled chain.

    wires: the bits that cross the cut, by codec name. With several codecs a column is a cut and a codec, and
    this is the order of the codecs. Without `wires`, numbers of `work.bits_per_float` cross.

    An epoch is floor(D/B) batches; a client with D < B fills one batch. Labels go up if the server holds
    units, but not with tail units. BadInput names the rate, count, client or codec that is not allowed.
    """
    _check_work(work, len(profile.forward_macs))
    _check_fleet(fleet)
    _check_devices(fleet, work, len(profile.forward_macs))
    forward, backward = (
        _before(macs) * FLOP_PER_MAC for macs in (profile.forward_macs, profile.backward_macs)
    )
    if work.proximal:
        backward = backward + _before(proximal_flop(profile, work)) / work.batch_size
    options, up_bits, down_bits = _crossing(profile, work, wires)
    parameters, state = _before(profile.parameters), _before(profile.state)
    held = _before(sum(unit_bytes(profile, work)))
    cut, top = options.cut, len(profile.forward_macs) - work.tail_units
    whole = forward[-1] + backward[-1]
    alone = forward, backward
    forward, backward, parameters, state, held = (
        _with_tail(amounts, top) for amounts in (forward, backward, parameters, state, held)
    )
    devices = None if fleet.device is None else _devices(fleet, top, cut)
    tail = None
    if work.tail_units:
        tail = _tail(forward - alone[0], backward - alone[1], profile, work, wires, options)
        if devices is not None:
            halves = _devices(fleet, len(profile.forward_macs), cut)  # no client holds a tail
            tail = tail._replace(
                forward_s=devices.forward_s - halves.forward_s,
                backward_s=devices.backward_s - halves.backward_s,
            )
    made = Terms(
        samples=samples_processed(fleet.samples, work),
        steps=samples_processed(fleet.samples, work) / work.batch_size,
        flops=fleet.flops,
        uplink_bps=fleet.uplink_bps,
        downlink_bps=fleet.downlink_bps,
        memory_bytes=fleet.memory_bytes,
        energy=energy(fleet),
        forward_flop=forward[cut],
        backward_flop=backward[cut],
        work_flop=(whole - forward - backward)[cut],
        up_bits=up_bits,
        down_bits=down_bits,
        model_bits=((parameters + state) * work.model_bits_per_float)[cut],
        needed_bytes=held[cut],
        server_bytes=(held[-1] - held)[cut],
        permitted=(cut >= work.min_cut)
        & (cut <= (cut[-1] if work.max_cut is None else work.max_cut))
        & ((cut < top) | (cut == cut[-1])),
        options=options,
        latency=None if fleet.rtt_s is None else _latency(fleet.rtt_s, cut, work.tail_units),
        devices=devices,
        tail=tail,
    )
    _check_range(made)
    return made


def _with_tail(amounts: Floats, top: int) -> Floats:
    """Sums by cut (L+1,) of a client that, if it leaves units to the server, also holds the tail from top."""
    return amounts + np.where(np.arange(len(amounts)) < top, amounts[-1] - amounts[top], 0.0)


def _tail(forward: Floats, backward: Floats, profile, work: Work, wires, options: CutsAndCodecs) -> Tail:
    """The tail's part of all amounts. forward, backward: FLOP of the tail, by cut."""
    cut, (up_bits, down_bits) = options.cut, _features(profile, work, wires, options.codec)
    splits = (cut < cut[-1]).astype(np.float64)
    return Tail(forward[cut], backward[cut], splits * up_bits, splits * down_bits, splits)


def _latency(rtt_s: Floats, cut, tail_units: int) -> Latency:
    """A step sends smashed data up and their gradient down; with tail units, features and theirs as well.

    At cut 0 no gradient comes down, and no model travels unless there is a tail.
    """
    splits = (cut < cut[-1]).astype(np.float64)
    tail = splits if tail_units else 0.0
    has_half = ((cut > 0) | (tail_units > 0)).astype(np.float64)
    return Latency(np.asarray(rtt_s, np.float64), splits + tail, splits * (cut > 0) + tail, has_half)


def _devices(fleet: Fleet, top: int, cut) -> Devices:
    """The measured seconds of every device as tables by column, and each client's row."""
    assert fleet.device is not None
    names = list(fleet.devices)
    rows = {name: row for row, name in enumerate(names)}
    is_measured = fleet.device != ""
    index = np.array([rows.get(name, 0) for name in fleet.device.tolist()], np.int32)
    slowdown = np.where(is_measured, 1.0 if fleet.slowdown is None else fleet.slowdown, 0.0)
    forward_s, backward_s = (
        np.stack([
            _with_tail(_before(getattr(device, name)), top)[cut] / device.batch_size
            for device in fleet.devices.values()
        ])
        for name in ("forward_s", "backward_s")
    )  # fmt: skip
    compute_w = np.zeros(len(index))
    if fleet.energy_j is not None and fleet.kappa is not None and fleet.cycles_per_s is not None:
        compute_w = fleet.kappa * fleet.cycles_per_s**3
    return Devices(index, slowdown, compute_w, forward_s, backward_s)


def _crossing(
    profile: Profile, work: Work, wires: Mapping[str, Wire] | None
) -> tuple[CutsAndCodecs, Floats, Floats]:
    """The columns, and each one's bits up and down per sample, labels and images (at cut 0) included."""
    sent, units = profile.smashed.astype(np.float64), len(profile.forward_macs)
    wires = _wires(profile, work, wires)
    _check_wires(wires, units)
    between = np.arange(1, units)
    cut = np.concatenate([[0], np.repeat(between, len(wires)), [units]]).astype(np.int32)
    codec = np.concatenate([[0], np.tile(np.arange(len(wires)), len(between)), [0]]).astype(np.int32)
    up_bits, down_bits = (
        np.array([getattr(wire, name) for wire in wires.values()], np.float64)[codec, cut]
        for name in Wire._fields
    )
    up_bits[0], down_bits[0] = sent[0] * work.image_bits, 0.0
    if work.tail_units:  # features go down and their gradient goes up, instead of labels
        gradient, features = _features(profile, work, wires, codec)
        up_bits, down_bits = up_bits + gradient, down_bits + features
    else:
        up_bits = up_bits + work.label_bits
    up_bits[-1] = down_bits[-1] = 0.0
    return CutsAndCodecs(cut, codec), up_bits, down_bits


def _wires(profile: Profile, work: Work, wires: Mapping[str, Wire] | None) -> Mapping[str, Wire]:
    """The bits that cross the cut, by codec name."""
    if wires is not None:
        return wires
    bits = profile.smashed.astype(np.float64) * work.bits_per_float
    return {"": Wire(bits, bits)}


def _features(profile: Profile, work: Work, wires: Mapping[str, Wire] | None, codec) -> Floats:
    """Bits per sample of the gradient of the tail's features, and of these; (2, C) for these codecs."""
    top = len(profile.forward_macs) - work.tail_units
    every = [(wire.up_bits[top], wire.down_bits[top]) for wire in _wires(profile, work, wires).values()]
    return np.array(every, np.float64)[codec].T


def samples_processed(samples: ArrayLike, work: Work) -> Floats:
    """How many samples (K,) clients that own `samples` (K,) process in a round, all epochs together."""
    batches = np.maximum(np.asarray(samples) // work.batch_size, 1).astype(np.float64)
    return work.local_epochs * batches * work.batch_size


def _before(per_unit) -> Floats:
    """Sums over units [0, l) for l = 0..L."""
    return np.concatenate([[0], np.cumsum(per_unit)]).astype(np.float64)


def energy(fleet: Fleet) -> Energy | None:
    """Power and budgets of a fleet's clients; None without budgets."""
    if fleet.energy_j is None:
        return None
    parts = {name: getattr(fleet, name) for name in ("cycles_per_s", "kappa", "transmit_w")}
    missing = [name for name, value in parts.items() if value is None]
    if missing:
        raise BadInput(f"fleet: energy_j is given without {', '.join(missing)}; give all four or none")
    cycles_per_s, kappa, transmit_w = parts.values()
    # J per cycle: kappa * (cycles/s)^2. Cycles per FLOP: (cycles/s) / (FLOP/s).
    with np.errstate(over="ignore", invalid="ignore"):  # _check_range refuses it
        return Energy(kappa * cycles_per_s**3 / fleet.flops, transmit_w, fleet.energy_j)


def _check_range(terms: Terms) -> None:
    """Refuses numbers that are possible one by one but make times or energies beyond float64."""
    most = terms._replace(**{name: getattr(terms, name).max(keepdims=True) for name in _PER_CUT})
    if terms.devices is not None:
        tables = {name: getattr(terms.devices, name)[:, -1:] for name in ("forward_s", "backward_s")}
        most = most._replace(devices=terms.devices._replace(**tables))
    if terms.latency is not None:
        counts = {name: getattr(terms.latency, name).max(keepdims=True) for name in Latency._fields[1:]}
        most = most._replace(latency=terms.latency._replace(**counts))
    with np.errstate(over="ignore", invalid="ignore"):
        fixed_s, server_flop, _ = most.at(0)
        spent = fixed_s + server_flop + most.joules(0)
        flops = np.where(np.isinf(terms.flops), 0.0, terms.flops)  # of clients with measured seconds
        spent = _HEADROOM * (spent + flops + terms.uplink_bps + terms.downlink_bps)
    if not np.isfinite(spent).all():
        client = int(np.argmin(np.isfinite(spent)))
        raise BadInput(
            f"fleet: client {client}: samples, rates or power make times or energies beyond float64"
        )


def _check_work(work: Work, units: int) -> None:
    least = dict.fromkeys(
        ("local_epochs", "batch_size", "bits_per_float", "model_bits_per_float", "image_bits"), 1
    )
    for name, smallest in (
        least | {"label_bits": 0, "optimizer_slots": 0, "min_cut": 0, "tail_units": 0}
    ).items():
        if not getattr(work, name) >= smallest:
            raise BadInput(f"{name}={getattr(work, name)}: choose at least {smallest}")
    if work.min_cut > units:
        raise BadInput(f"min_cut={work.min_cut}: the chain has {units} units; choose 0 to {units}")
    if work.tail_units >= units:
        raise BadInput(f"tail_units={work.tail_units}: the chain has {units} units; choose 0 to {units - 1}")
    if work.max_cut is not None and not work.min_cut <= work.max_cut <= units:
        raise BadInput(
            f"max_cut={work.max_cut}: the chain has {units} units; choose {work.min_cut} (min_cut) to {units}"
        )


def _check_wires(wires: Mapping[str, Wire], units: int) -> None:
    if not wires:
        raise BadInput("wires={}: give the bits of at least one codec, or None")
    for name, wire in wires.items():
        for field, bits in zip(Wire._fields, wire, strict=True):
            if np.shape(bits) != (units + 1,):
                raise BadInput(
                    f"wires[{name}].{field}: shape {np.shape(bits)}; must be ({units + 1},), by cut"
                )
            inner = np.asarray(bits)[1:units]
            if not (np.isfinite(inner) & (inner >= 0)).all():
                raise BadInput(f"wires[{name}].{field}={bits}: must be finite numbers, 0 or more")


def _check_devices(fleet: Fleet, work: Work, units: int) -> None:
    """Every client has FLOP/s or a device, and every device all seconds of this network and batch size."""
    if fleet.device is None:
        if np.isinf(fleet.flops).any():
            raise BadInput(
                f"fleet: client {int(np.argmax(np.isinf(fleet.flops)))}: flops=inf: must be finite"
            )
        return
    for client, name in enumerate(fleet.device.tolist()):
        if name and name not in fleet.devices:
            raise BadInput(f"fleet: client {client}: device={name}: is not among the devices of the fleet")
        if np.isinf(fleet.flops[client]) != bool(name):
            raise BadInput(f"fleet: client {client}: must have flops or a device, and not both")
    for name, device in fleet.devices.items():
        if device.batch_size != work.batch_size:
            raise BadInput(
                f"fleet: device {name}: was measured with batch_size={device.batch_size}, and"
                f" batch_size={work.batch_size} is asked for; measure it with that"
            )
        for part in ("forward_s", "backward_s"):
            seconds = np.asarray(getattr(device, part))
            if seconds.shape != (units,):
                raise BadInput(f"fleet: device {name}: {part} has shape {seconds.shape}; must be ({units},)")
            if not ((seconds > 0) & (seconds < np.inf)).all():
                raise BadInput(f"fleet: device {name}: {part} must be above 0 for every unit")
    if fleet.slowdown is not None and not ((fleet.slowdown > 0) & (fleet.slowdown < np.inf)).all():
        raise BadInput("fleet: slowdown must be above 0 and finite")


def _check_fleet(fleet: Fleet) -> None:
    rules = dict.fromkeys(("flops", "uplink_bps", "downlink_bps", "samples"), "above 0") | {
        "memory_bytes": "0 or more"
    }
    if fleet.rtt_s is not None:
        rules["rtt_s"] = "above 0"
    for name, rule in rules.items():
        if getattr(fleet, name) is None:
            raise BadInput(f"fleet: {name} is missing; costs need it for every client")
        values = np.asarray(getattr(fleet, name))
        bad = ~(values > 0) if rule == "above 0" else ~(values >= 0)
        if bad.any():
            client = int(np.argmax(bad))
            raise BadInput(f"fleet: client {client}: {name}={values[client]}: must be {rule}")
