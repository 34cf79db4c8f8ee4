"""How many rounds a training takes to an accuracy: a model whose constants are estimated from trainings.

Clients have copies of their own of the first units, and share one copy of the others. Unit i has the part p_i
of the squared gradient. A round brings own = sum p_i n over the first units and shared = sum p_i n over the
others, with n full updates in a round of S steps. More steps on the same clients' data bring less, as in
bounds for local SGD (for split training: Lin et al., AdaptSFL, arXiv 2403.13101, theorem 1), and so does a
codec with relative squared error Q. The rounds are

  R = 1 / (own_rate own + shared_rate shared - (length_cost S^2 + noise_cost Q) (own + shared)).

The four constants are at least 0. They depend on the data, the network, the optimiser, the scheme, the cohort
and the accuracy. So they are fitted to rounds that came, in which 1 / R is linear. This is a model, no bound.
"""

from typing import NamedTuple

import numpy as np
from scipy import optimize

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import Floats


class Features(NamedTuple):
    """What the model needs of N trainings; (N,) each, at least 0."""

    own: Floats  # weighted updates of own copies in a round
    shared: Floats  # weighted updates of shared copies in a round
    length: Floats  # squared steps of a round
    noise: Floats

    def of(self, places) -> "Features":
        """The features of some trainings."""
        return Features(*(np.asarray(part)[places] for part in self))

    @property
    def table(self) -> Floats:
        """What each constant is multiplied by in 1 / R; (N, 4)."""
        whole = self.own + self.shared
        return np.stack([self.own, self.shared, -self.length * whole, -self.noise * whole], axis=1)


class RoundsModel(NamedTuple):
    """The constants."""

    own_rate: float
    shared_rate: float
    length_cost: float
    noise_cost: float

    def rounds(self, features: Features) -> Floats:
        """The predicted rounds (N,); inf where the model says that the accuracy is not reached."""
        per_round = features.table @ np.array(self)
        return np.divide(1.0, per_round, out=np.full(len(per_round), np.inf), where=per_round > 0)


def features(
    parts: Floats, own_units: int, steps: float, own_updates: float, shared_updates: float, noise: float
) -> tuple[float, float, float, float]:
    """(own, shared, length, noise) of one training.

    parts: (L,) part of each unit in the squared gradient.  own_units: the first units, of which clients have
    copies.  steps: local steps of a client in a round.  own_updates, shared_updates: how many full updates
    these steps are for an own copy and for a shared one; see `restarted`.
    """
    own = float(parts[:own_units].sum() / parts.sum())
    return own * own_updates, (1 - own) * shared_updates, steps**2, noise


def restarted(steps: float, momentum: float) -> float:
    """How many full updates `steps` steps are worth if momentum starts at 0: sum over t of 1 - momentum^t."""
    return steps - momentum * (1 - momentum**steps) / (1 - momentum)


def fit_rounds(known: Features, rounds: Floats) -> RoundsModel:
    """The constants by least squares of R (1 / R as modelled) - 1. BadInput without a training."""
    rounds = np.asarray(rounds, float)
    if not len(rounds) or not (np.isfinite(rounds) & (rounds > 0)).all():
        raise BadInput("rounds: must be at least one finite number above 0")
    rows = rounds[:, None] * known.table
    size = np.linalg.norm(rows, axis=0)
    scale = np.where(size > 0, size, 1.0)
    found = optimize.nnls(rows / scale, np.ones(len(rounds)))[0]
    return RoundsModel(*(found / scale).tolist())


def left_out(known: Features, rounds: Floats) -> Floats:
    """The rounds (N,) of each training as predicted from the others; NaN if there is no other."""
    rounds, predicted = np.asarray(rounds, float), np.full(len(rounds), np.nan)
    for place in range(len(rounds)):
        others = np.arange(len(rounds)) != place
        if others.any():
            model = fit_rounds(known.of(others), rounds[others])
            predicted[place] = model.rounds(known.of([place]))[0]
    return predicted
