"""What flags leave open is settled once: by measurement, by memory, and by the choices of the run so far."""

import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import pytest
from federated import rounds

from sfl_jax import models
from sfl_jax.commands import parts, train
from sfl_jax.commands.config import Config, changes, settings
from sfl_jax.errors import BadInput
from sfl_jax.federated import memory, tuning
from sfl_jax.federated.balance import chunk_size, fill_chunks
from sfl_jax.federated.execution import Alternative, Execution

OPEN = Execution(memory_budget_gib=8.0)
FASTEST_IN_FOURS = {1: 3.0, 2: 2.0, 4: 1.0, 8: 1.5, 16: 4.0}


@pytest.fixture(scope="module")
def profile():
    return models.profile(models.create("efficientnetv2-tiny"), (32, 32, 1))


def in_fours(one):
    return FASTEST_IN_FOURS[one.clients_per_chunk] * {"product": 1, "conv": 10}[one.layer_form]


def facts(profile, cohort_size=16, batch_size=32, slots=2, devices=1):
    return tuning.Facts(profile, batch_size, cohort_size, slots, jax.devices()[:1] * devices, "tiny")


def settle(profile, asked, seconds=in_fours, before=None, notes=None, **changes):
    return tuning.settle(asked, before, facts(profile, **changes), seconds, notes)


@pytest.mark.parametrize(
    ("batch_size", "cores", "asked", "measures"),
    [
        (4096, 2, {}, False),
        (4096, 3, {}, True),  # two devices share three cores
        (32, 2, {}, True),  # what is spent around kernels counts
        (4096, 2, {"mode": "vmap"}, True),
    ],
)
def test_on_a_core_of_its_own_a_long_step_computes_one_client(
    profile, monkeypatch, batch_size, cores, asked, measures
):
    if jax.default_backend() != "cpu":
        pytest.skip("no core is a device here")
    monkeypatch.setattr("sfl_jax.federated.cores._own", lambda: cores)
    measured = []
    asked = Execution("product", memory_budget_gib=1e3, **asked)
    execution, _ = settle(
        profile, asked, lambda one: measured.append(one) or in_fours(one), batch_size=batch_size, devices=2
    )
    assert bool(measured) == measures
    assert (execution.clients_per_chunk, execution.mode) == ((4, "vmap") if measures else (1, "map"))


def choice(settled):
    return settled.layer_form, settled.mode, settled.clients_per_chunk


def test_what_is_open_is_chosen_by_measurement(profile):
    settled, tried = settle(profile, OPEN)
    assert settled == Execution("product", 4, "vmap", 8.0)
    assert OPEN.left_open == ("layer_form", "clients_per_chunk", "mode")
    assert settled.left_open == ()
    assert tried[Alternative("product", 4)] == 1.0


@pytest.mark.parametrize(
    ("forced", "expected"),
    [({"layer_form": "conv"}, ("conv", "vmap", 4)), ({"clients_per_chunk": 8}, ("product", "vmap", 8)),
     ({"mode": "map"}, ("product", "map", 1)), ({"mode": "vmap"}, ("product", "vmap", 4)),
     ({"mode": "map", "clients_per_chunk": 5}, ("product", "map", 1))],
)  # fmt: skip
def test_what_a_flag_says_stays(profile, forced, expected):
    settled, _ = settle(profile, dataclasses.replace(OPEN, **forced))
    assert choice(settled) == expected


@pytest.mark.parametrize(
    ("cohort", "size"), [(17, 9), (19, 10), (34, 12), (37, 13), (16, 16), (2, 2), (1, 1)]
)
def test_the_settings_say_what_is_computed_at_once(profile, cohort, size):
    """--clients_per_chunk=16 with a cohort that 16 does not divide."""
    settled, _ = settle(profile, Execution("conv", 16, "vmap", 8.0), cohort_size=cohort)
    assert choice(settled) == ("conv", "vmap", size)
    work = rounds.assignments(cuts=[1] * cohort, steps=1, batch=1)
    assert fill_chunks(work, size)[1] == size
    number = f"{size} clients at once" if size > 1 else "one client after the other"
    built = mock.Mock(execution=settled, devices=jax.devices()[:1])
    assert train.how(built) == f"layers in conv form, {number}"


def test_an_open_chunk_is_chosen_among_those_of_the_cohort(profile):
    settled, tried = settle(profile, OPEN, lambda one: 1.0, cohort_size=17)
    assert settled.clients_per_chunk == 1
    assert {one.clients_per_chunk for one in tried} == {1, 2, 4, 6, 9}
    settled, _ = settle(profile, OPEN, lambda one: 1 / one[1], cohort_size=17)
    assert settled.clients_per_chunk == 9


def test_forced_altogether_measures_nothing(profile):
    forced = Execution("product", 4, "vmap", 8.0)
    assert settle(profile, forced, lambda _: pytest.fail("measured")) == (forced, {})


def test_a_run_that_goes_on_keeps_its_choice(profile):
    config = Config(memory_budget_gib=8.0)
    before = settings(parts.with_execution(config, Execution("conv", 2, "vmap")), "train")
    again, tried = settle(profile, OPEN, lambda _: pytest.fail("measured"), parts.settled(before))
    assert choice(again) == ("conv", "vmap", 2)
    assert not tried
    assert changes(before, config, "train") == {}
    assert changes(before, dataclasses.replace(config, layer_form="product"), "train") == {
        "layer_form": "--layer_form=product (was conv)"
    }


def test_what_was_measured_once_is_not_measured_again(profile, tmp_path):
    notes = tmp_path / "executions.json"
    first = settle(profile, OPEN, notes=notes)
    assert settle(profile, OPEN, lambda _: pytest.fail("measured"), notes=notes) == first
    # Other shapes, and other cohorts in the same chunks, need their own measurement.
    for other in ({"batch_size": 8}, {"cohort_size": 31}):
        measured = []
        settle(profile, OPEN, lambda one, seen=measured: seen.append(one) or 1.0, notes=notes, **other)
        assert measured, other


def test_the_chunk_fits_into_the_memory(profile):
    need = functools.partial(tuning.expected_bytes, facts(profile))
    between = dataclasses.replace(OPEN, memory_budget_gib=(need(2) + need(4)) / 2 / tuning.GIB)
    assert choice(settle(profile, between)[0]) == ("product", "vmap", 2)


def test_far_too_little_memory_is_a_line_before_anything_compiles(profile):
    poor = dataclasses.replace(OPEN, memory_budget_gib=0.001)
    with pytest.raises(BadInput, match=r"^batch_size=32: a round needs 0\.\d+ GiB, 0\.001 GiB .*; try 16$"):
        settle(profile, poor, lambda _: pytest.fail("measured"))
    wide = dataclasses.replace(OPEN, clients_per_chunk=16, memory_budget_gib=0.05)
    with pytest.raises(BadInput, match=r"^clients_per_chunk=16: .* allowed by memory_budget_gib; try 8$"):
        settle(profile, wide, lambda _: pytest.fail("measured"))


def test_what_the_compiled_round_needs_has_the_last_word(profile):
    config = Execution(clients_per_chunk=4, mode="vmap", memory_budget_gib=1.0)
    opened = {"mode", "clients_per_chunk"}

    def fit(config, needed, opened=opened):
        return tuning.fit(config, opened, {config.clients_per_chunk: needed}, facts(profile))

    assert fit(config, 2**30) is config
    assert choice(fit(config, 2**30 + 1))[1:] == ("vmap", 3)
    # Twice the estimate, so other sizes will also need twice theirs.
    needs = functools.partial(tuning.expected_bytes, facts(profile))
    poor = dataclasses.replace(config, memory_budget_gib=(2 * needs(2) + 1) / tuning.GIB)
    assert choice(fit(poor, 2 * needs(4)))[1:] == ("vmap", 2)
    two = dataclasses.replace(config, clients_per_chunk=2)
    assert choice(fit(two, 2**31))[1:] == ("map", 1)
    assert choice(fit(two, 2**31, {"clients_per_chunk"}))[1:] == ("vmap", 1), "a flag that was given stays"
    with pytest.raises(BadInput, match=r"^clients_per_chunk=4: a round needs 1\.5 GiB, 1 GiB are .*; try 2"):
        fit(config, 3 * 2**29, opened={"layer_form"})
    with pytest.raises(BadInput, match=r"^batch_size=32: .*; try 16"):
        fit(dataclasses.replace(config, clients_per_chunk=1), 2**31)


@pytest.mark.parametrize(("cohort", "devices"), [(16, 1), (37, 1), (37, 4)])
@pytest.mark.parametrize("fixed", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("fits", [1, 3, 7])
def test_few_rounds_are_compiled_to_find_the_chunk_that_fits(profile, cohort, devices, fixed, fits):
    """For any part of the memory that does not grow with the chunk, the largest chunk that fits is found.
    After the first compiled round, one or two more are enough.
    """
    sizes = sorted({chunk_size(cohort, most, devices) for most in range(1, 17)})
    expected = max(size for size in sizes if size <= fits)
    budget = 0.1 * (fixed + expected + 0.5)
    config = Execution(clients_per_chunk=sizes[-1], mode="vmap", memory_budget_gib=budget)
    here = facts(profile, cohort_size=cohort, devices=devices)
    needed, compiled = {}, []
    while config.clients_per_chunk not in compiled:
        size = config.clients_per_chunk
        compiled.append(size)
        needed[size] = tuning.most_bytes(int(0.1 * (fixed + size) * tuning.GIB))
        config = tuning.fit(config, ["clients_per_chunk", "mode"], needed, here)
    assert config.clients_per_chunk == expected
    assert len(compiled) <= 3, compiled


def test_the_budget_is_what_the_device_has_left():
    with open("/proc/meminfo") as file:
        total = int(next(line for line in file if line.startswith("MemTotal")).split()[1]) * 1024
    left = tuning.budget_bytes(dataclasses.replace(OPEN, memory_budget_gib=0), jax.devices()[:1])
    assert 0 < left < total
    assert left == pytest.approx(memory.available_bytes(jax.devices()[0]), rel=0.2)

    class Gpu:
        process_index = 0

        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 200}

    # What is placed is already counted as used; it is not subtracted again.
    assert memory.available_bytes(Gpu()) == 720
    assert tuning.budget_bytes(dataclasses.replace(OPEN, memory_budget_gib=0), [Gpu()], 100) == 720


def test_what_is_placed_counts_against_a_budget():
    assert tuning.budget_bytes(OPEN, jax.devices()[:1], 2**30) == 7 * 2**30
    assert tuning.budget_bytes(OPEN, jax.devices()[:1], 2**34) == 0


def test_processes_of_one_host_share_its_memory(monkeypatch):
    """Two of three processes are on this host, each with two of its devices. One has half as much left."""
    asked = []

    def of_all(value):
        asked.append(value)
        return np.array([value, 7, value]) if isinstance(value, int) else np.array([value, value / 2, value])

    monkeypatch.setattr(tuning.processes, "of_all", of_all)
    monkeypatch.setattr(memory, "host_bytes", lambda: 8000 * tuning.GIB)
    config = dataclasses.replace(OPEN, memory_budget_gib=0)
    assert tuning.budget_bytes(config, jax.devices()[:1] * 2) == 8000 * tuning.GIB // 8 * 9 // 10
    assert 0 <= asked[0] < 2**31, "processes tell each other 32 bits"


@pytest.mark.parametrize(
    ("optimizer", "momentum", "moments"),
    [("sgd", 0.0, 0), ("sgd", 0.9, 1), ("adam", 0.0, 2), ("adam", 0.9, 2)],
)
def test_what_the_optimiser_keeps_counts(profile, optimizer, momentum, moments):
    slots = parts.optimizer(Config(optimizer=optimizer, momentum=momentum)).slots
    here = facts(profile, batch_size=8, slots=slots)
    assert tuning.expected_bytes(here, 3) == memory.expected_bytes(profile, 8, 3, moments)


def test_more_samples_and_clients_need_more(profile):
    base = memory.expected_bytes(profile, 32, 4, 1)
    model = 4 * int(np.sum(profile.parameters) + np.sum(profile.state))
    assert memory.expected_bytes(profile, 64, 4, 1) > 1.9 * base - 16 * model
    assert memory.expected_bytes(profile, 32, 8, 1) == 2 * base - model
    # Without activations: the mean, and each client's parameters, gradients and one moment.
    assert memory.expected_bytes(profile, 0, 4, 1) == (1 + 4 * 3) * model
    assert memory.expected_bytes(profile, 32, 4, 2) == base + 4 * model
