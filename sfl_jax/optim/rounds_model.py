"""How many rounds a training takes to an accuracy: a model whose constants are estimated from trainings.

In a round unit i is updated n_i times. It has the part p_i of the squared gradient, so that the loss falls in
proportion to the progress P = sum_i p_i n_i. Copies that clients hold drift apart for S local steps before
they are averaged, by D = S^2 sum_i p_i over these units. A codec adds noise Q, its relative squared error. As
in bounds for local SGD (for split training: Lin et al., AdaptSFL, arXiv 2403.13101, theorem 1), the rounds
are

  R = 1 / (P (progress_rate - drift_cost D - noise_cost Q)).

The three constants are at least 0. They depend on the data, the network, the optimiser and the accuracy, so
they are fitted to rounds that came: 1 / (R P) is linear in them. This is a model, not a bound.
"""

from typing import NamedTuple

import numpy as np
from scipy import optimize

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import Floats


class Features(NamedTuple):
    """What the model needs of N trainings; (N,) each."""

    progress: Floats  # weighted updates of a round, above 0
    drift: Floats  # at least 0
    noise: Floats  # at least 0

    def of(self, places) -> "Features":
        """The features of some trainings."""
        return Features(*(np.asarray(part)[places] for part in self))


class RoundsModel(NamedTuple):
    """The constants."""

    progress_rate: float
    drift_cost: float
    noise_cost: float

    def rounds(self, features: Features) -> Floats:
        """The predicted rounds (N,); inf where the model says that the accuracy is not reached."""
        rate = self.progress_rate - self.drift_cost * features.drift - self.noise_cost * features.noise
        per_round = features.progress * np.maximum(rate, 0.0)
        return np.divide(1.0, per_round, out=np.full(len(per_round), np.inf), where=per_round > 0)


def features(
    parts: Floats, own_units: int, steps: float, own_updates: float, shared_updates: float, noise: float
) -> tuple[float, float, float]:
    """(progress, drift, noise) of one training.

    parts: (L,) part of each unit in the squared gradient.  own_units: the first units, of which clients have
    copies.  steps: local steps of a client in a round.  own_updates, shared_updates: how many full updates a
    round brings to an own copy, and to a copy that the clients share; see `restarted`.
    """
    own = float(parts[:own_units].sum() / parts.sum())
    return own * own_updates + (1 - own) * shared_updates, own * steps**2, noise


def restarted(steps: float, momentum: float) -> float:
    """How many full updates `steps` steps are worth if momentum starts at 0: sum over t of 1 - momentum^t."""
    return steps - momentum * (1 - momentum**steps) / (1 - momentum)


def fit_rounds(known: Features, rounds: Floats) -> RoundsModel:
    """The constants by least squares of the relative error of 1 / R. BadInput without a training."""
    rounds = np.asarray(rounds, float)
    if not len(rounds) or not (np.isfinite(rounds) & (rounds > 0)).all():
        raise BadInput("rounds: must be at least one finite number above 0")
    scale = np.maximum([1.0, known.drift.max(), known.noise.max()], 1e-300)
    columns = np.stack([np.ones(len(rounds)), -known.drift, -known.noise], axis=1) / scale
    rows = (rounds * known.progress)[:, None] * columns
    answer = optimize.lsq_linear(rows, np.ones(len(rounds)), bounds=(0, np.inf), tol=1e-12)
    return RoundsModel(*(answer.x / scale).tolist())


def left_out(known: Features, rounds: Floats) -> Floats:
    """The rounds (N,) of each training as predicted from the others; NaN if there is no other."""
    rounds, predicted = np.asarray(rounds, float), np.full(len(rounds), np.nan)
    for place in range(len(rounds)):
        others = np.arange(len(rounds)) != place
        if others.any():
            model = fit_rounds(known.of(others), rounds[others])
            predicted[place] = model.rounds(known.of([place]))[0]
    return predicted
