"""Compares all methods over different fleets and servers, and when real costs differ from assumed ones."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float64

from sfl_jax import optim
from sfl_jax.planning.planner import Planner, round_key

# All methods are compared. Alternation also runs from several starts and with recall, regression also with
# its cuts rounded to the nearest.
FOUR_STARTS, RECALL, NEAREST = "alternating, 4 starts", "alternating, recall", "regression, nearest"
_OPTIONS: dict[str, dict[str, Any]] = {
    FOUR_STARTS: {"starts": ("equal", "proportional", "random", "random")},
    RECALL: {"recall": True},
    NEAREST: {"rounding": "nearest"},
}

FACTORS = 2.0 ** np.arange(-4, 5)  # of the server's FLOP/s, and of every uplink's bit/s
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of the clients, with the same server
SPREADS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # 0: all clients equal, 1: unchanged, above 1: less equal
ERRORS, DRAWS = (0.1, 0.2), 200
RANDOM_FLEETS = 5


class Case(NamedTuple):
    """One instance: the sweep, its value, and the index of the fleet that it is made from."""

    sweep: str
    value: float
    fleet: int
    terms: optim.Terms
    server_flops: float
    present: Bool[np.ndarray, " K"]


class Row(NamedTuple):
    """One method in one case: a line of the CSV. Seconds are inf if the method cannot serve every client.

    sweep, value: server_flops (FLOP/s), clients (how many), uplink (factor), heterogeneity (see `spread`), or
      error (largest relative error of the nominal costs; `draw` numbers the draws).
    round_s: the round of the method's plan; under error, of the plan for nominal costs at the true costs.
    optimum_s, bound_s: round and proven bound of the exact plan; under error, for the true costs.
    iterations: of the method.
    """

    sweep: str
    value: float
    fleet: int
    draw: int
    method: str
    round_s: float
    optimum_s: float
    bound_s: float
    iterations: int


def methods(barrier: str) -> tuple[str, ...]:
    """The methods that can be compared under a barrier, exact first."""
    return optim.STAGED_METHODS if barrier in optim.CLOCKS else (*optim.METHODS, *_OPTIONS)


def plan_of(
    method: str,
    terms: optim.Terms,
    server_flops: float,
    barrier: str,
    key: jax.Array,
    present: Bool[np.ndarray, " K"] | None = None,
) -> optim.Plan | None:
    """The plan of one method; None if it cannot serve every client."""
    name, options = method.split(",")[0], _OPTIONS.get(method, {})
    try:
        return optim.solve(terms, server_flops, name, barrier, key, present, **options)
    except optim.Infeasible:
        return None


def sweeps(planner: Planner, fleets: Iterable[optim.Terms]) -> Iterator[Row]:
    """Every method in every case of `cases`."""
    key = round_key(planner.seed, 0)
    for case in cases(planner, fleets):
        of_case = case.terms, case.server_flops, planner.barrier, key, case.present
        best = plan_of("exact", *of_case)
        for method in methods(planner.barrier):
            plan = plan_of(method, *of_case)
            yield Row(*case[:3], 0, method, *_numbers(plan, best))


def cases(planner: Planner, fleets: Iterable[optim.Terms]) -> Iterator[Case]:
    """Each fleet and the server with one thing changed at a time. Fewer clients: the first of the fleet."""
    for number, terms in enumerate(fleets):
        clients, flops = terms.shape[0], planner.server_flops
        everybody = np.ones(clients, bool)
        for factor in FACTORS:
            yield Case("server_flops", flops * factor, number, terms, flops * factor, everybody)
        for count in sorted({max(1, round(fraction * clients)) for fraction in FRACTIONS}):
            yield Case("clients", count, number, terms, flops, np.arange(clients) < count)
        for factor in FACTORS:
            faster = terms.faster(uplink=factor)
            yield Case("uplink", factor, number, faster, flops, everybody)
        for value in SPREADS:
            yield Case("heterogeneity", value, number, spread(terms, value), flops, everybody)


def spread(terms: optim.Terms, value: float) -> optim.Terms:
    """Clients made more or less equal: compute and both links to the power `value`, same geometric mean.

    A client's compute is how fast it trains the whole network.
    """
    whole_s = terms.compute_s(terms.shape[1] - 1) / terms.samples
    rates = {"compute": 1 / whole_s, "uplink": terms.uplink_bps, "downlink": terms.downlink_bps}
    means = {name: np.exp(np.log(values).mean()) for name, values in rates.items()}
    return terms.faster(**{name: (values / means[name]) ** (value - 1) for name, values in rates.items()})


def errors(planner: Planner, terms: optim.Terms, draws: int = DRAWS) -> Iterator[Row]:
    """Plans for nominal costs, kept when real compute and links differ by up to 10 % or 20 %.

    Each rate of each client is multiplied by a factor drawn uniformly from [1 - error, 1 + error]. A plan
    uses no more of the server than its own round needs; here the whole server is shared out, see
    `whole_shares`.
    """
    key = round_key(planner.seed, 0)
    plans = {
        method: plan_of(method, terms, planner.server_flops, planner.barrier, key)
        for method in methods(planner.barrier)
    }
    plans = {
        method: plan and plan._replace(shares=whole_shares(method, plan, planner.server_flops))
        for method, plan in plans.items()
    }
    rng = np.random.default_rng(planner.seed)
    for error in ERRORS:
        for draw in range(draws):
            true = terms.faster(
                *(
                    rng.uniform(1 - error, 1 + error, terms.shape[0])
                    for _ in ("compute", "uplink", "downlink")
                )
            )
            best = plan_of("exact", true, planner.server_flops, planner.barrier, key)
            for method, plan in plans.items():
                kept = plan and plan._replace(round_s=kept_round_s(plan, true, planner))
                yield Row("error", error, 0, draw, method, *_numbers(kept, best))


def whole_shares(method: str, plan: optim.Plan, server_flops: float) -> Float64[np.ndarray, " K"]:
    """A plan's shares raised to the whole server: to equal ones under equal_shares, else in proportion."""
    busy, given = plan.shares > 0, plan.shares.sum()
    if not given > 0:  # no client needs a share, or the barrier has none
        return plan.shares
    if method == "equal_shares":
        return np.where(busy, server_flops / len(plan.shares), 0.0)
    return plan.shares * max(server_flops / given, 1.0)


def kept_round_s(plan: optim.Plan, terms: optim.Terms, planner: Planner) -> float:
    """The round in seconds of a plan's cuts and shares under other terms than those it was made for."""
    return float(optim.session_ends_s(terms, plan, planner.server_flops, planner.barrier).max())


def _numbers(plan: optim.Plan | None, best: optim.Plan | None) -> tuple[float, float, float, int]:
    """round_s, optimum_s, bound_s, iterations."""
    mine = (plan.round_s, plan.iterations) if plan else (np.inf, 0)
    exact = (best.round_s, best.bound_s) if best else (np.inf, np.inf)
    return mine[0], *exact, mine[1]
