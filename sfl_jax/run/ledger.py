"""What a round sends, holds and computes, in closed form. Tests hold it equal to what the protocol does."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sfl_jax import optim
from sfl_jax.run.parts import Parts


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

    @property
    def up_bytes(self) -> int:
        """What all clients sent."""
        return self.model_up_bytes + self.smashed_up_bytes + self.labels_up_bytes

    @property
    def down_bytes(self) -> int:
        """What the server sent."""
        return self.model_down_bytes + self.gradient_down_bytes


def ledger(
    parts: Parts, terms: optim.Terms, plan: optim.Plan | optim.BandPlan, came: Bool[np.ndarray, " K"]
) -> Ledger:
    """The ledger of a round under a plan. came: whether each client of the cohort took part."""
    columns = terms.columns(plan.cuts, plan.codecs)
    samples, leaves = terms.samples * came, terms.up_bits[columns] > 0
    label_bits = 0 if parts.scheme.tail_units else optim.Work().label_bits
    model = float((terms.model_bits[columns] * came).sum())
    labels = float((samples * leaves * label_bits).sum())
    up, down = (float((samples * bits[columns]).sum()) for bits in (terms.up_bits, terms.down_bits))
    sent = tuple(bits / 8 for bits in (model, up - labels, labels, down, model))
    held = float(terms.needed_bytes[columns[came]].max(initial=0)), _server_bytes(parts, plan.cuts[came])
    own_flop = terms.forward_flop + terms.backward_flop
    work = tuple(float((samples * flop[columns]).sum()) for flop in (own_flop, terms.work_flop))
    return Ledger(*map(round, (*sent, *held, *work)))


def _server_bytes(parts, cuts: Int[np.ndarray, " K"]) -> float:
    work = optim.Work(batch_size=parts.batch_size, optimizer_slots=parts.optimizer_slots)
    units = np.arange(len(parts.training.chain))
    at_server = (units >= cuts[:, None]) & (units < parts.training.tail)
    return parts.scheme.server_bytes(at_server, optim.unit_bytes(parts.profile, work))
