"""Several runs in one program: each gives what it gives alone."""

import itertools

import finite
import jax
import numpy as np
import optax
import pytest
from run import test_run
from run.test_run import make

import sfl_jax as sfl
from sfl_jax.errors import BadInput
from sfl_jax.run import loop, metrics

SEEDS = (4, 5, 6)


def halving(round):
    return 0.5**round


def bare(line):
    return None if line is None else line._replace(**dict.fromkeys(metrics.CLOCKS, 0.0))


def runs(**changes):
    """Runs with other seeds, divisions, fleets and learning rates."""
    rates = itertools.cycle((sfl.run.parts.always, halving))
    return [
        make(
            seed=seed, partition="quantity", rate=rate, fleet=sfl.fleet.random_fleet(9, seed=seed), **changes
        )
        for seed, rate in zip(SEEDS, rates, strict=False)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"execution": sfl.Execution("product", 3, "vmap")},
        {"execution": sfl.Execution("product", 1, "map")},
        pytest.param({"execution": sfl.Execution(), "scheme": "sfl_v2"}, marks=pytest.mark.slow),
    ],
    ids=["at_once", "in_turn", "sfl_v2"],
)
def test_runs_together_are_the_runs_alone(changes):
    alone, joined = runs(**changes), runs(**changes)
    expected = [test_run.trained(run, 3) for run in alone]
    found = [*sfl.Together(joined).rounds(3)]
    assert len({run.parts.steps_max for run in joined}) > 1  # so that shapes had to be made equal
    for run, own, lines, before in zip(joined, alone, zip(*found, strict=True), expected, strict=True):
        for line, other in zip(map(bare, lines), before, strict=True):
            np.testing.assert_allclose([*line], [*other], rtol=1e-5)
        assert finite.are_close(run.variables, own.variables, rtol=1e-4, atol=1e-6)
        assert run.lines == [*lines]


def test_a_run_that_ends_leaves_the_others_alone():
    alone, joined = runs(), runs()
    joined[0].parts = make(seed=4, rate=lambda round: np.inf if round == 1 else 1.0).parts
    expected = [test_run.trained(alone[1], 2), test_run.trained(alone[2], 4)]
    together = sfl.Together(joined)
    found = [*zip(*together.rounds([4, 2, 4]), strict=True)]
    assert [[line is not None for line in lines] for lines in found] == [[1, 0, 0, 0], [1, 1, 0, 0], [1] * 4]
    assert isinstance(together.errors.pop(0), loop.Diverged)
    assert not together.errors
    assert joined[0].round == 1
    finite.leaves(joined[0].variables)
    for lines, before in zip(found[1:], expected, strict=True):
        for line, other in zip(lines[: len(before)], before, strict=True):
            np.testing.assert_allclose([*bare(line)], [*other], rtol=1e-5)


def test_a_run_goes_on_alone_where_it_was_together(tmp_path):
    alone, joined = runs()[1], runs()
    before = test_run.trained(alone, 3)
    for _ in sfl.Together(joined).rounds(2):
        pass
    joined[1].save(tmp_path / "one")
    given = test_run.given(
        seed=SEEDS[1], partition="quantity", rate=halving, fleet=sfl.fleet.random_fleet(9, seed=SEEDS[1])
    )
    (line,) = test_run.trained(sfl.Run.restore(tmp_path / "one", **given), 1)
    np.testing.assert_allclose([*line], [*before[2]], rtol=1e-5)


def test_one_program_computes_all_runs():
    compiled = []

    def listen(event, *_, **__):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        counts = []
        for number in (1, 3):
            compiled.clear()
            together = sfl.Together(runs()[:number])
            before = sum("backend_compile" in event for event in compiled)
            for _ in together.rounds(3):
                pass
            counts.append(sum("backend_compile" in event for event in compiled) - before)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert counts[1] == counts[0], counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": optax.sgd(0.1)}, "runs: optimizer of run 1: must be that of run 0"),
        ({"batch_size": 5, "cohort_size": 2}, "cohort_size and batch_size of run 1"),
        ({"skip_diverged": True}, "runs: skip_diverged of run 1: must be that of run 0"),
    ],
)
def test_runs_that_one_program_cannot_compute_are_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        sfl.Together([make(), make(**changes)])
