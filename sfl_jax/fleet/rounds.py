"""What a round brings: who is asked, who is there, and how good the links are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from sfl_jax.errors import BadInput
from sfl_jax.fleet.clients import Fleet
from sfl_jax.fleet.draws import Purpose, generator, uniforms


def cohort(seed: int, round: int, clients: int, size: int) -> Int64[np.ndarray, " K"]:
    """The clients asked in a round: `size` of 0..clients-1, sorted, drawn from (seed, round) alone.

    Raises:
      BadInput: more than there are, or none.
    """
    if not 1 <= size <= clients:
        raise BadInput(f"--cohort_size={size}: must be 1 to {clients}, the number of clients")
    chosen = generator(seed, Purpose.COHORT, round).choice(clients, size, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64)


def availability(
    seed: int, round: int, ids: Sequence[int] | Int[np.ndarray, " K"], drop_probability: float
) -> Bool[np.ndarray, " K"]:
    """Which of the clients `ids` are there: each misses the round with `drop_probability`, independently.

    Raises:
      BadInput: not a probability.
    """
    if not 0 <= drop_probability <= 1:
        raise BadInput(f"drop_probability={drop_probability}: must be 0 to 1")
    return _of(ids, uniforms(seed, Purpose.AVAILABILITY, round, (_rows(ids), 1)))[:, 0] >= drop_probability


def slowdowns(
    seed: int, round: int, ids: Sequence[int] | Int[np.ndarray, " K"], jitter: float
) -> Float64[np.ndarray, " K"]:
    """How many times as long as planned the clients `ids` take: 1 + jitter * Exp(1), independently."""
    draw = _of(ids, uniforms(seed, Purpose.SLOWDOWN, round, (_rows(ids), 1)))[:, 0]
    return 1 - jitter * np.log1p(-draw)


@dataclass(frozen=True)
class Links:
    """Radio links whose rates follow Shannon's law; see `fading_rates`.

    Attributes:
      uplink_hz, downlink_hz: bandwidth of each client, both ways.
      server_transmit_w: power of the server's radio for each client.
      noise_w_per_hz: noise density N0; -174 dBm/Hz is thermal noise at 290 K.
      gain_at_1m: power gain at a metre; free space at 3.5 GHz is (wavelength / 4π)² = 4.65e-5.
      path_loss_exponent: gain falls as distance to this power; 2 in free space, 3 to 4 in towns.
      rayleigh: whether the gain of every round is multiplied by an Exp(1) draw.
    """

    uplink_hz: float = 5e6
    downlink_hz: float = 10e6
    server_transmit_w: float = 1.0
    noise_w_per_hz: float = 3.98e-21
    gain_at_1m: float = 4.65e-5
    path_loss_exponent: float = 3.5
    rayleigh: bool = True


def fading_rates(
    fleet: Fleet,
    links: Links,
    seed: int,
    round: int,
    ids: Sequence[int] | Int[np.ndarray, " K"] | None = None,
) -> Fleet:
    """The fleet with the rates of a round, r = b·log2(1 + P·g / (N0·b)) bit/s, g = g₁·distance^-n·|h|².

    |h|² is drawn from (seed, round, client index), apart for up and down; 1 without fading.

    Args:
      fleet: needs `distance_m` and `transmit_w`; its own rates are replaced.
      ids: index of each client in the whole fleet, where `fleet` is a part of one; by default 0..K-1.

    Raises:
      BadInput: a fleet without distances or powers, or a constant of the links that is not positive.
    """
    if fleet.distance_m is None or fleet.transmit_w is None:
        raise BadInput("fleet: fading links need the columns distance_m and transmit_w")
    for name, value in vars(links).items():
        if name != "rayleigh" and not 0 < value < np.inf:
            raise BadInput(f"links: {name}={value}: must be a positive number")
    ids = np.arange(len(fleet)) if ids is None else ids
    gain = links.gain_at_1m * fleet.distance_m**-links.path_loss_exponent
    fade = np.ones((len(fleet), 2))
    if links.rayleigh:
        # The smallest step of the uniform keeps a link from being exactly dead, which no plan can use.
        draw = _of(ids, uniforms(seed, Purpose.FADING, round, (_rows(ids), 2)))
        fade = -np.log1p(-np.maximum(draw, 2.0**-53))

    def rate(hz: float, watt: np.ndarray | float, fade: np.ndarray) -> np.ndarray:
        return hz * np.log1p(watt * gain * fade / (links.noise_w_per_hz * hz)) / np.log(2)

    return replace(
        fleet,
        uplink_bps=rate(links.uplink_hz, fleet.transmit_w, fade[:, 0]),
        downlink_bps=rate(links.downlink_hz, links.server_transmit_w, fade[:, 1]),
    )


def _rows(ids: Sequence[int] | np.ndarray) -> int:
    return int(np.max(ids, initial=-1)) + 1


def _of(ids: Sequence[int] | np.ndarray, rows: np.ndarray) -> np.ndarray:
    return rows[np.asarray(ids, np.int64)]
