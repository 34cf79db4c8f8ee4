"""The loop over rounds: plan, train, evaluate where it is due, log."""

import functools
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from sfl_jax.federated import devices as federated_devices
from sfl_jax.federated.round import Outcome
from sfl_jax.run import clients, metrics
from sfl_jax.run.engine import Engine, arguments
from sfl_jax.run.parts import Parts
from sfl_jax.run.rounds import Prepared, ledger_after, prepare
from sfl_jax.run.state import State

SHORT_S = 2.0  # after a round shorter than this, the next is sent before its results are read


class Diverged(ArithmeticError):
    """A number of a round is not finite. `state` is the state before that round."""

    def __init__(self, message: str, state: State):
        super().__init__(message)
        self.state = state


class Sent(NamedTuple):
    """A round that the devices compute, with the states before and after it.

    began_s: when its preparation began. ended_s: when the round was done. tested_s: when its evaluation was
    done. All three are seconds of the run's clock.
    """

    prepared: Prepared
    before: State
    state: State
    outcome: Outcome
    tested: Any  # (loss, accuracy) on the test samples; None if the round is not evaluated
    began_s: float
    ended_s: Future[float]
    tested_s: Future[float]


def run(
    parts: Parts,
    state: State,
    engine: Engine,
    until: int,
    clock: metrics.Stopwatch | None = None,
    pauses: Callable[[int], bool] = lambda round: False,
) -> Iterator[tuple[State, metrics.Round]]:
    """Runs rounds until `until` are done. Yields the state after each round and its line. Raises Diverged.

    If rounds are short, the next round is sent to the devices before the results of the last are read. So the
    devices never wait. But then the model of the yielded state is already donated, see `is_held`. `pauses(n)`
    says whether the caller needs the state after n rounds; the loop then waits. Long rounds gain nothing from
    this, and without it a run stops sooner.
    """
    clock = clock or metrics.Stopwatch()
    free_s, lasted_s = clock.seconds, math.inf  # when the devices became idle; how long they were busy
    with ThreadPoolExecutor(1, "rounds") as pool:
        follow = functools.partial(_send, parts, engine, until, clock, pool)
        sent = follow(state)
        while sent:
            following, failure = None, None
            if lasted_s < SHORT_S and not pauses(sent.state.round):
                try:
                    following = follow(sent.state, sent.outcome)
                except Exception as error:  # raised below, after the finished round has been yielded
                    failure = error
            ended_s, tested_s = sent.ended_s.result(), sent.tested_s.result()
            outcome, tested = jax.device_get(federated_devices.on_first((sent.outcome, sent.tested)))
            _judge(parts, sent._replace(state=(following or sent).state), outcome)
            start_s, free_s = max(free_s, sent.began_s), tested_s
            lasted_s = tested_s - start_s
            took = ended_s - start_s, max(0.0, tested_s - ended_s)
            yield sent.state, _line(parts, sent, outcome, tested, tested_s, *took)
            if failure:
                raise failure
            sent = following or follow(sent.state, sent.outcome)


def _send(parts, engine, until, clock, pool, state, previous=None) -> Sent | None:
    """Plans the round after `state` and sends it to the devices. None after the last round."""
    if state.round >= until:
        return None
    began_s, prepared = clock.seconds, prepare(parts, state.round)
    model, loss, diverged = engine.run_round(*arguments(parts, engine, state, prepared), previous)
    clocks = _add_clocks(state.simulated_s, parts.planner.method, prepared)
    after = State(state.round + 1, model, clocks)
    came = federated_devices.replicate(np.int32(prepared.turnout.came.sum()), parts.devices)
    outcome = Outcome(loss, diverged, came)
    ended_s = pool.submit(_clock_after, outcome, clock)
    due = after.round % parts.eval_every == 0 or after.round == until
    tested = engine.evaluate(model.packed, engine.held_out) if due and engine.held_out else None
    tested_s = pool.submit(_clock_after, tested, clock)
    return Sent(prepared, state, after, outcome, tested, began_s, ended_s, tested_s)


def _clock_after(arrays, clock):
    """The clock when these arrays are computed. It runs in its own thread, so other work adds nothing."""
    jax.block_until_ready(arrays)
    return clock.seconds


def _line(parts, sent, outcome, tested, wall_s, train_s, test_s) -> metrics.Round:
    done = sent.prepared
    test_loss, test_accuracy, mean, worst = (None,) * 4 if tested is None else _tested(parts, tested)
    trained = int(done.assignments.steps.sum()) * parts.batch_size
    ids, steps = outcome.diverged
    diverged = ids[ids >= 0]
    counted = done.turnout.came & ~np.isin(done.assignments.client, diverged)
    cuts = done.plan.cuts[counted]
    counts = done.ledger if not len(diverged) else ledger_after(parts, done, diverged, steps[ids >= 0])
    return metrics.Round(
        sent.state.round, float(outcome.loss), test_loss, test_accuracy, done.turnout.round_s,
        done.plan.bound_s, sent.state.simulated_s[parts.planner.method], wall_s, trained / train_s,
        int(outcome.came) - len(diverged), float(cuts.mean()) if len(cuts) else math.nan,
        mean, worst, train_s, test_s, None, *counts,
    )  # fmt: skip


def _tested(parts, tested):
    """(loss, accuracy, mean and worst accuracy over the clients) on the test samples."""
    loss, accuracy, by_class = tested
    of_clients = clients.accuracies(by_class, parts.mix)
    return float(loss), float(accuracy), *clients.mean_and_worst(of_clients)


def _judge(parts, sent: Sent, outcome: Outcome) -> None:
    """Warns of clients that are left out. Raises Diverged if a number that is not finite ends the run.

    `Diverged.state` then holds the model before the round.
    """
    done = sent.prepared
    for line in done.left_out:
        logging.warning("round %d: %s; left out", done.round + 1, line)
    names = [
        f"round {done.round + 1}: the loss or the update of client {parts.fleet.client[id]}, "
        f"cut {done.plan.cuts[done.assignments.client == id][0]}, is not finite"
        for id in outcome.diverged.client[outcome.diverged.client >= 0]
    ]
    if outcome.is_last(parts.training):
        of_server = f"round {done.round + 1}: the server's step is not finite"
        raise Diverged("; ".join(names) or of_server, sent.before._replace(model=sent.state.model))
    for name in names:
        logging.warning("%s; left out", name)
    if len(names) == outcome.came:
        logging.warning("round %d: no client's work is left; the model does not change", done.round + 1)


def _add_clocks(clocks, method, done: Prepared) -> dict[str, Any]:
    seconds = {**done.rival_s, method: done.turnout.round_s}
    return {name: total + seconds[name] for name, total in clocks.items()}
