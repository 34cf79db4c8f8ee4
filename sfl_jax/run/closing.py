"""What a round does whatever its plan is: it adds to the clock and to the ledger, and no plan chooses it.

The estimation of statistics begins when the new model is there, so its seconds add to the round. The server
gives each client its best share again. In `psl`, FedProx's term of the shared copies is computed once a step.
"""

import numpy as np
from jaxtyping import Bool, Float64

from sfl_jax import optim
from sfl_jax.federated.reestimation import BATCHES
from sfl_jax.planning import Turnout
from sfl_jax.run.parts import Parts


def work(parts: Parts) -> optim.Work:
    """What a client does in a step, as far as it does not depend on the planner."""
    scheme, data = parts.scheme, parts.data
    return optim.Work(
        batch_size=parts.batch_size, image_bits=8 * data.train_images.dtype.itemsize,
        tail_units=scheme.tail_units, optimizer_slots=parts.optimizer_slots,
        proximal=parts.training.proximal > 0, step_once=scheme.step_once(len(parts.training.chain)),
    )  # fmt: skip


def estimation(parts: Parts, terms: optim.Terms) -> optim.Estimation | None:
    """What it costs the clients of `terms` to estimate statistics; None if they do not."""
    if not parts.training.reestimates:
        return None
    return optim.estimation(parts.profile, terms, work(parts), parts.fleet.devices, BATCHES)


def shared_flop(parts: Parts, steps: float) -> float:
    """The FLOP of FedProx's term of units that step once for all clients, in a round of this many steps."""
    once = list(parts.scheme.step_once(len(parts.training.chain)))
    if not parts.training.proximal or not once:
        return 0.0
    return steps * optim.PROXIMAL_FLOP * float(parts.profile.parameters[once].sum())


def added(
    parts: Parts,
    terms: optim.Terms,
    plan: optim.Plan | optim.BandPlan,
    done: Turnout,
    slowdown: Float64[np.ndarray, " K"],
) -> tuple[optim.Plan | optim.BandPlan, Turnout]:
    """The plan and the turnout with the seconds that come after the plan's or beside them.

    The plan's bound grows by a bound on these seconds for any cuts. With a shared band it does not grow.
    """
    here, flops = done.came, parts.planner.server_flops
    if not here.any():
        return plan, done
    beside_s = _shared_s(parts, terms, here)
    after_s = bound_s = 0.0
    slow = optim.slower(optim.at_bands(terms, plan), slowdown)
    if (phase := estimation(parts, slow)) is not None:
        after_s = phase.seconds(terms.columns(plan.cuts, plan.codecs), flops, here)
        as_planned = estimation(parts, terms)
        assert as_planned is not None
        bound_s = 0.0 if isinstance(plan, optim.BandPlan) else as_planned.bound_s(flops, here)
    longer_s = beside_s + after_s
    plan = plan._replace(round_s=plan.round_s + longer_s, bound_s=plan.bound_s + beside_s + bound_s)
    return plan, done._replace(round_s=done.round_s + longer_s)


def _shared_s(parts: Parts, terms: optim.Terms, here: Bool[np.ndarray, " K"]) -> float:
    flop = shared_flop(parts, float(terms.steps[here].max()))
    return flop / parts.planner.server_flops if flop else 0.0
