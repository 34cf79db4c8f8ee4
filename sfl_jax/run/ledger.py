"""What a round sends, holds and computes, in closed form. Tests hold it equal to what the protocol does."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

from sfl_jax import optim
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
    parts: Parts, terms: optim.Terms, plan: optim.Plan | optim.BandPlan, came: Bool[np.ndarray, " K"]
) -> Ledger:
    """The ledger of a round under a plan. came: whether each client of the cohort took part."""
    columns = terms.columns(plan.cuts, plan.codecs)
    samples, leaves = terms.samples * came, terms.up_bits[columns] > 0
    label_bits = 0 if parts.scheme.tail_units else optim.Work().label_bits
    model = float((terms.model_bits[columns] * came).sum())
    # A broadcast is sent once, up to the largest half.
    model_down = (
        model if terms.broadcast_bps is None else float((terms.model_bits[columns] * came).max(initial=0))
    )
    labels = float((samples * leaves * label_bits).sum())
    up, down = (float((samples * bits[columns]).sum()) for bits in (terms.up_bits, terms.down_bits))
    sent = tuple(bits / 8 for bits in (model_down, up - labels, labels, down, model))
    held = float(terms.needed_bytes[columns[came]].max(initial=0)), _server_bytes(parts, plan.cuts[came])
    own_flop = terms.forward_flop + terms.backward_flop
    work = tuple(float((samples * flop[columns]).sum()) for flop in (own_flop, terms.work_flop))
    return Ledger(*map(round, (*sent, *held, *work)))


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


def _server_bytes(parts, cuts: Int[np.ndarray, " K"]) -> float:
    work = optim.Work(batch_size=parts.batch_size, optimizer_slots=parts.optimizer_slots)
    units = np.arange(len(parts.training.chain))
    at_server = (units >= cuts[:, None]) & (units < parts.training.tail)
    return parts.scheme.server_bytes(at_server, optim.unit_bytes(parts.profile, work))
