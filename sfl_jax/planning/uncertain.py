"""Plans for uncertain rates: for the worst case or a quantile of sampled rounds, tested on other rounds."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from sfl_jax import fleet as fleets
from sfl_jax import models, optim
from sfl_jax.errors import BadInput
from sfl_jax.fleet.draws import Purpose, generator
from sfl_jax.planning.comparison import whole_shares
from sfl_jax.planning.insight import Planned
from sfl_jax.planning.planner import Planner, named

SAMPLES, TESTS = 100, 400  # rounds drawn from intervals, to plan on and to test with
OWN, WORST, MEANS, MEANS_KEPT, EACH = (
    "this plan", "worst case", "plan on means", "plan on means, shares stay", "best cuts of each round",
)  # fmt: skip


class Tested(NamedTuple):
    """One way to plan, in rounds that it was not planned on.

    rounds_s: (N,) s; the server's shares follow the rates of each round, unless the name says that they stay.
    """

    name: str
    rounds_s: Float64[np.ndarray, " N"]


class UncertainPlanned(NamedTuple):
    """A plan for uncertain rates.

    planned: the plan, with the terms of the round that it promises: the worst case, or the sampled round at
      the quantile. Its shares are those of that round.
    quantile: what part of the sampled rounds it is planned for; 0 for the worst case.
    samples: rounds that it was planned on.
    tested: ways to plan, this one first. With traces all are planned on one half of the rounds here, and
      tested with the other.
    """

    planned: Planned
    quantile: float
    samples: int
    tested: tuple[Tested, ...]


def plan_uncertain(
    planner: Planner,
    profile: models.Profile,
    fleet: fleets.Fleet,
    terms: optim.Terms,
    sampled: optim.Rates,
    test: optim.Rates | None,
    quantile: float,
    lowest: optim.Rates | None = None,
) -> UncertainPlanned:
    """Plans for sampled rates.

    test: rates of rounds to test with; None splits `sampled`: every second round tests what is planned on the
    others. quantile: 0 plans for the worst case, every rate of every client at its least. lowest: these least
    rates (K,), if not the least of the samples. BadInput names clients that cannot be served.
    """
    if not np.isfinite(terms.flops).all():
        client = fleet.client[int(np.argmin(np.isfinite(terms.flops)))]
        raise BadInput(f"client {client} has measured seconds; rates that change need FLOP/s of every client")
    flops = planner.server_flops
    lowest = sampled.least() if lowest is None else lowest
    try:
        plan, rates = _planned(terms, sampled, flops, quantile, lowest)
        own = plan
        if test is None:
            if sampled.samples < 2:
                raise BadInput("has 1 round; must have 2 or more, to plan on and to test with")
            sampled, test = sampled.of(slice(0, None, 2)), sampled.of(slice(1, None, 2))
            lowest = sampled.least()
            own, _ = _planned(terms, sampled, flops, quantile, lowest)
        tested = _tested(terms, sampled, test, flops, own, lowest, quantile)
    except optim.Infeasible as error:
        raise BadInput(named(error, fleet)) from error
    whole = Planned(planner, profile, fleet, optim.at_rates(terms, rates), plan)
    return UncertainPlanned(whole, quantile, sampled.samples, tested)


def drawn_rates(terms: optim.Terms, low: float, high: float, samples: int, seed: int, test: bool = False):
    """Rates of (samples, K): each rate times a factor, drawn uniformly and independently from [low, high]."""
    rng = generator(seed, Purpose.INTERVAL, int(test))
    shape = samples, terms.shape[0]
    return optim.Rates(
        *(getattr(terms, name) * rng.uniform(low, high, shape) for name in optim.Rates._fields)
    )


def _planned(terms, sampled, flops, quantile, lowest) -> tuple[optim.Plan, optim.Rates]:
    """The plan, and the rates (K,) of the round that it promises."""
    if not quantile:
        return optim.solve(optim.at_rates(terms, lowest), flops), lowest
    found = optim.solve_quantile(terms, sampled, flops, quantile)
    return found.plan, sampled.of(found.sample)


def _tested(terms, sampled, test, flops, own, lowest, quantile) -> tuple[Tested, ...]:
    means = optim.solve(optim.at_rates(terms, sampled.mean()), flops)
    plans = {OWN: own, MEANS: means}
    if quantile:
        plans[WORST] = optim.solve(optim.at_rates(terms, lowest), flops)
    tested = [Tested(name, _followed(terms, test, flops, plan)) for name, plan in plans.items()]
    kept = means._replace(shares=whole_shares("exact", means, flops))
    ends_s = [
        optim.session_ends_s(optim.at_rates(terms, test.of(n)), kept, flops).max()
        for n in range(test.samples)
    ]
    best_s = [optim.solve(optim.at_rates(terms, test.of(n)), flops).round_s for n in range(test.samples)]
    return *tested, Tested(MEANS_KEPT, np.array(ends_s)), Tested(EACH, np.array(best_s))


def _followed(terms, test, flops, plan):
    return optim.rounds_s(terms, test, flops, terms.columns(plan.cuts, plan.codecs))
