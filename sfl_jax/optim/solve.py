"""One door to every method: `solve` for NumPy in and a Plan out, `solve_arrays` for jit and vmap."""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from sfl_jax.errors import BadInput
from sfl_jax.optim import baselines
from sfl_jax.optim.alternating import alternating
from sfl_jax.optim.costs import Costs, Terms
from sfl_jax.optim.exact import exact
from sfl_jax.optim.plan import Infeasible, Plan, Solution
from sfl_jax.optim.shares import optimal_shares, shares_by

Method = Literal["exact", "alternating", "equal_shares", "common_cut", "random_cut", "no_split"]
METHODS: tuple[str, ...] = get_args(Method)
BARRIERS = ("session",)


def solve(
    costs: Costs | Terms,
    server_flops: float,
    method: str = "exact",
    barrier: str = "session",
    key: jax.Array | None = None,
    present: ArrayLike | None = None,
) -> Plan:
    """Cuts and shares of one round, with the proof of how good they can be.

    server_flops: FLOP/s of the server.  present: (K,) bool, absent clients cost nothing.  key: a JAX
    random key, for random_cut only.  Runs on the CPU in float64 whatever the process's default device
    and precision are. Infeasible names the clients that no plan can serve; BadInput what makes no sense.
    """
    _check(costs, server_flops, method, barrier, key)
    clients = costs.shape[0]
    here = np.ones(clients, bool) if present is None else np.asarray(present, bool)
    if here.shape != (clients,):
        raise BadInput(f"present has shape {here.shape}; it must be ({clients},), a bool for each client")
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        key = None if key is None else jax.device_put(key, cpu)
        solution = _compiled(costs, np.float64(server_flops), method=method, key=key, present=here)
        plan = jax.tree.map(np.asarray, solution)
    if not plan.feasible:
        raise why_infeasible(costs, float(server_flops), method, here)
    return Plan(
        plan.cuts, plan.shares, plan.client_s, float(plan.round_s), float(plan.bound_s), int(plan.iterations)
    )


def solve_arrays(costs, server_flops, method: str = "exact", key=None, present=None) -> Solution:
    """The pure twin of `solve` under the session barrier, for jit and vmap: a flag instead of Infeasible.

    Arrays must be float64 (`jax.enable_x64(True)`), or the bound would prove nothing. Nothing is checked.
    """
    if jnp.result_type(float) != jnp.float64:
        raise BadInput("solve_arrays runs in float32 here; call it under jax.enable_x64(True)")
    costs = jax.tree.map(jnp.asarray, costs)
    server_flops = jnp.asarray(server_flops, float)
    present = jnp.ones(costs.shape[0], bool) if present is None else present
    optimum = exact(costs, server_flops, present)
    cuts, iterations = optimum.cuts, optimum.iterations
    if method == "alternating":
        cuts, iterations = alternating(costs, server_flops, present)
    elif method == "equal_shares":
        cuts = baselines.equal_shares(costs, server_flops, present)
    elif method == "common_cut":
        cuts = baselines.common_cut(costs, server_flops, present)
    elif method == "random_cut":
        cuts = baselines.random_cut(costs, server_flops, key)
    elif method == "no_split":
        cuts = baselines.no_split(costs)
    fixed_s, server_flop, allowed = costs.at(cuts)
    served = jnp.all(allowed | ~present)
    if method == "equal_shares":
        share = server_flops / jnp.maximum(jnp.sum(present), 1)
        used = jnp.where(server_flop > 0, server_flop / share, 0.0)
        round_s = jnp.max(jnp.where(present, fixed_s + used, 0.0), initial=0.0)
        shares, ends, round_s = shares_by(round_s, fixed_s, server_flop, server_flops, present)
    else:
        shares, ends, round_s = optimal_shares(fixed_s, server_flop, server_flops, present)
    cuts = jnp.where(present, cuts, costs.shape[1] - 1)
    # The bound is infinite where nothing is feasible at all.
    feasible = served & jnp.isfinite(round_s)
    return Solution(cuts, shares, ends, round_s, optimum.bound_s, iterations, feasible)


_compiled = partial(jax.jit, static_argnames="method")(solve_arrays)


def why_infeasible(costs: Costs | Terms, server_flops: float, method: str, present) -> Infeasible:
    """The error that names the clients a method cannot serve, and what stands in the way of each."""
    clients, count = costs.shape
    columns = [costs.at(np.full(clients, cut)) for cut in range(count)]
    fixed_s, work, allowed = (np.stack(parts, axis=1) for parts in zip(*columns, strict=True))
    usable = allowed & np.isfinite(fixed_s)
    if server_flops == 0:
        usable &= work == 0
    cut = None
    if method == "no_split":
        cut = count - 1
    elif method == "common_cut" and usable[present].any(axis=1).all():
        cut = int(usable[present].sum(axis=0).argmax())
    lost = present & ~(usable.any(axis=1) if cut is None else usable[:, cut])
    named = tuple(int(client) for client in np.flatnonzero(lost))
    return Infeasible(named, tuple(_reason(costs, server_flops, client, cut) for client in named))


def _reason(costs: Costs | Terms, server_flops: float, client: int, cut: int | None) -> str:
    where = "every cut" if cut is None else f"cut {cut}"
    if isinstance(costs, Terms):
        one = costs.take([client])
        cuts = np.arange(costs.shape[1]) if cut is None else np.array([cut])
        cuts = cuts[one.permitted[cuts]]
        if not len(cuts):
            return f"min_cut forbids {where}"
        memory = one.needed_bytes[cuts]
        if (memory > one.memory_bytes).all():
            return (
                f"{where} needs {memory.min():.4g} bytes of memory or more, it has {one.memory_bytes[0]:.4g}"
            )
        joules = one.energy_j(cuts)
        if joules is not None and (joules > one.energy.budget_j).all():
            return f"{where} costs {joules.min():.4g} J or more, its budget is {one.energy.budget_j[0]:.4g} J"
        if joules is not None and not one.at(cuts)[2].any():
            return f"{where} that fits its memory breaks its energy budget"
    _, work, allowed = (part[client] for part in _dense_row(costs, client))
    usable = allowed if cut is None else allowed & (np.arange(len(allowed)) == cut)
    if not usable.any():
        return f"{where} is forbidden"
    if server_flops == 0 and (work[usable] > 0).all():
        return f"{where} open to it needs a server, and server_flops=0"
    return f"{where} takes for ever"


def _dense_row(costs: Costs | Terms, client: int):
    row = (
        costs.take([client]).costs()
        if isinstance(costs, Terms)
        else Costs(*(part[[client]] for part in costs))
    )
    return tuple({client: part[0]} for part in row)


def _check(costs: Costs | Terms, server_flops: float, method: str, barrier: str, key) -> None:
    if method not in METHODS:
        raise BadInput(f"method={method}: choose one of {', '.join(METHODS)}")
    if barrier not in BARRIERS:
        raise BadInput(f"barrier={barrier}: choose one of {', '.join(BARRIERS)}")
    if method == "random_cut" and key is None:
        raise BadInput("method=random_cut needs key, a JAX random key; got None")
    if not 0 <= server_flops < np.inf:
        raise BadInput(f"server_flops={server_flops}: give a finite number of FLOP/s, 0 or more")
    if isinstance(costs, Costs):
        shapes = {np.shape(part) for part in costs}
        if len(shapes) > 1 or len(costs.shape) != 2 or 0 in costs.shape:
            raise BadInput(
                f"costs have shapes {sorted(shapes)}; all three must be the same (K, C), none of it 0"
            )
        for name in ("fixed_s", "server_flop"):
            values = getattr(costs, name)[costs.allowed]
            if not (np.isfinite(values) & (values >= 0)).all():
                raise BadInput(
                    f"costs.{name} holds a negative number, inf or NaN; forbid that cut in allowed instead"
                )
