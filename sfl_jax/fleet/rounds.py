"""What changes from round to round: the cohort, who drops out, who is slow, and the rates of links."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from sfl_jax.errors import BadInput
from sfl_jax.fleet.clients import Fleet
from sfl_jax.fleet.draws import Purpose, generator, uniforms

_MOST_FADES = 256  # with more fades the mean over all fades is within 6 % of theirs, and replaces it


def cohort(seed: int, round: int, clients: int, size: int) -> Int64[np.ndarray, " K"]:
    """The cohort of a round: `size` of the clients 0..clients-1, sorted, drawn from (seed, round) alone.

    Raises:
      BadInput: a size below 1 or above the number of clients.
    """
    if not 1 <= size <= clients:
        raise BadInput(f"cohort_size={size}: must be 1 to {clients}, the number of clients")
    chosen = generator(seed, Purpose.COHORT, round).choice(clients, size, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64)


def order(seed: int, round: int, clients: int) -> Int64[np.ndarray, " K"]:
    """The position, from 0, at which each client of a round is served; drawn from (seed, round) alone."""
    return generator(seed, Purpose.ORDER, round).permutation(clients).astype(np.int64)


def availability(
    seed: int, round: int, ids: Sequence[int] | Int[np.ndarray, " K"], drop_probability: float
) -> Bool[np.ndarray, " K"]:
    """Which of the clients `ids` stay: each drops out of the round with `drop_probability`, independently.

    Raises:
      BadInput: `drop_probability` is not in 0..1.
    """
    if not 0 <= drop_probability <= 1:
        raise BadInput(f"drop_probability={drop_probability}: must be 0 to 1")
    return _of(ids, uniforms(seed, Purpose.AVAILABILITY, round, (_rows(ids), 1)))[:, 0] >= drop_probability


def slowdowns(
    seed: int, round: int, ids: Sequence[int] | Int[np.ndarray, " K"], jitter: float
) -> Float64[np.ndarray, " K"]:
    """How many times the planned seconds the clients `ids` take: 1 + jitter * Exp(1), independently."""
    draw = _of(ids, uniforms(seed, Purpose.SLOWDOWN, round, (_rows(ids), 1)))[:, 0]
    return 1 - jitter * np.log1p(-draw)


@dataclass(frozen=True)
class Links:
    """Radio links whose rates follow Shannon's law; see `fading_rates`.

    Attributes:
      uplink_hz, downlink_hz: bandwidth of each client, in each direction.
      server_transmit_w: power of the server's radio for each client.
      noise_w_per_hz: noise density N0; -174 dBm/Hz is thermal noise at 290 K.
      gain_at_1m: power gain at one metre; free space at 3.5 GHz is (wavelength / 4π)² = 4.65e-5.
      path_loss_exponent: the gain falls with distance to this power; 2 in free space, 3 to 4 in towns.
      rayleigh: whether gains fade: each fade multiplies the gain by an Exp(1) draw.
      coherence_s: how long a fade lasts. A transfer sees many fades, and its rate is their mean. 0 means
        fades much shorter than any transfer: the long-run (ergodic) mean.
    """

    uplink_hz: float = 5e6
    downlink_hz: float = 10e6
    server_transmit_w: float = 1.0
    noise_w_per_hz: float = 3.98e-21
    gain_at_1m: float = 4.65e-5
    path_loss_exponent: float = 3.5
    rayleigh: bool = True
    coherence_s: float = 0.0


def fading_rates(
    fleet: Fleet,
    links: Links,
    seed: int,
    round: int,
    ids: Sequence[int] | Int[np.ndarray, " K"] | None = None,
    transfer_bits: float = 0.0,
) -> Fleet:
    """The fleet with the rates of a round, in bit/s.

    A rate is the mean over fades of b·log2(1 + s·|h|²) with s = P·g / (N0·b) and g = g₁·distance^-n. The mean
    over all fades of a Rayleigh link is b/ln 2 · e^(1/s) · E1(1/s) (Goldsmith, Wireless Communications,
    section 4.2). With a coherence time it is the mean of the fades that a transfer of `transfer_bits` sees at
    that rate, at least one. These are drawn from (seed, round, client index), separately for up and down.
    Without fading |h|² is 1.

    Args:
      fleet: needs `distance_m` and `transmit_w`; its own rates are replaced.
      ids: index of each client in the whole fleet, if `fleet` is a part of one; by default 0..K-1.
      transfer_bits: the bits for which fades are counted, for example those of the whole model.

    Raises:
      BadInput: a fleet without distances or powers, or a constant of the links that is not positive.
    """
    if fleet.distance_m is None or fleet.transmit_w is None:
        raise BadInput("fleet: fading links need the columns distance_m and transmit_w")
    for name, value in vars(links).items():
        if name not in ("rayleigh", "coherence_s") and not 0 < value < np.inf:
            raise BadInput(f"links: {name}={value}: must be a positive number")
    if not links.coherence_s >= 0:
        raise BadInput(f"links: coherence_s={links.coherence_s}: must be 0 or more")
    ids = np.arange(len(fleet)) if ids is None else ids
    gain = links.gain_at_1m * fleet.distance_m**-links.path_loss_exponent
    hz = np.array([links.uplink_hz, links.downlink_hz])
    watt = np.stack([fleet.transmit_w, np.full(len(fleet), links.server_transmit_w)], axis=1)
    ratio = watt * gain[:, None] / (links.noise_w_per_hz * hz)  # signal over noise (K, 2), up and down
    if not links.rayleigh:
        rates = hz * np.log1p(ratio) / np.log(2)
    else:
        rates = hz * _mean_over_fades(ratio) / np.log(2)
        if links.coherence_s:
            fades = np.maximum(np.ceil(transfer_bits / rates / links.coherence_s), 1)
            few = fades <= _MOST_FADES
            drawn = _drawn_fades(ratio, np.where(few, fades, 0), seed, round, ids)
            rates = np.where(few, hz * drawn / np.log(2), rates)
    return replace(fleet, uplink_bps=rates[:, 0], downlink_bps=rates[:, 1])


def _mean_over_fades(ratio: np.ndarray) -> np.ndarray:
    """The mean of ln(1 + ratio·|h|²) over |h|² ~ Exp(1), which is e^x E1(x) at x = 1 / ratio."""
    from scipy import special  # imported here: it is slow to import

    return special.hyperu(1, 1, 1 / ratio)


def _drawn_fades(ratio, fades, seed, round, ids) -> np.ndarray:
    """The mean of ln(1 + ratio·|h|²) over `fades` draws for each link; all (K, 2)."""
    total = np.zeros_like(ratio)
    for number in range(int(fades.max(initial=0))):
        draw = _of(ids, uniforms(seed, Purpose.FADING, round, (_rows(ids), 2), number))
        # At least the smallest step of a uniform: no plan can use a link with a rate of exactly 0.
        gained = -np.log1p(-np.maximum(draw, 2.0**-53))
        total += np.where(number < fades, np.log1p(ratio * gained), 0.0)
    return total / np.maximum(fades, 1)


def _rows(ids: Sequence[int] | np.ndarray) -> int:
    return int(np.max(ids, initial=-1)) + 1


def _of(ids: Sequence[int] | np.ndarray, rows: np.ndarray) -> np.ndarray:
    return rows[np.asarray(ids, np.int64)]
