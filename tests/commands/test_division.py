"""The fleet file decides how many clients there are and which samples each has, in plans and in training."""

import dataclasses

import numpy as np
import pytest
from commands import small_world

from sfl_jax import datasets, models
from sfl_jax import fleet as fleets
from sfl_jax.commands import division, parts, train, workdir
from sfl_jax.commands.config import Config, validate
from sfl_jax.errors import BadInput
from sfl_jax.run import Run
from sfl_jax.run.rounds import prepare

SAMPLES = [40, 3, 200, 7, 90]
SMALL = Config(model="efficientnetv2-tiny", image_size=8, cohort_size=3, server_flops=1e10, batch_size=4)


@pytest.fixture
def file(tmp_path):
    """Writes a fleet of five clients with these samples. Returns the settings that name it."""

    def write(samples=SAMPLES, /, name="fleet.csv", **changes):
        clients = fleets.random_fleet(5, seed=3)
        clients = clients if samples is None else clients.with_samples(samples)
        fleets.write_fleet(tmp_path / name, dataclasses.replace(clients, **changes))
        return dataclasses.replace(SMALL, fleet=str(tmp_path / name))

    return write


def refused(config):
    with pytest.raises(BadInput) as caught:
        division.divide(*division.settle(config), np.arange(384) % 10)
    return str(caught.value)


@pytest.mark.parametrize(
    ("samples", "settings", "expected"),
    [
        (SAMPLES, {}, (5, "fleet")),
        (None, {}, (5, "iid")),
        (SAMPLES, {"clients": 5}, (5, "fleet")),
        (SAMPLES, {"partition": "shards"}, (5, "shards")),
        (SAMPLES, {"fleet": "random"}, (100, "iid")),
        (SAMPLES, {"fleet": "random", "clients": 7, "partition": "quantity"}, (7, "quantity")),
    ],
)
def test_what_flags_leave_open_is_decided_by_the_fleet(file, samples, settings, expected):
    settled, _ = division.settle(dataclasses.replace(file(samples), **settings))
    assert (settled.clients, settled.partition) == expected
    assert division.settle(settled)[0] == settled
    validate(settled)


def test_a_cohort_that_nobody_asked_for_makes_way_for_a_smaller_fleet():
    for given, clients, expected in ((10, 3, 3), (10, 12, 10), (2, 3, 2)):
        config = dataclasses.replace(SMALL, clients=clients, cohort_size=given)
        validate(config)
        assert division.settle(config)[0].cohort_size == expected
    with pytest.raises(BadInput, match="--cohort_size=4: must be at most --clients=3"):
        validate(dataclasses.replace(SMALL, clients=3, cohort_size=4))


def test_flags_reach_the_data(monkeypatch):
    labels, asked = np.arange(384) % 10, []
    for scheme, flags, named in (
        ("dirichlet", {"dirichlet_alpha": 0.1, "min_samples": 9}, {"alpha": 0.1, "min_samples": 9}),
        ("shards", {"shards_per_client": 3}, {"shards_per_client": 3}),
        ("quantity", {"dirichlet_alpha": 3.0}, {"alpha": 3.0}),
    ):
        config = dataclasses.replace(SMALL, clients=20, partition=scheme, seed=4, **flags)
        shares = division.divide(*division.settle(config), labels)
        expected = datasets.partition(labels, 20, name=scheme, seed=4, **named)
        for part, other in zip(shares, expected, strict=True):
            np.testing.assert_array_equal(part, other)

    def load(*given):
        asked.append(given)
        raise BadInput("enough")

    monkeypatch.setattr(datasets, "load", load)
    config = dataclasses.replace(SMALL, dataset="cifar100", data_dir="sets", label_key="coarse_label")
    with pytest.raises(BadInput, match="enough"):
        parts.build(config)
    assert asked == [("cifar100", "sets", False, "coarse_label")]


def test_the_plan_of_a_fleet_file_is_the_plan_that_is_trained(file):
    config = file()
    with small_world.world(create=models.create):
        settled, built, *_ = parts.build(config)
        others = parts.build(dataclasses.replace(config, seed=1)).parts
    assert [len(share) for share in built.division] == SAMPLES
    assert built.fleet.samples is not None
    assert built.fleet.samples.tolist() == SAMPLES
    owned = np.concatenate(built.division)
    assert len(np.unique(owned)) == sum(SAMPLES)
    assert not np.array_equal(owned, np.concatenate(others.division))
    assert (settled.clients, settled.partition) == (5, "fleet")
    _, _, planned = parts.read_terms(config)
    for trained, shown in zip(built.terms, planned, strict=True):
        np.testing.assert_array_equal(trained, shown)
    prepared = prepare(built, 0)
    ids = prepared.assignments.client
    np.testing.assert_array_equal(prepared.assignments.weight, np.array(SAMPLES)[ids])
    np.testing.assert_array_equal(prepared.assignments.steps, np.maximum(np.array(SAMPLES)[ids] // 4, 1))


def test_an_edited_column_is_another_fleet_to_a_run_that_goes_on(file):
    with small_world.world():
        one, other = (
            parts.inputs(parts.build(file(samples)))["fleet"] for samples in (SAMPLES, [39, 3, 200, 7, 90])
        )
    assert one != other


def test_a_start_says_what_it_does_not_use(file, tmp_path, capsys, monkeypatch):
    """Unused columns, and unused training samples (of 384 in the small world)."""
    monkeypatch.setattr(Run, "compile", lambda *_: (_ for _ in ()).throw(BadInput("enough")))
    plain = {"transmit_w": None, "distance_m": None}

    def said(config, *flags):
        given = [f"--fleet={config.fleet}", "--cohort_size=3", "--clients=0", *flags]
        with small_world.world():
            assert small_world.run(tmp_path / "run", *given) == 2
        out, err = capsys.readouterr()
        assert err.splitlines()[-1] == "error: enough"
        return out.replace(config.fleet, "FILE").splitlines()

    assert said(file(**plain)) == ["44 of 384 training samples not used: FILE asks for 340"]
    assert said(file([384 - 8, 2, 2, 2, 2], **plain)) == []
    assert said(file(**plain), "--partition=iid") == [
        "samples of FILE not used: --partition=iid gives 76 to 77"
    ]
    assert said(file(None, **plain)) == []
    assert said(file(None)) == [
        "transmit_w, distance_m of FILE not used: --links=fixed and no column energy_j"
    ]
    assert said(file(None), "--links=fading") == [
        "uplink_bps, downlink_bps of FILE not used: --links=fading and no column energy_j"
    ]
    whole = small_world.noise()
    lower = {name: getattr(whole, name)[:, :5] for name in ("train_images", "test_images")}
    chosen = dataclasses.replace(whole, notes=("labels: label",), **lower)
    monkeypatch.setattr(small_world, "noise", lambda *_: chosen)
    squeezed = "--image_size=8: images of 5x8 are squeezed to 8x8"
    assert said(file([384 - 8, 2, 2, 2, 2], **plain)) == ["labels: label", squeezed]


def test_every_column_that_energy_needs_is_used(file):
    config = file(None, **{name: np.ones(5) for name in ("cycles_per_s", "kappa", "energy_j")})
    settled, found = division.settle(config)
    [line] = division.notes(settled, found, [np.arange(1)] * 5, 5)
    assert line == f"distance_m of {config.fleet} not used: --links=fixed"
    assert found is not None
    found = dataclasses.replace(found, energy_j=None)
    [line] = division.notes(settled, found, [np.arange(1)] * 5, 5)
    assert line.startswith("cycles_per_s, kappa, transmit_w, distance_m of ")


def test_what_cannot_be_is_refused_with_a_way_out(file):
    with_samples, without = file(), file(None, name="none.csv")
    path = with_samples.fleet

    def case(config=with_samples, **changes):
        return refused(dataclasses.replace(config, **changes))

    assert case(clients=6) == f"--clients=6: must be 5, the clients of --fleet={path}"
    assert case(clients=100).startswith("--clients=100: must be 5")
    assert case(cohort_size=6) == "--cohort_size=6: must be at most --clients=5"
    assert case(without, partition="fleet") == (
        f"--partition=fleet: needs a fleet file with the column samples; --fleet={without.fleet} has none"
    )
    assert case(SMALL, partition="fleet").endswith("--fleet=random has none")
    assert case(file([380, 1, 1, 1, 2])) == (
        "partition=fleet: the clients have 385 samples in all, the training set has 384;"
        " use lower numbers, or partition=iid"
    )
    assert "the clients have 36893488147419103229 samples" in case(file([2**63 - 1] * 4 + [1]))
    with pytest.raises(BadInput, match="--clients=4: must be 5, the clients of"):
        parts.read_fleet(dataclasses.replace(with_samples, clients=4))


def test_what_was_chosen_is_what_a_run_in_the_workdir_is_compared_with(file, tmp_path, monkeypatch):
    """Neither command needs to name a partition or a number of clients."""
    seen = []

    def reached(config, _):
        seen.append((config.clients, config.partition))
        raise BadInput("enough")

    monkeypatch.setattr(workdir, "reached", reached)
    for flags in ([f"--fleet={file().fleet}"], [f"--fleet={file(None, name='none.csv').fleet}"], []):
        assert train.main([f"--workdir={tmp_path / 'run'}", "--cohort_size=3", *flags]) == 2
    assert seen == [(5, "fleet"), (5, "iid"), (100, "iid")]


ONES, PAIRS = [np.arange(1)] * 3, [np.arange(2)] * 4


def test_clients_that_cannot_learn_are_counted():
    """If batch norm averages over one value, a client needs two samples, and so does a batch."""
    [line] = division.single_values(SMALL, ONES + PAIRS, 1)
    assert line.startswith("3 of 7 clients learn almost nothing: they have one sample, and batch norm")
    assert "--min_samples=2" in line
    assert not division.single_values(SMALL, PAIRS, 1)
    one = dataclasses.replace(SMALL, batch_size=1)
    assert not division.single_values(SMALL, ONES, 4)
    assert not division.single_values(one, ONES, None)
    [line] = division.single_values(one, PAIRS, 4)
    assert line.startswith("--batch_size=1: batch norm averages over the 4 values of one image")


def test_a_run_in_which_no_client_can_learn_is_refused():
    with pytest.raises(BadInput, match=r"^--clients=3: each has one sample"):
        division.single_values(SMALL, ONES, 1)
    with pytest.raises(BadInput, match=r"^--batch_size=1: batch norm .* --image_size=8, .* at least 2$"):
        division.single_values(dataclasses.replace(SMALL, batch_size=1), PAIRS, 1)


def test_a_run_looks_at_its_own_images_and_clients():
    """Tiny ends in maps of 1x1 at 8x8, and of 2x2 at 16x16. At cut 0 the 8x8 image goes up in both."""
    uneven = dataclasses.replace(SMALL, clients=48, partition="quantity", dirichlet_alpha=0.1)
    larger = dataclasses.replace(uneven, image_size=16, batch_size=1)
    with small_world.world(create=models.create):
        built, wide = parts.build(uneven), parts.build(larger)
        with pytest.raises(BadInput, match="--batch_size=1"):
            parts.build(dataclasses.replace(larger, image_size=8))
    single = sum(len(part) == 1 for part in built.parts.division)
    assert [line for line in built.notes if line.startswith(f"{single} of 48 clients learn almost nothing")]
    assert not any("learn" in line for line in wide.notes)
    for each in (built, wide):
        assert each.parts.terms.up_bits[0] == 8 * 8 * 8 + 32
