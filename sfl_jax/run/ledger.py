"""The bytes of a round by kind, in closed form; tests hold them equal to the protocol's messages."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from sfl_jax import optim


class Ledger(NamedTuple):
    """Bytes of all clients that came, in one round.

    With a tail, features come down beside the gradient, and their gradient goes up beside the smashed data.
    """

    model_down_bytes: int = 0
    smashed_up_bytes: int = 0
    labels_up_bytes: int = 0
    gradient_down_bytes: int = 0
    model_up_bytes: int = 0


def ledger(
    terms: optim.Terms, plan: optim.Plan | optim.BandPlan, came: Bool[np.ndarray, " K"], label_bits: float
) -> Ledger:
    """The bytes of a round under a plan. label_bits: of a sample whose label goes up, 0 if none does."""
    columns = terms.columns(plan.cuts, plan.codecs)
    samples, leaves = terms.samples * came, terms.up_bits[columns] > 0
    model = float((terms.model_bits[columns] * came).sum())
    labels = float((samples * leaves * label_bits).sum())
    up, down = (float((samples * bits[columns]).sum()) for bits in (terms.up_bits, terms.down_bits))
    return Ledger(*(round(bits / 8) for bits in (model, up - labels, labels, down, model)))
