"""Compiles a run's rounds and its evaluation, and places its data on the devices."""

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sfl_jax import planning
from sfl_jax.datasets import Dataset
from sfl_jax.federated import devices as federated_devices
from sfl_jax.federated import execution, processes, tuning
from sfl_jax.federated.evaluation import batch_of
from sfl_jax.federated.execution import Alternative, Execution
from sfl_jax.federated.kept import NOTHING, Kept
from sfl_jax.federated.programs import Programs
from sfl_jax.federated.session import Samples
from sfl_jax.run.parts import Parts, Say, silent
from sfl_jax.run.rounds import Prepared, prepare
from sfl_jax.run.state import State


class Engine(NamedTuple):
    """The placed data and the compiled programs of a run.

    testing: the test samples, once `evaluate` is compiled for them; None without any. tried: measured seconds
    of each alternative.
    """

    samples: Samples
    testing: Future[Samples] | None
    run_round: federated_devices.Rounds
    evaluate: Callable[..., Any]
    tried: dict[Alternative, float]

    @property
    def held_out(self) -> Samples | None:
        """The samples to test on; waits until `evaluate` is compiled."""
        return self.testing and self.testing.result()


def compile_rounds(
    parts: Parts,
    state: State,
    before: Execution | None = None,
    notes: Path | None = None,
    say: Say = silent,
    more: bool = True,
    kept: Kept = NOTHING,
) -> tuple[Parts, Engine]:
    """Returns the parts with a settled execution, and the engine for the rounds after `state`.

    A chunk size that the execution leaves open shrinks until the compiled round fits into the memory. Raises
    BadInput if no size fits. `more` says whether a round is to come; without one no round is compiled.
    `before` and `notes`: see `tuning.settle`. `kept`: programs of earlier starts. The evaluation is compiled
    beside the first rounds, which do not need it.
    """
    data, devices, own = parts.data, parts.devices, parts.training
    images = entering_network(own.preprocess, data, parts.batch_size)
    facts = tuning.Facts(
        parts.profile, parts.batch_size, parts.cohort_size, parts.optimizer_slots, devices, parts.network
    )

    here = [device for device in devices if device.process_index == jax.process_index()]

    def seconds(one):
        say(f"measuring {one}")
        chain = own.chain.in_form(one.layer_form)
        return execution.seconds_per_client(chain, parts.profile, images, one.clients_per_chunk, here)

    placed = federated_devices.bytes_placed(state.model)
    free = tuning.budget_bytes(parts.execution, devices, placed)
    samples = federated_devices.place_samples(Samples(data.train_images, data.train_labels), devices, free)
    placed += federated_devices.bytes_placed(samples)
    settled, tried = tuning.settle(parts.execution, before, facts, seconds, notes, placed)
    training = dataclasses.replace(own, chain=own.chain.in_form(settled.layer_form))
    evaluate = federated_devices.Evaluation(
        training.chain, training.preprocess, devices, training.loss, parts.metric, kept,
        (settled.layer_form,),
    )  # fmt: skip
    before_held_out, held_out = placed, None
    if len(data.test_labels):
        held_out = _placed_held_out(parts, batch_of(parts.image_shape))
        placed += federated_devices.bytes_placed(held_out)
    first, needed = prepare(parts, state.round) if more else None, {}
    programs = Programs(notes, devices)
    while True:
        one = f"{parts.network}, {settled.layer_form}"
        say(programs.expected(one, program(parts, settled)))
        begun = time.perf_counter()
        rounds = federated_devices.Rounds(
            training, settled.clients_per_chunk, devices, settled.mode, kept, (one, program(parts, settled))
        )
        engine = Engine(samples, None, rounds, evaluate, tried)
        of_round = rounds.bytes_needed(*arguments(parts, engine, state, first)) if first else 0
        programs.took(one, program(parts, settled), time.perf_counter() - begun)
        needed[settled.clients_per_chunk] = tuning.most_bytes(of_round)
        smaller = tuning.fit(settled, parts.execution.left_open, needed, facts, placed)
        if smaller == settled:
            break
        settled = smaller
    if held_out is not None:
        like = state
        if processes.is_alone():  # the first round takes the model; several processes compile before it
            like = state._replace(model=jax.tree.map(_like, state.model))
        fit = functools.partial(_fit_held_out, parts, evaluate, like, before_held_out, held_out)
        engine = engine._replace(testing=_meanwhile(fit))
    return dataclasses.replace(parts, execution=settled, training=training), engine


def kept_programs(parts: Parts, notes: Path | None) -> Kept:
    """What earlier starts kept beside `notes` of the programs of such a run; begins to load the round's.

    Nothing where `parts.program` does not say what they follow from.
    """
    place = notes.parent if notes and parts.program else None
    kept = Kept(place, parts.devices, parts.network, parts.program)
    kept.begin("round")
    return kept


def program(parts: Parts, settled: Execution) -> str:
    """The label of the compiled round among those of its network."""
    return f"{parts.program}, {settled.mode} {settled.clients_per_chunk}"


def arguments(parts: Parts, engine: Engine, state: State, prepared: Prepared) -> tuple[Any, ...]:
    """The arguments of `Rounds.__call__` for the round after `state`."""
    key = planning.round_key(parts.seed, prepared.round, planning.TRAINING)
    return state.model, engine.samples, prepared.assignments, key, prepared.learning_rate


def entering_network(preprocess: Any, data: Dataset, batch: int) -> Any:
    """The shape and type of a batch that enters the network. JAX makes float64 into float32 by default."""
    shape, dtype = data.train_images.shape[1:], jax.dtypes.canonicalize_dtype(data.train_images.dtype)
    return jax.eval_shape(preprocess, jax.ShapeDtypeStruct((batch, *shape), dtype))


def _placed_held_out(parts, batch):
    """The test samples on the devices, in batches."""
    data = parts.data
    return federated_devices.place_held_out(data.test_images, data.test_labels, parts.devices, batch)


def _fit_held_out(parts, evaluate, state, placed, held_out):
    """`held_out`, or the same samples in batches with which `evaluate` fits into the memory."""
    batch = batch_of(parts.image_shape)
    while True:
        needed = tuning.most_bytes(evaluate.bytes_needed(state.model.packed, held_out))
        taken = placed + federated_devices.bytes_placed(held_out)
        free = tuning.budget_bytes(parts.execution, parts.devices, taken)
        if needed <= free or batch == 1:
            return held_out
        batch = max(1, min(batch // 2, batch * free // needed))
        held_out = _placed_held_out(parts, batch)


def _meanwhile(work) -> Future[Samples]:
    """The result of `work`, done in a thread. Several processes wait, since they talk to each other in it."""
    pool = ThreadPoolExecutor(1, "evaluation")
    future = pool.submit(work)
    pool.shutdown(wait=not processes.is_alone())
    return future


def _like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
