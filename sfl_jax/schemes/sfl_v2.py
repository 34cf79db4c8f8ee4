"""`sfl_v2`: each client has its own client half, and the server has one half for all clients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.errors import BadInput
from sfl_jax.federated.packing import PackedVariables
from sfl_jax.federated.round import Diverged, Model, taken, wide
from sfl_jax.federated.session import Training
from sfl_jax.models import Variables
from sfl_jax.registry import SERVER_ORDERS
from sfl_jax.schemes import turns
from sfl_jax.schemes.copies import chosen, copies, states, step, variables
from sfl_jax.schemes.scheme import Scheme, is_own


@dataclasses.dataclass(frozen=True)
class SflV2(Scheme):
    """SplitFed V2 (Thapa et al., arXiv 2004.12088): the server's half learns from one client after the other.

    At the end of a round each unit becomes a weighted mean. Clients that held the unit contribute their own
    copies. The shared copy has the weight of all other clients. With one client, it is plain SGD.

    Attributes:
      order: "client" runs a client's whole session, then the next client's, like the authors' code. "step"
        runs one step of each client in turn, like their paper. Both use an order drawn each round.
      keeps_state: whether the optimiser state of the shared copies is kept for the next round.

    Raises:
      BadInput: an unknown order.
    """

    order: str = "client"
    keeps_state: bool = True

    name = "sfl_v2"
    has_order = True

    def __post_init__(self):
        if self.order not in SERVER_ORDERS:
            raise BadInput(f"server_order={self.order}: must be one of {', '.join(SERVER_ORDERS)}")

    @property
    def clock(self) -> str:
        return "in_turn" if self.order == "client" else "lockstep"

    def shared_units(self, units: int) -> range:
        return range(units)

    @property
    def serves_together(self) -> bool:
        return False

    def start(self, training: Training, variables: Variables) -> Any:
        return states(training, PackedVariables.of(variables)) if self.keeps_state else ()

    def run_round(
        self, training, size, axis_name, model, samples, work, round_key, rate, previous=None
    ) -> Any:
        """Like `federated.round.run_round`, for one device.

        Memory: three models with order "client"; with "step", one model for each client of the round.
        """
        if self.order == "client":
            return turns.run_round(
                training, model, samples, work, round_key, rate, previous, has_own=True,
                keeps=self.keeps_state,
            )  # fmt: skip
        return self._step_by_step(training, model, samples, work, round_key, rate, previous)

    def _step_by_step(self, training, model, samples, work, round_key, rate, previous):
        """Row k of a unit's copies belongs to client k. The last row is the shared copy."""
        training = training.alone()
        like, units, clients = model.packed, range(len(training.chain)), len(work.client)
        fresh = copies(like, states(training, like))
        server = copies(like, model.kept) if self.keeps_state else fresh
        rows = jax.tree.map(
            lambda own, shared: jnp.concatenate([jnp.broadcast_to(own, (clients, *own.shape)), shared[None]]),
            fresh, server,
        )  # fmt: skip
        longest = work.batches.shape[1]
        steps = jnp.arange(longest)
        when = jnp.where(steps < work.steps[:, None], steps * clients + work.turn[:, None], longest * clients)
        turn_order = jnp.argsort(when.reshape(-1))

        def of_turn(turn, carry):
            rows, losses, is_sound, taken_of = carry
            place, index = jnp.divmod(turn_order[turn], longest)
            one = jax.tree.map(lambda x: x[place], work)
            held = [jnp.where(is_own(training, one.cut, unit), place, clients) for unit in units]
            now = tuple(
                jax.tree.map(lambda x, row=row: x[row], of) for of, row in zip(rows, held, strict=True)
            )
            new, loss, sound = step(training, like, now, samples, one, index, round_key, rate)
            sound &= is_sound[place]
            new = chosen(sound, new, now)
            rows = tuple(
                jax.tree.map(lambda x, y, row=row: x.at[row].set(y), of, own)
                for of, own, row in zip(rows, new, held, strict=True)
            )
            losses = losses.at[place].add(jnp.where(sound, loss, 0))
            taken_of = taken_of.at[place].add(is_sound[place])
            return rows, losses, is_sound.at[place].set(sound), taken_of

        losses, none = jnp.zeros(clients, jnp.result_type(float)), jnp.zeros(clients, jnp.int32)
        begin = rows, losses, jnp.ones(clients, bool), none
        rows, losses, is_sound, taken_of = lax.fori_loop(0, work.steps.sum(), of_turn, begin)
        weight = jnp.where(is_sound, work.weight, 0)
        total = weight.sum()
        mean = []
        for unit, (of, before) in enumerate(zip(rows, turns.by_unit(like), strict=True)):
            own = jnp.where(is_own(training, work.cut, unit), weight, 0)
            changes = jax.tree.map(jax.vmap(turns.change, (0, None)), of[:2], before)
            sums = jax.tree.map(
                lambda x, own=own: jnp.tensordot(own.astype(wide(x.dtype)), x[:-1].astype(wide(x.dtype)), 1),
                changes,
            )
            shared = jax.tree.map(lambda x: x[-1], changes)
            mean.append(turns.mixed(sums, own.sum(), shared, before, total))
        kept = jax.tree.map(lambda x: x[-1], tuple(of.state for of in rows)) if self.keeps_state else ()
        loss = (weight * losses / jnp.maximum(work.steps, 1)).sum() / total
        diverged = Diverged.where(~is_sound, work.client, taken_of)
        return taken(training, model, Model(variables(mean, like), kept=kept), loss, diverged, previous)
