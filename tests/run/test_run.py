"""`Run`: parts composed in Python, its results, and how it is saved."""

import dataclasses

import finite
import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import sfl_jax as sfl
from sfl_jax.errors import BadInput
from sfl_jax.run import metrics

RNG = np.random.default_rng(3)
LABELS = RNG.integers(0, 4, 220).astype(np.int32)
IMAGES = np.clip(60 * LABELS[:, None, None, None] + RNG.integers(0, 60, (220, 6, 6, 1)), 0, 255).astype(
    np.uint8
)
DATA = sfl.datasets.Dataset(IMAGES[:180], LABELS[:180], IMAGES[180:], LABELS[180:], 4, "shades")
FLEET = sfl.fleet.random_fleet(9)


class Flat(nn.Module):
    """A unit without `train`, with its own initialisers and parameter names."""

    features: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        weights = self.param("weights", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return nn.relu(x @ weights)


CHAIN = sfl.Chain([Flat(12), nn.Dense(4)])


def given(**changes):
    return {
        "chain": CHAIN, "data": DATA, "fleet": FLEET, "optimizer": optax.sgd(0.3, momentum=0.5),
        "planner": sfl.Planner(server_flops=1e6), "cohort_size": 3, "batch_size": 10, "local_epochs": 2,
        "seed": 4, "execution": sfl.Execution("product", 3, "vmap"), **changes,
    }  # fmt: skip


def make(**changes):
    return sfl.Run(**given(**changes))


def trained(run, rounds):
    """The lines of these rounds without the machine's clocks."""
    return [line._replace(**dict.fromkeys(metrics.CLOCKS, 0.0)) for line in run.rounds(rounds)]


@pytest.fixture(scope="module")
def done():
    run = make()
    return run, trained(run, 4)


def as_numpy(variables):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]


def test_it_learns_and_says_how_well(done):
    run, lines = done
    assert [line.round for line in lines] == [1, 2, 3, 4]
    assert lines[-1].train_loss < 0.7 * lines[0].train_loss
    loss, accuracy = run.evaluate()
    assert accuracy == pytest.approx(lines[-1].test_accuracy)
    assert accuracy > 0.6
    assert loss == pytest.approx(lines[-1].test_loss, rel=1e-5)
    logits = run.predict(DATA.test_images)
    expected, _ = CHAIN.apply(run.variables, jax.numpy.asarray(DATA.test_images / 127.5 - 1.0))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    many = np.concatenate([DATA.test_images] * 400)  # several batches
    np.testing.assert_allclose(run.predict(many)[-40:], logits, rtol=1e-4, atol=1e-5)
    right = run.predict(DATA.train_images).argmax(1) == DATA.train_labels
    own = run.client_accuracies()
    assert own.shape == (9,)
    sizes = [len(share) for share in run.parts.division]
    assert np.average(own, weights=sizes) == pytest.approx(right.mean())
    held_out = run.client_accuracies(held_out=True)
    tested = run.predict(DATA.test_images).argmax(1) == DATA.test_labels
    by_class = [tested[DATA.test_labels == number].mean() for number in range(DATA.num_classes)]
    for share, found in zip(run.parts.division, held_out, strict=True):
        assert found == pytest.approx(np.mean([by_class[label] for label in DATA.train_labels[share]]))
    assert lines[-1].client_accuracy_mean == pytest.approx(held_out.mean())
    assert lines[-1].client_accuracy_worst == pytest.approx(held_out.min())


def test_a_round_is_that_of_optax_and_flax(done):
    """The first round: each client alone, with the optimiser as its author writes it, and their mean."""
    run, start = make(), CHAIN.init(jax.random.key(4), jax.numpy.zeros((1, 6, 6, 1)))
    _, lines = done
    planned = run.plan()
    optimizer, total = optax.sgd(0.3, momentum=0.5), 0
    whole = [np.zeros(x.shape) for x in as_numpy(start.params)]
    ids = sfl.fleet.cohort(4, 0, 9, 3)
    batches, steps = sfl.datasets.batches(
        run.parts.division, ids, seed=4, round=0, local_epochs=2, batch_size=10, steps_max=run.parts.steps_max
    )

    def loss_of(params, x, y):
        logits, _ = CHAIN.apply(start._replace(params=params), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    for rows, count, id in zip(batches, steps, ids, strict=True):
        params, state = start.params, optimizer.init(start.params)
        for row in rows[:count]:
            x = jax.numpy.asarray(IMAGES[row] / np.float32(127.5) - 1)
            gradients = jax.grad(loss_of)(params, x, LABELS[row])
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        size = len(run.parts.division[id])
        mine = [size * x for x in as_numpy(params)]
        whole, total = (
            mine if whole is None else [a + b for a, b in zip(whole, mine, strict=True)],
            total + size,
        )
    [line] = trained(run, 1)
    assert line == lines[0]
    assert line.round_s == pytest.approx(planned.plan.round_s)
    for ours, theirs, before in zip(
        as_numpy(run.variables.params), whole, as_numpy(start.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs / total, rtol=1e-4, atol=1e-5)
        assert not finite.are_close(ours, before, rtol=1e-2, atol=1e-3)


def test_calls_of_rounds_add_up(done):
    run, lines = done
    again = make()
    assert trained(again, 1) + trained(again, 3) == lines
    for ours, theirs in zip(as_numpy(again.variables), as_numpy(run.variables), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [line.round for line in again.lines] == [1, 2, 3, 4]


def test_a_run_that_goes_on_computes_as_before(tmp_path):
    """Choices that a measurement settled are kept, because other choices would round differently."""
    run = make(execution=sfl.Execution())
    trained(run, 1)
    assert run.parts.execution.left_open == ()
    other = dataclasses.replace(run.parts.execution, clients_per_chunk=1, mode="map", layer_form="conv")
    run.parts = dataclasses.replace(run.parts, execution=other)
    run.save(tmp_path)
    later = sfl.Run.restore(tmp_path, **given(execution=sfl.Execution()))
    trained(later, 1)
    assert later.parts.execution == other


def test_a_saved_run_goes_on_bitwise(done, tmp_path):
    run, lines = done
    half = make()
    trained(half, 2)
    half.save(tmp_path / "run")
    later = sfl.Run.restore(tmp_path / "run", **given())
    assert (later.round, [line.round for line in later.lines]) == (2, [1, 2])
    assert trained(later, 2) == lines[2:]
    for ours, theirs in zip(as_numpy(later.variables), as_numpy(run.variables), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    with pytest.raises(BadInput, match="no run is saved here"):
        sfl.Run.restore(tmp_path, **given())


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("chain", sfl.Chain([Flat(13), nn.Dense(4)])),
        ("data", dataclasses.replace(DATA, train_labels=DATA.train_labels[::-1].copy(), digest="")),
        ("fleet", sfl.fleet.random_fleet(9, seed=1)),
        ("optimizer", optax.adam(0.1)),
        ("optimizer", optax.sgd(0.31, momentum=0.5)),
        ("optimizer", optax.sgd(0.3, momentum=0.6)),
        ("server_optimizer", optax.sgd(0.9)),
        ("rate", lambda round: 1.0 - 0.5 * round),
        ("preprocess", lambda images: images / 255),
        ("planner", sfl.Planner(server_flops=2e6)),
        ("faults", sfl.Faults(jitter=0.1)),
        ("cohort_size", 2),
        ("batch_size", 5),
        ("seed", 5),
    ],
)
def test_a_part_that_differs_is_named(done, name, other, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "saved"
    if not path.exists():
        done[0].save(path)
    with pytest.raises(BadInput, match=rf"was saved with another .*\b{name}\b"):
        sfl.Run.restore(path, **given(**{name: other}))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"cohort_size": 10}, "cohort_size=10: must be at most 9, the clients of the fleet"),
        ({"cohort_size": 0}, "cohort_size=0: must be an integer, at least 1"),
        ({"scheme": "sfl_v9"}, "scheme=sfl_v9: must be one of sfl, sfl_v2, psl, sl, fl"),
        ({"optimizer": optax.scale(1.0)}, "optimizer: its updates point uphill"),
        ({"partition": [np.arange(3)]}, "partition: has 1 clients; the fleet has 9"),
        (
            {"partition": [np.zeros(1, int)] * 9},
            "partition[1]: has a sample twice, or a sample of another client",
        ),
        ({"partition": "fleet"}, "partition=fleet: needs a fleet with samples"),
        ({"variables": sfl.models.Variables((), ())}, "variables: must have the structure"),
        ({"planner": sfl.Planner(min_cut=3)}, "min_cut=3: must be at most 2, the units of the chain"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(changes, line):
    with pytest.raises(BadInput) as caught:
        make(**changes)._state or make(**changes).start()
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make_part", "line"),
    [
        (lambda: sfl.Planner("best"), "method=best: must be one of exact, "),
        (lambda: sfl.Planner(server_flops=-1.0), "server_flops=-1.0: must be"),
        (lambda: sfl.Planner(band="pooled", method="greedy"), "band=pooled: needs method=exact"),
        (lambda: sfl.Planner("work_conserving", barrier="staged"), "method=work_conserving: needs"),
        (lambda: sfl.Faults(drop_probability=1.5), "drop_probability=1.5: must be 0 to 1"),
        (lambda: sfl.Faults(deadline_factor=0.5), "deadline_factor=0.5: must be 0, or at least 1"),
    ],
)
def test_a_part_checks_its_own_values(make_part, line):
    with pytest.raises(BadInput) as caught:
        make_part()
    assert str(caught.value).startswith(line)


def test_what_is_asked_of_a_run_is_checked(done):
    run, _ = done
    for ask, line in (
        (lambda: run.rounds(0), "rounds=0: must be an integer, at least 1"),
        (lambda: run.predict(np.zeros((2, 5, 5, 1), np.uint8)), r"images: of shape \(2, 5, 5, 1\)"),
        (lambda: run.predict(np.zeros((2, 6, 6, 1))), "images: of float64; must be uint8"),
        (lambda: run.evaluate(DATA.test_images, [1, 2]), r"labels: have shape \(2,\)"),
    ):
        with pytest.raises(BadInput, match=line):
            ask()


def test_fl_is_sfl_whose_clients_keep_everything():
    run = make(scheme="fl")
    assert (run.plan().plan.cuts == 2).all()


def first_two(logits, labels):
    """Whether the label is among the two largest logits."""
    return (jax.lax.top_k(logits, 2)[1] == labels[:, None]).any(-1)


def squared(logits, labels):
    return ((logits - jax.nn.one_hot(labels, 4)) ** 2).sum(-1)


def test_loss_and_metric_are_parts(done):
    run = make(loss=squared, metric=first_two, optimizer=optax.sgd(0.02))
    lines = trained(run, 2)
    logits = run.predict(DATA.test_images)
    assert lines[-1].test_loss == pytest.approx(float(squared(logits, DATA.test_labels).mean()), rel=1e-5)
    two = float(first_two(logits, DATA.test_labels).mean())
    assert lines[-1].test_accuracy == pytest.approx(two)
    assert run.evaluate() == pytest.approx((lines[-1].test_loss, two), rel=1e-5)
    assert two > (logits.argmax(1) == DATA.test_labels).mean()
    assert lines[1].train_loss < lines[0].train_loss


def test_a_save_that_ends_early_leaves_the_one_before(done, tmp_path, monkeypatch):
    run = make()
    trained(run, 1)
    run.save(tmp_path)
    trained(run, 1)

    def full(self, line):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Log, "write", full)
        with pytest.raises(OSError, match="No space"):
            run.save(tmp_path)
    assert sfl.Run.restore(tmp_path, **given()).round == 1
    run.save(tmp_path)
    assert sfl.Run.restore(tmp_path, **given()).round == 2


def test_later_rounds_are_checked_before_they_begin(monkeypatch):
    run, asked = make(), []
    trained(run, 1)
    monkeypatch.setattr(sfl.planning, "check_rounds", lambda *given: asked.append(list(given[-1])))
    run.rounds(2)
    assert [round for round, _ in asked[0]] == [1, 2]
