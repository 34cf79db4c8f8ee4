"""The bytes of a round by kind, in closed form. Tests hold them equal to the messages of the protocol."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from sfl_jax import optim


class Ledger(NamedTuple):
    """The bytes of one round by kind, summed over the clients that came.

    With a tail, two kinds carry more. `gradient_down_bytes` then includes the features that go down, and
    `smashed_up_bytes` includes the gradient of these features.
    """

    model_down_bytes: int
    smashed_up_bytes: int
    labels_up_bytes: int
    gradient_down_bytes: int
    model_up_bytes: int


def ledger(
    terms: optim.Terms, plan: optim.Plan | optim.BandPlan, came: Bool[np.ndarray, " K"], label_bits: float
) -> Ledger:
    """The bytes of a round under a plan.

    came: whether each client took part. label_bits: the bits of one label, 0 if labels stay on the client.
    """
    columns = terms.columns(plan.cuts, plan.codecs)
    samples, leaves = terms.samples * came, terms.up_bits[columns] > 0
    model = float((terms.model_bits[columns] * came).sum())
    labels = float((samples * leaves * label_bits).sum())
    up, down = (float((samples * bits[columns]).sum()) for bits in (terms.up_bits, terms.down_bits))
    return Ledger(*(round(bits / 8) for bits in (model, up - labels, labels, down, model)))
