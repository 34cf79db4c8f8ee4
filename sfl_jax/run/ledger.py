"""What a round sends, holds and computes, in closed form. Tests hold it equal to what the protocol does."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

from sfl_jax import optim
from sfl_jax.run import closing
from sfl_jax.run.parts import Parts

UP = ("model_up_bytes", "smashed_up_bytes", "labels_up_bytes")
DOWN = ("model_down_bytes", "gradient_down_bytes")
PEAKS = ("client_peak_bytes", "server_peak_bytes")


class Ledger(NamedTuple):
    """The bytes, the memory and the work of one round, of the clients that came.

    With a tail, two kinds carry more. `gradient_down_bytes` then includes the features that go down, and
    `smashed_up_bytes` includes the gradient of these features.

    client_peak_bytes: the most that one client holds to train its half. server_peak_bytes: the most that the
    server holds to train. client_flop, server_flop: the work of all steps, of all clients and of the server.
    Where the clients estimate statistics after the round, its messages and its work are in these sums.
    """

    model_down_bytes: int
    smashed_up_bytes: int
    labels_up_bytes: int
    gradient_down_bytes: int
    model_up_bytes: int
    client_peak_bytes: int
    server_peak_bytes: int
    client_flop: int
    server_flop: int


def ledger(
    parts: Parts,
    terms: optim.Terms,
    plan: optim.Plan | optim.BandPlan,
    came: Bool[np.ndarray, " K"],
    ended: Int[np.ndarray, " K"] | None = None,
) -> Ledger:
    """The ledger of a round under a plan.

    came: whether each client of the cohort took part. ended: how many steps each client that diverged took,
    the bad one included, and -1 for every other client. Such a client does not send its model, unless the
    scheme hands it on.
    """
    columns = terms.columns(plan.cuts, plan.codecs)
    ended = np.full(len(came), -1) if ended is None else ended
    samples = np.where(ended < 0, terms.samples, ended * parts.batch_size) * came
    leaves = terms.up_bits[columns] > 0
    label_bits = 0 if parts.scheme.tail_units else optim.Work().label_bits
    halves = terms.model_bits[columns] * came
    model_up = float(halves[(ended < 0) | parts.scheme.hands_on].sum())
    # A broadcast is sent once, up to the largest half.
    model_down = float(halves.sum() if terms.broadcast_bps is None else halves.max(initial=0))
    labels = float((samples * leaves * label_bits).sum())
    up, down = (float((samples * bits[columns]).sum()) for bits in (terms.up_bits, terms.down_bits))
    sent = tuple(bits / 8 for bits in (model_down, up - labels, labels, down, model_up))
    held = float(terms.needed_bytes[columns[came]].max(initial=0)), _server_bytes(parts, plan.cuts[came])
    own_flop = terms.forward_flop + terms.backward_flop
    work = tuple(float((samples * flop[columns]).sum()) for flop in (own_flop, terms.work_flop))
    counted = np.array([*sent, *held, *work]) + _estimation(parts, terms, columns, came & (ended < 0))
    counted[-2:] += _proximal(parts, terms, plan.cuts, came, ended)
    return Ledger(*map(round, counted.tolist()))


def columns(records: Iterable[Any]) -> dict[str, Float64[np.ndarray, " R"]]:
    """Each field of ledgers, or of lines of a run, with a number for each round. NaN where a record, or None,
    lacks it.
    """
    records = list(records)
    return {
        name: np.array([getattr(record, name, None) for record in records], float) for name in Ledger._fields
    }


def sent_bytes(fields: Mapping[str, Float64[np.ndarray, " R"]]) -> Float64[np.ndarray, " R"]:
    """What crossed in each round, both ways. fields: as `columns` returns them."""
    return np.sum([fields[name] for name in (*UP, *DOWN)], axis=0)


def totals(fields: Mapping[str, Float64[np.ndarray, " R"]]) -> dict[str, float]:
    """All rounds together: the sum of each field, but the largest of each peak. NaN where a round lacks it.

    Sums of what goes up and of what goes down are in it too. fields: as `columns` returns them.
    """
    peaks = {name: float(fields[name].max(initial=0)) for name in PEAKS}
    whole = {name: float(values.sum()) for name, values in fields.items()} | peaks
    up, down = (sum(whole[name] for name in names) for names in (UP, DOWN))
    return whole | {"up_bytes": up, "down_bytes": down}


def _estimation(parts, terms, columns, present) -> Float64[np.ndarray, " 9"]:
    """What the estimation of statistics after the round adds to each field."""
    phase = closing.estimation(parts, terms)
    if phase is None:
        return np.zeros(len(Ledger._fields))
    down, up = phase
    samples, parameters = down.samples * present, down.model_bits[columns] * present
    sums = (float((samples * part[columns]).sum()) for part in (down.up_bits, down.down_bits))
    to_server, to_client = (bits / 8 for bits in sums)
    model_down = float(parameters.sum() if terms.broadcast_bps is None else parameters.max(initial=0)) / 8
    model_up = float((up.model_bits[columns] * present).sum()) / 8
    flop = (float((samples * part[columns]).sum()) for part in (down.forward_flop, down.work_flop))
    return np.array([model_down, to_server, 0.0, to_client, model_up, 0.0, 0.0, *flop])


def _proximal(parts, terms, cuts, came, ended) -> Float64[np.ndarray, " 2"]:
    """What is missing of FedProx's term in the FLOP of the clients and of the server.

    The terms of the clients have it for each step and each copy, but not for units that step once for all. A
    scheme with shared copies does not take a bad step.
    """
    if not parts.training.proximal:
        return np.zeros(2)
    bad = came & (ended >= 0) & (parts.training.scheme is not None)
    at_server = _at_server(parts, cuts[bad])
    of_units = optim.proximal_flop(parts.profile, closing.work(parts))
    steps = np.where(ended < 0, terms.steps, ended - 1)[came].max(initial=0)
    own, servers = (float((held @ of_units).sum()) for held in (~at_server, at_server))
    return np.array([-own, closing.shared_flop(parts, float(steps)) - servers])


def _at_server(parts, cuts: Int[np.ndarray, " K"]) -> Bool[np.ndarray, "K L"]:
    """Whose units are at the server."""
    units = np.arange(len(parts.training.chain))
    return (units >= cuts[:, None]) & (units < parts.training.tail)


def _server_bytes(parts, cuts: Int[np.ndarray, " K"]) -> float:
    of_units = optim.unit_bytes(parts.profile, closing.work(parts))
    return parts.scheme.server_bytes(_at_server(parts, cuts), of_units)
