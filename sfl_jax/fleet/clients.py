"""The fleet: what is known about every client."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from jaxtyping import Float64, Int, Int64, Shaped

from sfl_jax.errors import BadInput
from sfl_jax.fleet.devices import Device
from sfl_jax.fleet.draws import Purpose, uniforms

GIB = 2.0**30


@dataclass(frozen=True, eq=False)
class Fleet:
    """K clients, in NumPy arrays with one entry per client.

    Attributes:
      client: unique names.
      flops: FLOP/s that the client sustains in training; inf for a client with a device.
      uplink_bps, downlink_bps: bit/s to and from the server.
      memory_bytes: memory that training may use.
      samples: training samples owned; None until a partition sets them.
      cycles_per_s, kappa: processor clock and its effective capacitance in J s²/cycle³, for energy budgets.
      transmit_w: power of the client's radio.
      energy_j: energy that a round may cost the client.
      distance_m: distance from the server's antenna.
      rtt_s: round-trip time of the link in seconds; None: messages travel in no time.
      device: the name in `devices` of the device that says the client's seconds; "" where flops says them.
      slowdown: factor on the seconds of the device.
      devices: the devices by name; not one for each client.
    """

    client: Shaped[np.ndarray, " K"]
    flops: Float64[np.ndarray, " K"]
    uplink_bps: Float64[np.ndarray, " K"]
    downlink_bps: Float64[np.ndarray, " K"]
    memory_bytes: Float64[np.ndarray, " K"]
    samples: Int64[np.ndarray, " K"] | None = None
    cycles_per_s: Float64[np.ndarray, " K"] | None = None
    kappa: Float64[np.ndarray, " K"] | None = None
    transmit_w: Float64[np.ndarray, " K"] | None = None
    energy_j: Float64[np.ndarray, " K"] | None = None
    distance_m: Float64[np.ndarray, " K"] | None = None
    rtt_s: Float64[np.ndarray, " K"] | None = None
    device: Shaped[np.ndarray, " K"] | None = None
    slowdown: Float64[np.ndarray, " K"] | None = None
    devices: Mapping[str, Device] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.client)

    def take(self, indices: Sequence[int] | Int[np.ndarray, " k"]) -> "Fleet":
        """The fleet of these clients, in this order."""
        chosen = np.asarray(indices, np.int64)
        return replace(self, **{name: values[chosen] for name, values in self.columns().items()})

    def with_samples(self, samples: Sequence[int] | Int[np.ndarray, " K"]) -> "Fleet":
        """The same clients with these numbers of samples."""
        return replace(self, samples=np.broadcast_to(np.asarray(samples, np.int64), len(self)))

    def columns(self) -> dict[str, np.ndarray]:
        """The attributes that are known, by name, in the order of a fleet file."""
        columns = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "devices"}
        return {name: values for name, values in columns.items() if values is not None}

    def contents(self) -> dict[str, np.ndarray]:
        """The columns and the seconds of the devices, by name: all that plans depend on."""
        tables = {
            f"device {name}": np.stack([each.forward_s, each.backward_s])
            for name, each in self.devices.items()
        }
        return self.columns() | tables


def random_fleet(clients: int, *, seed: int = 0) -> Fleet:
    """A fleet of very unequal devices. Client i depends on (seed, i) alone, not on the number of clients.

    The values are drawn log-uniformly and independently. The ranges are chosen for this project: orders of
    magnitude of public data sheets, not the parameters of a publication.

      flops         10 GFLOP/s to 1 TFLOP/s   a Raspberry Pi 4's processor to a phone's or small Jetson's GPU
      uplink_bps    5 to 50 Mbit/s            LTE in use, to ITU-R M.2410's 50 Mbit/s for 5G users
      downlink_bps  20 to 100 Mbit/s          the same, to its 100 Mbit/s
      memory_bytes  0.5 to 8 GiB              memory of boards and phones on sale

    For Shannon links: distance_m from 10 to 500, uniform over the area of a cell, and transmit_w 0.2 (23 dBm,
    power class 3 of 3GPP TS 36.101).

    Raises:
      BadInput: fewer than one client.
    """
    if clients < 1:
        raise BadInput(f"clients={clients}: must be at least 1")
    draw = uniforms(seed, Purpose.FLEET, 0, (clients, 5)).T

    def log_uniform(u: np.ndarray, low: float, high: float) -> np.ndarray:
        return low * (high / low) ** u

    return Fleet(
        client=np.arange(clients).astype(f"U{len(str(clients - 1))}"),
        flops=log_uniform(draw[0], 1e10, 1e12),
        uplink_bps=log_uniform(draw[1], 5e6, 50e6),
        downlink_bps=log_uniform(draw[2], 20e6, 100e6),
        memory_bytes=log_uniform(draw[3], 0.5 * GIB, 8 * GIB),
        transmit_w=np.full(clients, 0.2),
        distance_m=np.sqrt(10.0**2 + draw[4] * (500.0**2 - 10.0**2)),
    )
