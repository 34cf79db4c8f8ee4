"""`psl`: parallel split learning. All clients take each step together, and the server updates once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.errors import BadInput
from sfl_jax.federated.packing import PackedVariables
from sfl_jax.federated.round import Diverged, Model, change, narrow, taken, wide
from sfl_jax.federated.session import Training
from sfl_jax.models import Variables
from sfl_jax.registry import SERVER_BATCHES
from sfl_jax.schemes.copies import copies, states, variables
from sfl_jax.schemes.lockstep import Lockstep
from sfl_jax.schemes.scheme import CHUNKS, Scheme
from sfl_jax.schemes.turns import by_unit


@dataclasses.dataclass(frozen=True)
class Psl(Scheme):
    """Parallel split learning (Jeon and Kim 2020; Lin et al., arXiv 2403.13101).

    Units from `most` on have one shared copy. It steps along the mean gradient over the samples of all
    clients that still have a step to do. Each unit below `most` has a copy for every client. A client's
    copies from its cut to `most` are on the server. All copies are averaged at the end of the round. With
    `most` 0, psl is SGD with large batches. With `most` L, it is federated averaging.

    Attributes:
      most: the largest cut of the run; None means the number of units. It is compiled into the round.
      server_batch: "separate" normalises each client's batch by itself and keeps the mean of the statistics.
        "joined" gives the server one batch with all clients' samples. Then every client must take part, with
        the same number of steps.
      keeps_state: whether the optimiser state of the shared copies is kept for the next round.

    Raises:
      BadInput: an unknown kind of batch, or a negative cut.
    """

    most: int | None = None
    server_batch: str = "separate"
    keeps_state: bool = True

    name = "psl"
    cuts_matter = False  # the largest cut of the run does, which is the same in every plan

    def __post_init__(self):
        if self.server_batch not in SERVER_BATCHES:
            raise BadInput(f"server_batch={self.server_batch}: must be one of {', '.join(SERVER_BATCHES)}")
        if self.most is not None and self.most < 0:
            raise BadInput(f"max_cut={self.most}: must be at least 0")

    @property
    def clock(self) -> str:
        return "lockstep"

    @property
    def allows(self) -> frozenset[str]:
        return frozenset((CHUNKS,)) if self.server_batch == "separate" else frozenset()

    @property
    def needs_equal_steps(self) -> bool:
        return self.server_batch == "joined"

    def check(self, units: int) -> None:
        super().check(units)
        if self.max_cut(units) > units:
            raise BadInput(f"max_cut={self.most}: must be at most {units}, the units of the network")

    def max_cut(self, units: int) -> int:
        return units if self.most is None else self.most

    def shared_units(self, units: int) -> range:
        return range(self.max_cut(units), units)

    def step_once(self, units: int) -> range:
        return range(self.max_cut(units), units - self.tail_units)

    @property
    def serves_together(self) -> bool:
        return self.server_batch == "joined"

    def start(self, training: Training, variables: Variables) -> Any:
        if not self.keeps_state:
            return ()
        of_units = states(training, PackedVariables.of(variables))
        return tuple(state if self._is_shared(training, unit) else () for unit, state in enumerate(of_units))

    def _is_shared(self, training, unit):
        return self.max_cut(len(training.chain)) <= unit < training.tail

    def run_round(
        self, training, size, axis_name, model, samples, work, round_key, rate, previous=None
    ) -> Any:
        """Like `federated.round.run_round`, for one device.

        Memory: a copy of the units below `most` for each client of the round, and what `size` clients keep
        for the backward pass.
        """
        like, clients = model.packed, len(work.client)
        size = clients if self.server_batch == "joined" else size
        training = training.alone() if size == 1 else training
        of_units = states(training, like)
        shared_at = [self._is_shared(training, unit) for unit in range(len(training.chain))]
        if self.keeps_state:
            of_units = tuple(
                kept if shared else fresh
                for fresh, kept, shared in zip(of_units, model.kept, shared_at, strict=True)
            )
        begun = copies(like, of_units)
        shared = tuple(unit for unit, is_shared in zip(begun, shared_at, strict=True) if is_shared)
        own = tuple(unit for unit, is_shared in zip(begun, shared_at, strict=True) if not is_shared)
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (clients // size, size, *x.shape)), own)
        chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), work)
        lockstep = Lockstep(
            training, like, shared_at, self.server_batch == "joined", samples, round_key, rate
        )  # fmt: skip

        def of_step(index, carry):
            rows, shared, losses, is_sound, taken_of = carry
            taken_of += is_sound & (index < chunks.steps)

            def of_chunk(sums, chunk):
                new_sums, rows, losses, is_sound = lockstep.step(index, shared, *chunk)
                return jax.tree.map(jnp.add, sums, new_sums), (rows, losses, is_sound)

            zeros = lockstep.zeros(shared)
            sums, (rows, losses, is_sound) = lax.scan(of_chunk, zeros, (rows, chunks, losses, is_sound))
            return rows, lockstep.moved(shared, *sums), losses, is_sound, taken_of

        losses = jnp.zeros((clients // size, size), jnp.result_type(float))
        begin = rows, shared, losses, jnp.ones(losses.shape, bool), jnp.zeros(losses.shape, jnp.int32)
        rows, shared, *by_client = lax.fori_loop(0, work.steps.max(), of_step, begin)
        rows, losses, is_sound, taken_of = jax.tree.map(
            lambda x: x.reshape(clients, *x.shape[2:]), (rows, *by_client)
        )
        weight = jnp.where(is_sound, work.weight, 0)
        total = weight.sum()
        own_before = [unit for unit, is_shared in zip(by_unit(like), shared_at, strict=True) if not is_shared]
        means = iter(
            [_mean(copy[:2], before, weight, total) for copy, before in zip(rows, own_before, strict=True)]
        )
        ours = iter(shared)
        mean = [next(ours)[:2] if is_shared else next(means) for is_shared in shared_at]
        kept = ()
        if self.keeps_state:
            ours = iter(shared)
            kept = tuple(next(ours).state if is_shared else () for is_shared in shared_at)
        loss = (weight * losses / jnp.maximum(work.steps, 1)).sum() / total
        diverged = Diverged.where(~is_sound, work.client, taken_of)
        return taken(training, model, Model(variables(mean, like), kept=kept), loss, diverged, previous)


def _mean(copy, before, weight, total):
    """The weighted mean of the clients' copies of a unit."""

    def of_leaf(x, before):
        x = jax.vmap(change, (0, None))(x, before)
        mean = jnp.tensordot(weight.astype(wide(x.dtype)), x.astype(wide(x.dtype)), 1)
        return narrow(mean / total.astype(mean.dtype), before)

    return jax.tree.map(of_leaf, copy, before)
