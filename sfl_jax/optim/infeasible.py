"""Finds the clients that cannot be served and says why: the message of Infeasible."""

import numpy as np
from jaxtyping import Bool

from sfl_jax.optim.costs import Costs, Terms
from sfl_jax.optim.plan import Infeasible


def why_infeasible(costs: Costs | Terms, server_flops: float, present, cut: int | None = None) -> Infeasible:
    """The error that names each present (K,) client that no column (or not the column `cut`) serves."""
    usable = servable(costs, server_flops)
    lost = present & ~(usable.any(axis=1) if cut is None else usable[:, cut])
    named = tuple(int(client) for client in np.flatnonzero(lost))
    return Infeasible(named, tuple(_reason(costs, server_flops, client, cut) for client in named))


def servable(costs: Costs | Terms, server_flops: float) -> Bool[np.ndarray, "K C"]:
    """Whether a column can serve a client, whatever the other clients do."""
    clients, count = costs.shape
    return np.stack([_usable(costs, server_flops, np.full(clients, one)) for one in range(count)], axis=1)


def most_open_cut(costs: Costs | Terms, server_flops: float, present) -> int:
    """The column that serves the most present clients."""
    return int(np.argmax((servable(costs, server_flops) & present[:, None]).sum(axis=0)))


def _usable(costs: Costs | Terms, server_flops: float, cuts):
    fixed_s, work, allowed = costs.at(cuts)
    return allowed & np.isfinite(fixed_s) & ((work == 0) | (server_flops > 0))


def _reason(costs: Costs | Terms, server_flops: float, client: int, cut: int | None) -> str:
    where = (
        "every cut" if cut is None else f"cut {costs.chosen(cut).cut if isinstance(costs, Terms) else cut}"
    )
    cuts = np.arange(costs.shape[1]) if cut is None else np.array([cut])
    one = costs.take([client])
    fixed_s, work, allowed = (part[0, cuts] for part in (one.costs() if isinstance(one, Terms) else one))
    if not allowed.any():
        return _forbidden(one, cuts, where) if isinstance(one, Terms) else f"{where} is forbidden"
    if not np.isfinite(fixed_s[allowed]).any():
        return f"{where} takes infinitely long"
    if server_flops == 0 and (work[allowed] > 0).all():
        return f"{where} is forbidden or needs a server, and server_flops=0"
    return f"{where} takes longer than a float can hold"


def _forbidden(one: Terms, cuts, where: str) -> str:
    """The limit that forbids all these cuts to the one client."""
    cuts = cuts[one.permitted[cuts]]
    if not len(cuts):
        return f"min_cut or max_cut forbids {where}"
    has, needs = one.memory_bytes[0], one.needed_bytes[cuts]
    if (needs > has).all():
        return f"{where} needs at least {needs.min():.4g} bytes of memory; the client has {has:.4g}"
    if one.energy is not None:
        budget, costs = one.energy.budget_j[0], one.joules(cuts)
        if (costs > budget).all():
            return f"{where} costs at least {costs.min():.4g} J; the client's budget is {budget:.4g} J"
    return f"{where} exceeds the client's memory or its energy budget"
