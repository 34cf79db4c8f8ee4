"""One step of all clients together. Some units have one shared copy, the others a copy for each client."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.federated import crossing
from sfl_jax.federated.packing import Packed, PackedVariables, pack
from sfl_jax.federated.round import change, narrow, wide
from sfl_jax.federated.session import Training, batch, together
from sfl_jax.models import Variables
from sfl_jax.schemes.copies import all_finite, chosen, moved

JOINED = 2**31 - 1  # the key of a joined batch has this instead of a client's number


@dataclasses.dataclass(frozen=True)
class Lockstep:
    """One step of all clients.

    `rows` are the copies of units that each client has a copy of, with a leading axis of clients. `shared`
    are the copies of the other units.
    """

    training: Training
    like: PackedVariables
    shared_at: list[bool]  # for each unit, whether it is shared
    is_joined: bool  # whether shared units see one joined batch of all clients
    samples: Any
    round_key: Any
    rate: Any

    def zeros(self, shared):
        """Sums to start from: gradients and statistics of shared units, and a number of clients."""
        stats = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), tuple(u.stats for u in shared))
        return jax.tree.map(jnp.zeros_like, tuple(u.params for u in shared)), stats, jnp.zeros((), jnp.int32)

    def moved(self, shared, gradients, stats, count):
        """The shared copies after a step along the mean gradient. Unchanged if no client took part."""
        parts = zip(self._places(True), shared, gradients, stats, strict=True)
        new = tuple(
            moved(self.training, self.like, place, unit, _over(own, count), self.rate)._replace(
                stats=jax.tree.map(narrow, _over(sums, count), unit.stats)
            )
            for place, unit, own, sums in parts
        )
        return chosen(count > 0, new, shared)

    def step(self, index, shared, rows, work, losses, is_sound):
        """Returns (sums of the chunk, its rows, its losses, which clients are sound) after step `index`.

        One client whose loss or gradient is not finite would spoil the sums of all. It is left out, and the
        chunk is computed again until all numbers are finite. In nearly every round one computation is enough.
        A chunk in which no client has a step left is not computed.
        """

        def spoils(carry):
            return ~carry[0]

        def attempt(carry):
            _, is_sound, *_ = carry
            takes_part = is_sound & (index < work.steps)
            (loss, stats, entering), own, of_shared = self._gradients(index, shared, rows, work, takes_part)
            # In a joined batch one client spoils all losses. So the inputs of shared units are judged first.
            fine = jax.vmap(all_finite)((loss, own, stats)) | ~takes_part
            fine = jnp.where((entering | ~takes_part).all(), fine, entering | ~takes_part)
            return fine.all(), is_sound & fine, loss, stats, own, of_shared

        shapes = jax.eval_shape(attempt, (jnp.array(False), is_sound))
        begin = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        begin = ~(is_sound & (index < work.steps)).any(), is_sound, *begin[2:]
        _, is_sound, loss, stats, own, of_shared = lax.while_loop(spoils, attempt, begin)
        takes_part = is_sound & (index < work.steps)
        own_stats = [stats[place] for place in self._places(False)]
        step = functools.partial(moved, self.training, self.like)
        moves = [jax.vmap(functools.partial(step, place), (0, 0, None)) for place in self._places(False)]
        new = tuple(
            move(unit, gradient, self.rate)._replace(stats=stat)
            for move, unit, gradient, stat in zip(moves, rows, own, own_stats, strict=True)
        )

        def total(x, before):
            x = jax.vmap(change, (0, None))(x, before)
            x = chosen(takes_part, x, jnp.zeros_like(x))
            return x.astype(wide(x.dtype)).sum(0)

        shared_stats = tuple(
            jax.tree.map(total, stats[place], unit.stats)
            for place, unit in zip(self._places(True), shared, strict=True)
        )
        sums = of_shared, shared_stats, takes_part.sum().astype(jnp.int32)
        losses = losses + jnp.where(takes_part, loss, 0)
        return sums, chosen(takes_part, new, rows), losses, is_sound

    def _gradients(self, index, shared, rows, work, takes_part):
        """Returns (outputs of `_forward`, gradients of rows (K, ...), summed gradients of shared copies)."""

        def loss_of(own, of_shared):
            outputs = self._forward(index, own, of_shared, shared, rows, work, takes_part)
            return jnp.where(takes_part, outputs[0], 0).sum(), outputs

        params = tuple(unit.params for unit in rows), tuple(unit.params for unit in shared)
        (_, outputs), gradients = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(*params)
        return outputs, *gradients

    def _forward(self, index, own, of_shared, shared, rows, work, takes_part):
        """Returns by client (loss, statistics of all units, whether the input of shared units is finite)."""
        training, chain = self.training, self.training.chain
        most, tail = training.tail - sum(self.shared_at), training.tail
        images, labels, keys = jax.vmap(
            lambda one: batch(training, self.samples, one, index, self.round_key)
        )(work)
        head, rest = chain.split(most)
        middle, end = rest.split(tail - most)
        middle = middle.alone() if self.is_joined else middle  # a joined batch has no axis of clients

        def hook_of(one, key):
            return crossing.hook(training.codecs, tail, one.cut, one.codec, key, crossing.CLIENTS)

        def part(units, first, params, stats, x, key, one=None):
            """Applies part of the chain to x. The codec acts between two units of the part."""
            at_boundary = None if one is None else hook_of(one, key)
            now = Variables(
                Packed(params, self.like.params.layouts[first : first + len(units)]).unpack(),
                Packed(stats, self.like.batch_stats.layouts[first : first + len(units)]).unpack(),
            )
            y, new = units.apply(now, x, train=True, key=key, at_boundary=at_boundary)
            return y, pack(new.batch_stats).arrays

        def crossed(unit, one, x, key):
            """x after the codec, when it enters a unit of the next part."""
            hook = hook_of(one, key)
            return x if hook is None or unit >= len(chain) else hook(unit, x)

        own_stats, of_shared_stats = tuple(u.stats for u in rows), tuple(u.stats for u in shared)

        def run_head(params, stats, x, key, one):
            y, new = part(head, 0, params, stats, x, key, one)
            return crossed(most, one, y, key) if most < tail else y, new

        x, head_stats = together(run_head)(own[:most], own_stats[:most], images, keys, work)
        entering = jax.vmap(all_finite)(x)
        # A client that takes no part may have numbers that are not finite. Another's replace them.
        x = jax.tree.map(lambda leaf: chosen(takes_part, leaf, leaf[jnp.argmax(takes_part)][None]), x)
        if self.is_joined and shared:
            step_key = jax.random.fold_in(jax.random.fold_in(self.round_key, JOINED), index)
            joined = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x)
            y, new = part(middle, most, of_shared, of_shared_stats, joined, step_key)
            x = jax.tree.map(lambda leaf: leaf.reshape(*labels.shape, *leaf.shape[1:]), y)
            middle_stats = jax.tree.map(lambda s: jnp.broadcast_to(s, (len(labels), *s.shape)), new)
        else:
            x, middle_stats = together(lambda x, key: part(middle, most, of_shared, of_shared_stats, x, key))(
                x, keys
            )

        def run_end(params, stats, x, key, one):
            return part(end, tail, params, stats, crossed(tail, one, x, key), key)

        logits, end_stats = together(run_end)(own[most:], own_stats[most:], x, keys, work)
        losses = jax.vmap(lambda logits, labels: training.loss(logits, labels).mean())(logits, labels)
        return losses, (*head_stats, *middle_stats, *end_stats), entering

    def _places(self, is_shared):
        return [place for place, shared in enumerate(self.shared_at) if shared == is_shared]


def _over(tree, count):
    return jax.tree.map(lambda x: x / jnp.maximum(count, 1).astype(x.dtype), tree)
