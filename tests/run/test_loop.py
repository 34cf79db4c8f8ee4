"""The loop over rounds: what is sent ahead, what is read when, and that neither changes a number."""

import dataclasses
import gc
import itertools
import time
from concurrent.futures import Future
from unittest import mock

import jax
import networks
import numpy as np
import plain
import pytest
from commands import small_world

from sfl_jax import models
from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.federated import devices, tuning
from sfl_jax.federated.round import Outcome
from sfl_jax.run import engine as engines
from sfl_jax.run import loop, metrics
from sfl_jax.run.checkpoints import Checkpoints, Progress
from sfl_jax.run.rounds import prepare
from sfl_jax.run.state import State, is_held, resume, start

CONFIG = Config(
    model="efficientnetv2-tiny", layer_form="conv", image_size=8, clients=small_world.CLIENTS, cohort_size=3,
    rounds=6, eval_every=2, batch_size=4, clients_per_chunk=3, execution="vmap", server_flops=1e10,
    **{**plain.SETTINGS, "server_momentum": 0.5},
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def world():
    """Noise with 8 samples for each client, and a network that compiles in a second."""
    with small_world.world(), mock.patch.object(models, "create", networks.create):
        yield


@pytest.fixture(scope="module")
def compiled(world):
    built = parts.build(CONFIG).parts
    return engines.compile_rounds(built, start(built))


def test_everything_is_compiled_before_it_runs(compiled):
    built, engine = compiled
    assert engine.held_out is not None  # once the evaluation is compiled
    rounds = loop.run(built, start(built), engine, CONFIG.rounds)
    with metrics.CompileClock() as clock:
        tested = [next(rounds)[1].test_accuracy for _ in range(CONFIG.eval_every)]
    assert tested[-1] is not None
    assert clock.compilations == 0


def test_what_plans_a_round_is_compiled_while_the_data_are_read(compiled):
    config = dataclasses.replace(CONFIG, cohort_size=37)  # shapes that nothing has compiled yet
    prepare(compiled[0], 0)
    with metrics.CompileClock() as clock:
        meanwhile = parts._compile_plan_meanwhile(config, parts.planner(config), compiled[0].fleet)
        assert meanwhile is not None
        meanwhile.result()
    assert clock.compilations >= 3  # the optimum, and those of the two rivals
    with metrics.CompileClock() as clock:
        prepare(dataclasses.replace(compiled[0], cohort_size=37), 0)
    assert clock.compilations == 0
    schemes = [dataclasses.replace(CONFIG, **change) for change in ({"codec": "int8"}, {"method": "greedy"})]
    assert all(
        parts._compile_plan_meanwhile(one, parts.planner(one), compiled[0].fleet) is None for one in schemes
    )


@pytest.mark.parametrize("stay", [True, False])
def test_what_is_placed_leaves_less_to_what_follows(compiled, monkeypatch, stay):
    """The samples get what the model leaves, the chunk what both leave, and the round what all leave."""
    built, engine = compiled
    state, asked = start(built), []
    model, samples, held_out = map(devices.bytes_placed, (state.model, engine.samples, engine.held_out))
    assert samples > built.data.train_images.nbytes > held_out
    free = 2 * samples - (not stay)
    monkeypatch.setattr(tuning, "budget_bytes", lambda *given: asked.append(given[-1]) or free)
    monkeypatch.setattr(devices.Evaluation, "bytes_needed", lambda *given: 0)
    monkeypatch.setattr(devices.Rounds, "bytes_needed", lambda *given: 0)
    _, again = engines.compile_rounds(built, state)
    assert again.held_out.labels.size == len(built.data.test_labels)
    assert isinstance(again.samples.images, jax.Array) == stay
    after = model + stay * samples
    assert asked == [model, after, after + held_out, after + held_out]


@pytest.mark.parametrize(("budget", "batches"), [(64, [32]), (63, [32, 16]), (16, [32, 8]), (0, [32, 1])])
def test_an_evaluation_takes_the_batches_that_the_memory_holds(compiled, monkeypatch, budget, batches):
    """With a program that needs two bytes for each sample."""
    built, _ = compiled
    asked = []

    class Evaluation:
        def bytes_needed(self, packed, held_out):
            asked.append(held_out.labels.shape[1])
            return 2 * asked[-1]

    whole = len(built.data.test_labels)
    monkeypatch.setattr(engines, "batch_of", lambda shape: whole)
    monkeypatch.setattr(tuning, "budget_bytes", lambda asked, devices, placed: budget)
    placed = engines._placed_held_out(built, whole)
    held_out = engines._fit_held_out(built, Evaluation(), start(built), 0, placed)
    assert asked == batches
    assert held_out.labels.shape[1] == batches[-1]


def go(compiled, pauses=lambda round: False, rounds=CONFIG.rounds, begun=None):
    """[(state, line)] of a run from the start; lines without the machine's clocks."""
    built, engine = compiled
    rounds = loop.run(built, begun or start(built), engine, rounds, pauses=pauses)
    return [(state, line._replace(**dict.fromkeys(metrics.CLOCKS, 0))) for state, line in rounds]


def variables(state):
    return jax.tree.map(np.asarray, state.model)


@pytest.fixture
def sent_ahead(monkeypatch):
    monkeypatch.setattr(loop, "SHORT_S", np.inf)


@pytest.fixture
def one_by_one(monkeypatch):
    monkeypatch.setattr(loop, "SHORT_S", 0.0)


@pytest.fixture(scope="module")
def quiet(compiled):
    """A run whose rounds are read one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SHORT_S", 0.0)
        return go(compiled)


def test_sending_ahead_changes_no_number(compiled, quiet, sent_ahead):
    ahead = go(compiled)
    assert [line for _, line in ahead] == [line for _, line in quiet]
    assert len({line.train_loss for _, line in quiet}) == CONFIG.rounds
    jax.tree.map(np.testing.assert_array_equal, variables(ahead[-1][0]), variables(quiet[-1][0]))


def test_a_round_is_read_after_the_next_was_sent(compiled, sent_ahead, monkeypatch):
    events, begun = [], start(compiled[0])
    send, get = loop._send, jax.device_get
    monkeypatch.setattr(loop, "_send", lambda *given: events.append("send") or send(*given))
    monkeypatch.setattr(jax, "device_get", lambda tree: events.append("read") or get(tree))
    go(compiled, begun=begun)
    # The first round compiles, so it is not known yet that rounds are short.
    assert events[:7] == ["send", "read", "send", "send", "read", "send", "read"]
    assert events[-3:] == ["send", "read", "send"]  # the last one finds no round left
    assert events.count("read") == CONFIG.rounds


def test_long_rounds_are_not_sent_ahead(compiled, one_by_one):
    assert all(is_held(state) for state, _ in go(compiled)[-1:])
    built, engine = compiled
    for state, _ in loop.run(built, start(built), engine, CONFIG.rounds):
        assert is_held(state)


def test_a_state_that_is_wanted_is_there(compiled, sent_ahead):
    held = {}
    built, engine = compiled
    wanted = (2, 3)
    for state, line in loop.run(built, start(built), engine, CONFIG.rounds, pauses=wanted.__contains__):
        held[line.round] = is_held(state)
    assert all(held[round] for round in (*wanted, CONFIG.rounds))
    assert not held[4]
    assert not held[5]


@pytest.mark.parametrize("broken", [1, 3, 5])
def test_an_error_while_the_next_round_is_prepared_costs_no_round_that_is_done(
    broken, compiled, quiet, sent_ahead, monkeypatch
):
    failed = []

    def prepare_or_fail(own, round):
        if round == broken and not failed:
            failed.append(round)  # once: a second try would go on after an error
            raise ValueError(f"round {round}")
        return prepare(own, round)

    monkeypatch.setattr(loop, "prepare", prepare_or_fail)
    built, engine = compiled
    rounds, done = loop.run(built, start(built), engine, CONFIG.rounds), []
    with pytest.raises(ValueError, match=f"^round {broken}$"):
        done.extend(rounds)
    assert [line.round for _, line in done] == [*range(1, broken + 1)]
    assert [line.train_loss for _, line in done] == [line.train_loss for _, line in quiet[:broken]]
    monkeypatch.undo()
    expected = go(compiled, rounds=broken)[-1][0]
    jax.tree.map(np.testing.assert_array_equal, variables(done[-1][0]), variables(expected))


def test_the_clock_of_a_round_stops_when_it_is_done(compiled, sent_ahead):
    """It counts neither the evaluation nor what compiles or prepares meanwhile, also in the last two rounds.
    A round takes milliseconds here.
    """
    built, engine = compiled
    slow_s, slow_rounds = 1.0, (4, CONFIG.rounds)
    slowly = jax.jit(lambda x: jax.pure_callback(lambda x: time.sleep(slow_s / 2) or x, x, x))
    evaluated = []

    def evaluate(*given):
        evaluated.append(2 * len(evaluated) + 2)
        if evaluated[-1] not in slow_rounds:
            return engine.evaluate(*given)
        time.sleep(slow_s / 2)  # like compiling, before the evaluation is sent
        return jax.tree.map(slowly, engine.evaluate(*given))

    clock = metrics.Stopwatch()
    rounds = loop.run(built, start(built), engine._replace(evaluate=evaluate), CONFIG.rounds, clock)
    lines = [line for _, line in rounds]
    samples = sum(len(part) for part in built.division) / CONFIG.clients * CONFIG.cohort_size
    took_s = [samples / line.client_samples_per_s for line in lines]
    assert max(took_s) < slow_s / 2
    assert sum(took_s) < clock.seconds - len(slow_rounds) * slow_s
    assert all(b.wall_s > a.wall_s for a, b in itertools.pairwise(lines))
    assert lines[3].wall_s - lines[2].wall_s > slow_s / 2  # wall time counts all


def test_a_round_begins_when_it_is_planned_and_what_is_before_it_is_done(compiled, monkeypatch):
    """Rounds that began, ended and were evaluated at these seconds."""

    def at(seconds):
        done = Future()
        done.set_result(seconds)
        return done

    times = [(0.0, 1.0, 1.5), (0.5, 2.0, 2.0), (3.0, 3.25, 3.5)]
    rounds = [
        loop.Sent(None, None, mock.Mock(round=number), None, None, began_s, at(ended_s), at(tested_s))
        for number, (began_s, ended_s, tested_s) in enumerate(times)
    ]
    following = iter(rounds)
    monkeypatch.setattr(loop, "_send", lambda *_: next(following, None))
    monkeypatch.setattr(loop, "_judge", lambda *_: None)
    monkeypatch.setattr(loop, "_line", lambda *given: given[-3:])
    began, clock = State(0, (), {}), mock.Mock(spec=metrics.Stopwatch, seconds=0.0)
    lines = [line for _, line in loop.run(compiled[0], began, compiled[1], len(times), clock)]
    assert lines == [(1.5, 1.0, 0.5), (2.0, 0.5, 0.0), (3.5, 0.25, 0.25)]


def test_the_clock_is_read_when_the_numbers_are_there(monkeypatch):
    clock = mock.Mock(seconds=1.0)
    monkeypatch.setattr(jax, "block_until_ready", lambda arrays: setattr(clock, "seconds", 2.0))
    assert loop._clock_after((), clock) == 2.0


def test_a_run_whose_method_was_changed_goes_on_from_its_own_clock(compiled):
    simulated_s = {"greedy": 5.0, "no_split": 7.0, "common_cut": 6.0}
    reached = Progress(3, simulated_s, 0.0, 0.0, 0, "", {"method": "greedy"}, {}, {})
    store = mock.Mock(spec=Checkpoints, restore=lambda *_: ())
    state = resume(compiled[0], store, reached)
    assert state == (3, (), {"exact": 5.0, "no_split": 7.0, "common_cut": 6.0})


def test_the_clock_of_a_round_begins_with_its_plan(compiled, one_by_one, monkeypatch):
    monkeypatch.setattr(loop, "prepare", lambda *given: time.sleep(0.3) or prepare(*given))
    built, engine = compiled
    for _, line in loop.run(built, start(built), engine, 2):
        assert 24 / line.client_samples_per_s > 0.3
        time.sleep(0.6)  # writing the line does not count for the next round
        assert line.client_samples_per_s > 24 / 0.6


def test_few_numbers_leave_the_devices(compiled, sent_ahead, monkeypatch):
    fetched, begun = [], start(compiled[0])
    array = type(jax.numpy.zeros(1))
    value = array._value
    monkeypatch.setattr(array, "_value", property(lambda self: fetched.append(self.size) or value.fget(self)))
    go(compiled, begun=begun)
    evaluations = CONFIG.rounds // CONFIG.eval_every
    # For each round: loss, who diverged, when, how many came. For an evaluation: loss, accuracy, of classes.
    assert sum(fetched) == CONFIG.rounds * (1 + 2 * CONFIG.cohort_size + 1) + (2 + 10) * evaluations, fetched


def test_nothing_grows_and_nothing_compiles_over_the_rounds(compiled, sent_ahead):
    built, engine = compiled
    compilations, arrays = [], []
    gc.collect()
    gc.freeze()  # what is present stays, and need not be checked again
    try:
        with metrics.CompileClock() as clock:
            for _ in loop.run(built, start(built), engine, 30):
                gc.collect()
                arrays.append(len(jax.live_arrays()))
                compilations.append(clock.compilations)
    finally:
        gc.unfreeze()
    assert max(arrays[3:]) <= max(arrays[:3])
    assert compilations[-1] == compilations[3]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clients_of_a_round(compiled):
    """Except for the indices of their samples, also if each client takes several steps."""
    _, engine = compiled
    needed, indices = [], []
    for clients in (100, 1000):
        config = dataclasses.replace(
            CONFIG, clients=clients, cohort_size=clients, clients_per_chunk=4, local_epochs=4
        )
        with small_world.world(samples=8 * clients):
            many = parts.build(config).parts
        state = start(many)
        rounds = devices.Rounds(many.training, 4, many.devices)
        first = prepare(many, 0)
        assert first.assignments.steps.max() >= 4
        needed.append(rounds.bytes_needed(*engines.arguments(many, engine, state, first)))
        indices.append(sum(array.nbytes for array in jax.tree.leaves(first.assignments)))
    # The round's input is counted twice, and split into chunks.
    allowed = 0.1 * needed[0] + 4 * (indices[1] - indices[0])
    models_of_clients = 900 * sum(leaf.nbytes for leaf in jax.tree.leaves(state.model.packed))
    assert needed[1] - needed[0] < allowed < models_of_clients / 3


class TestDivergence:
    """The learning rate of the third round is infinite."""

    @pytest.fixture(autouse=True)
    def too_fast(self, monkeypatch):
        def prepare_too_fast(own, round):
            done = prepare(own, round)
            return done._replace(learning_rate=np.inf) if round == 2 else done

        monkeypatch.setattr(loop, "prepare", prepare_too_fast)

    def test_the_state_before_is_left_although_the_next_round_was_sent(self, compiled, quiet, sent_ahead):
        built, engine = compiled
        rounds, lines = loop.run(built, start(built), engine, CONFIG.rounds), []
        with pytest.raises(
            loop.Diverged, match=r"round 3: the loss or the update of client \d+, cut"
        ) as caught:
            lines.extend(line for _, line in rounds)
        assert [line.round for line in lines] == [1, 2]
        assert caught.value.state.round == 2
        assert caught.value.state.simulated_s == quiet[1][0].simulated_s
        expected = go(compiled, rounds=2)[-1][0]
        jax.tree.map(np.testing.assert_array_equal, variables(caught.value.state), variables(expected))

    def test_without_the_look_back_the_round_sent_ahead_would_change_it(
        self, compiled, sent_ahead, monkeypatch
    ):
        monkeypatch.setattr(Outcome, "is_last", lambda self, training: jax.numpy.zeros((), bool))
        built, _ = compiled
        built, engine = engines.compile_rounds(built, start(built))
        states = list(loop.run(built, start(built), engine, CONFIG.rounds))
        expected = go(compiled, rounds=2)[-1][0]
        with pytest.raises(AssertionError):
            jax.tree.map(np.testing.assert_array_equal, variables(states[-1][0]), variables(expected))
