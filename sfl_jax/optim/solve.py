"""Entry points to all methods: `solve` takes NumPy and returns a Plan, `solve_arrays` is for jit and vmap."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from sfl_jax import registry
from sfl_jax.errors import BadInput
from sfl_jax.optim.clocks import CLOCKS, solve_clock
from sfl_jax.optim.clocks import METHODS as STAGED_METHODS
from sfl_jax.optim.costs import Costs, Terms
from sfl_jax.optim.exact import exact
from sfl_jax.optim.infeasible import most_open_cut, why_infeasible
from sfl_jax.optim.needed import needed_cuts
from sfl_jax.optim.plan import Options, Plan, Solution
from sfl_jax.optim.regression import fit_curves, relaxed
from sfl_jax.optim.shares import optimal_shares, shares_by
from sfl_jax.optim.table import MANY, Needed
from sfl_jax.registry import ROUNDINGS, STARTS

_VARYING = "work_conserving"  # its shares vary in time, and `serving.py` plans it
METHODS = tuple(name for name in registry.METHODS if name != _VARYING)
_BLOCK = 16  # more than any EfficientNetV2's needed cuts if the clients have enough memory


def solve(
    costs: Costs | Terms,
    server_flops: float,
    method: str = "exact",
    barrier: str = "session",
    key: jax.Array | None = None,
    present: ArrayLike | None = None,
    *,
    starts: Sequence[str] = ("equal",),
    recall: bool = False,
    rounding: str = "need",
) -> Plan:
    """Cuts and shares of one round, with a proven lower bound on the round.

    costs: regression, and all barriers but "session", need Terms.
    server_flops: FLOP/s of the server.
    method: a name of `registry.METHODS` but "work_conserving".
    barrier: "session", "staged", "in_turn", "handover" or "lockstep"; `clocks.py` says what is proven of
    each.
    key: a JAX random key, for random_cut and random starts.
    present: (K,) bool; absent clients cost nothing.
    starts: first shares of alternating and regression, which keep the best result: "equal", "proportional",
      "random".
    recall: alternating and regression call back clients that train alone and end last. `alternating` is then
      optimal.
    rounding: how regression makes continuous cuts whole: "need" or "nearest", see `regression.py`.

    With several codecs a plan chooses options: common_cut the best one for all, random_cut random ones;
    regression is refused. Runs on the CPU in float64, whatever the process's default device and precision.
    Infeasible names the clients that the method cannot serve. BadInput names the argument that is not
    allowed.
    """
    _check(costs, server_flops, method, barrier, key, starts, rounding)
    clients, count = costs.shape
    here = np.ones(clients, bool) if present is None else np.asarray(present, bool)
    if here.shape != (clients,):
        raise BadInput(f"present: shape {here.shape}; must be ({clients},), one bool per client")
    if barrier in CLOCKS:
        assert isinstance(costs, Terms)
        return _in_options(costs, solve_clock(costs, server_flops, method, barrier, key, here))
    curves = (
        relaxed(costs, fit_curves(costs)) if method == "regression" and isinstance(costs, Terms) else None
    )
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        key = None if key is None else jax.device_put(key, cpu)
        flops = np.float64(server_flops)
        # The optimum is compiled apart, once for all methods: it is the bound of each.
        plan = _exact(costs, flops, here, *_needed(costs))
        if method != "exact":
            chosen = _other(costs, flops, here, method, key, tuple(starts), curves, recall, rounding)
            plan = chosen._replace(bound_s=plan.bound_s, iterations=chosen.iterations)
        plan = jax.tree.map(np.asarray, plan)
    if not plan.feasible:
        cut = {"no_split": lambda: count - 1, "common_cut": lambda: most_open_cut(costs, server_flops, here)}
        raise why_infeasible(costs, float(server_flops), here, cut[method]() if method in cut else None)
    numbers = float(plan.round_s), float(plan.bound_s), int(plan.iterations)
    return _in_options(costs, Plan(plan.cuts, plan.shares, plan.client_s, *numbers))


def _in_options(costs: Costs | Terms, plan: Plan) -> Plan:
    """The plan with the cuts and codecs of its columns."""
    if isinstance(costs, Costs):
        return plan._replace(codecs=np.zeros_like(plan.cuts))
    cuts, codecs = costs.chosen(plan.cuts)
    return plan._replace(cuts=cuts, codecs=codecs)


def solve_arrays(
    costs,
    server_flops,
    method: str = "exact",
    key=None,
    present=None,
    *,
    starts=("equal",),
    curves=None,
    recall=False,
    rounding="need",
) -> Solution:
    """`solve` under the session barrier as a pure function for jit and vmap: a flag instead of Infeasible.

    The cuts are columns of the costs: with several codecs, see `Terms.chosen`. Arrays must be float64
    (`jax.enable_x64(True)`), else the bound proves nothing. curves: for regression,
    relaxed(terms, fit_curves(terms)). The other arguments are those of `solve`, and are not checked.
    """
    if jnp.result_type(float) != jnp.float64:
        raise BadInput("solve_arrays runs in float32 here; call it under jax.enable_x64(True)")
    costs, curves = jax.tree.map(jnp.asarray, (costs, curves))
    server_flops = jnp.asarray(server_flops, float)
    present = jnp.ones(costs.shape[0], bool) if present is None else jnp.asarray(present)
    best = _optimum(costs, server_flops, present)
    if method == "exact":
        return best
    other = _chosen(costs, server_flops, present, method, key, starts, curves, recall, rounding)
    return other._replace(bound_s=best.bound_s)


def _needed(costs: Costs | Terms) -> tuple[Needed | None, int | None]:
    """The cuts to try for very many clients, and how many to unroll. For fewer clients all cuts are cheap."""
    clients, count = costs.shape
    if isinstance(costs, Costs) or clients < MANY:
        return None, None
    cuts = needed_cuts(costs)
    others = np.setdiff1d(np.arange(count, dtype=np.int32), cuts)
    return Needed(np.concatenate([cuts, others]), np.int32(len(cuts))), -(-len(cuts) // _BLOCK) * _BLOCK


def _optimum(costs, server_flops, present, needed=None, block=None) -> Solution:
    cuts, bound_s, passes = exact(costs, server_flops, present, block, needed)
    fixed_s, server_flop, allowed = costs.at(cuts)
    shares, ends, round_s = optimal_shares(fixed_s, server_flop, server_flops, present)
    feasible = jnp.all(allowed | ~present) & jnp.isfinite(round_s)
    return Solution(cuts, shares, ends, round_s, bound_s, passes, feasible)


def _chosen(costs, server_flops, present, method, key, starts, curves, recall, rounding) -> Solution:
    """Any other method's solution, without a bound."""
    options = Options(key, tuple(starts), recall, rounding, curves)
    cuts, steps, has_equal_shares = registry.METHODS[method](costs, server_flops, present, options)
    cuts = jnp.where(present, cuts, costs.shape[1] - 1).astype(jnp.int32)
    fixed_s, server_flop, allowed = costs.at(cuts)
    if has_equal_shares:
        share = server_flops / jnp.maximum(jnp.sum(present), 1)
        serving_s = jnp.where(server_flop > 0, server_flop / share, 0.0)
        round_s = jnp.max(jnp.where(present, fixed_s + serving_s, 0.0))
        shares, ends, round_s = shares_by(round_s, fixed_s, server_flop, server_flops, present)
    else:
        shares, ends, round_s = optimal_shares(fixed_s, server_flop, server_flops, present)
    feasible = jnp.all(allowed | ~present) & jnp.isfinite(round_s)
    return Solution(cuts, shares, ends, round_s, jnp.zeros(()), jnp.int32(steps), feasible)


_exact = jax.jit(_optimum, static_argnames="block")
_other = partial(jax.jit, static_argnames=("method", "starts", "recall", "rounding"))(_chosen)


def _check(
    costs: Costs | Terms, server_flops: float, method: str, barrier: str, key, starts, rounding
) -> None:
    if method == _VARYING or method not in registry.METHODS:  # which may have been added to since the import
        known = [name for name in registry.METHODS if name != _VARYING]
        raise BadInput(f"method={method}: choose one of {', '.join(known)}")
    if barrier not in ("session", *CLOCKS):
        raise BadInput(f"barrier={barrier}: choose one of session, {', '.join(CLOCKS)}")
    if barrier in CLOCKS and method not in STAGED_METHODS:
        raise BadInput(f"method={method}: barrier={barrier} allows only {', '.join(STAGED_METHODS)}")
    if not isinstance(costs, Terms) and (barrier in CLOCKS or method == "regression"):
        raise BadInput(
            f"method={method}, barrier={barrier}: needs Terms; Costs do not split the seconds by term"
        )
    if not starts or not set(starts) <= set(STARTS):
        raise BadInput(f"starts={starts}: choose some of {', '.join(STARTS)}")
    if rounding not in ROUNDINGS:
        raise BadInput(f"rounding={rounding}: choose one of {', '.join(ROUNDINGS)}")
    if key is None and (method == "random_cut" or "random" in starts):
        what = "method=random_cut" if method == "random_cut" else f"starts={starts}"
        raise BadInput(f"{what}: needs key, a JAX random key; got None")
    if not 0 <= server_flops < np.inf:
        raise BadInput(f"server_flops={server_flops}: give a finite number of FLOP/s, 0 or more")
    if isinstance(costs, Costs):
        _check_costs(costs)


def _check_costs(costs: Costs) -> None:
    shapes = sorted({np.shape(part) for part in costs})
    if len(shapes) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise BadInput(f"costs: shapes {shapes}; all three must be the same (K, C), with K and C above 0")
    for name in ("fixed_s", "server_flop"):
        values = getattr(costs, name)[costs.allowed]
        if not (np.isfinite(values) & (values >= 0)).all():
            raise BadInput(
                f"costs.{name}: has a negative number, inf or NaN; forbid that cut in `allowed` instead"
            )
