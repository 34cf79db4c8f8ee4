import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optim import oracles

from sfl_jax import optim
from sfl_jax.errors import BadInput

# Two units and two clients, small enough to compute by hand. Client 1 has less than one batch.
PROFILE = oracles.profile(2)
PROFILE.forward_macs, PROFILE.backward_macs = np.array([10, 30]), np.array([15, 60])
PROFILE.parameters, PROFILE.state = np.array([7, 11]), np.array([2, 0])
PROFILE.activations, PROFILE.smashed = np.array([5, 6]), np.array([12, 4, 0])
FLEET = oracles.fleet(
    2,
    flops=np.array([100.0, 50.0]),
    uplink_bps=np.array([8.0, 16.0]),
    downlink_bps=np.array([32.0, 64.0]),
    samples=np.array([11, 3]),
)
WORK = optim.Work(local_epochs=3, batch_size=4, bits_per_float=16, label_bits=5, min_cut=0)
# Client 0: 3 epochs of 2 whole batches, 24 samples; client 1: 3 epochs of one filled batch, 12 samples.
BY_HAND = {
    "model_down": [[0, 9 * 32 / 32, 20 * 32 / 32], [0, 9 * 32 / 64, 20 * 32 / 64]],
    "client_forward": [[0, 24 * 20 / 100, 24 * 80 / 100], [0, 12 * 20 / 50, 12 * 80 / 50]],
    "smashed_up": [
        [24 * (12 * 8 + 5) / 8, 24 * (4 * 16 + 5) / 8, 0],
        [12 * (12 * 8 + 5) / 16, 12 * (4 * 16 + 5) / 16, 0],
    ],
    "server": [[24 * 230 / 10, 24 * 180 / 10, 0], [12 * 230 / 20, 12 * 180 / 20, 0]],
    "gradient_down": [[0, 24 * 64 / 32, 0], [0, 12 * 64 / 64, 0]],
    "client_backward": [[0, 24 * 30 / 100, 24 * 150 / 100], [0, 12 * 30 / 50, 12 * 150 / 50]],
    "model_up": [[0, 9 * 32 / 8, 20 * 32 / 8], [0, 9 * 32 / 16, 20 * 32 / 16]],
}


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("term", BY_HAND)
def test_every_term_equals_a_hand_calculation(term, cut):
    terms = optim.terms(PROFILE, FLEET, WORK)
    seconds = terms.seconds(np.full(2, cut), np.array([10.0, 20.0]))
    np.testing.assert_allclose(getattr(seconds, term), [row[cut] for row in BY_HAND[term]], rtol=1e-15)


def test_dense_costs_are_the_sum_of_the_terms():
    terms = optim.terms(PROFILE, FLEET, WORK)
    costs = terms.costs()
    off_server = sum(np.array(rows) for name, rows in BY_HAND.items() if name != "server")
    np.testing.assert_allclose(costs.fixed_s, off_server, rtol=1e-15)
    np.testing.assert_array_equal(costs.server_flop, [[24 * 230, 24 * 180, 0], [12 * 230, 12 * 180, 0]])
    assert costs.allowed.all()


def test_a_client_at_its_own_cut_is_its_entry_of_the_dense_costs():
    terms = optim.terms(oracles.profile(4), oracles.fleet(5), optim.Work(min_cut=2))
    cuts = np.array([0, 4, 2, 1, 3])
    for mine, dense in zip(terms.at(cuts), terms.costs(), strict=True):
        np.testing.assert_array_equal(mine, dense[np.arange(5), cuts])


# Cut 1, floats: 3 x 7 for parameters, gradients and momentum, 2 of state, 4 x 5 activations: 43 x 4 bytes.
MASKS = {
    "nothing binds": ({}, {}, [[1, 1, 1], [1, 1, 1]]),
    "min_cut": ({}, {"min_cut": 2}, [[0, 0, 1], [0, 0, 1]]),
    "memory, exactly enough": ({"memory_bytes": np.array([172.0, 0.0])}, {}, [[1, 1, 0], [1, 0, 0]]),
    "memory, a byte short": ({"memory_bytes": np.array([171.0, 1e9])}, {}, [[1, 0, 0], [1, 1, 1]]),
    "memory without momentum": (
        {"memory_bytes": np.array([144.0, 143.0])},
        {"optimizer_slots": 0},
        [[1, 1, 0], [1, 0, 0]],
    ),
}


@pytest.mark.parametrize(("columns", "changes", "allowed"), MASKS.values(), ids=MASKS)
def test_masks(columns, changes, allowed):
    fleet = oracles.fleet(2, **{**vars(FLEET), **columns})
    terms = optim.terms(PROFILE, fleet, WORK._replace(**changes))
    np.testing.assert_array_equal(terms.costs().allowed, np.array(allowed, bool))


def test_energy_is_cycles_and_airtime_and_forbids_what_it_cannot_pay():
    # Cut 1, client 0: 24 x 50 FLOP at 3 cycles per FLOP; 24 x 69 + 288 bits at 8 bit/s and 2 W.
    joules = 0.5 * 300.0**2 * (3 * 24 * 50) + 2 * (24 * 69 + 288) / 8
    energy = {"cycles_per_s": np.full(2, 300.0), "kappa": np.full(2, 0.5), "transmit_w": np.full(2, 2.0)}
    for budget, open_cut in ((joules * (1 + 1e-12), True), (joules * (1 - 1e-12), False)):
        fleet = oracles.fleet(2, **{**vars(FLEET), **energy, "energy_j": np.array([budget, np.inf])})
        terms = optim.terms(PROFILE, fleet, WORK)
        np.testing.assert_allclose(terms.joules(1)[0], joules, rtol=1e-15)
        assert terms.costs().allowed[:, 1].tolist() == [open_cut, True]


@given(
    samples=st.integers(1, 500),
    work=st.builds(optim.Work, local_epochs=st.integers(1, 3), batch_size=st.integers(1, 64)),
)
def test_samples_processed_are_whole_batches_and_at_least_one(samples, work):
    processed = optim.samples_processed(np.array([samples]), work)[0]
    per_epoch = processed / work.local_epochs
    assert per_epoch % work.batch_size == 0
    assert (
        per_epoch == work.batch_size
        if samples < 2 * work.batch_size
        else samples - work.batch_size < per_epoch <= samples
    )


def test_the_terms_of_a_cohort_are_those_rows():
    energy = {"cycles_per_s": np.full(4, 1e9), "kappa": np.full(4, 1e-27), "transmit_w": np.ones(4)}
    terms = optim.terms(oracles.profile(), oracles.fleet(4, **energy, energy_j=np.full(4, 3.0)), optim.Work())
    for mine, all_rows in zip(terms.take([2, 0]).costs(), terms.costs(), strict=True):
        np.testing.assert_array_equal(mine, all_rows[[2, 0]])


REFUSED = {
    "batch_size=0: choose at least 1": ({"batch_size": 0}, {}),
    "min_cut=3: the chain has 2 units; choose 0 to 2": ({"min_cut": 3}, {}),
    "client 1: uplink_bps=0.0: must be above 0": ({}, {"uplink_bps": np.array([1.0, 0.0])}),
    "client 0: flops=nan: must be above 0": ({}, {"flops": np.array([np.nan, 1.0])}),
    "client 1: samples=0: must be above 0": ({}, {"samples": np.array([1, 0])}),
    "energy_j is given without kappa, transmit_w": (
        {},
        {"energy_j": np.ones(2), "cycles_per_s": np.ones(2)},
    ),
    "fleet: samples is missing": ({}, {"samples": None}),
}


@pytest.mark.parametrize(("changes", "columns"), REFUSED.values(), ids=REFUSED)
def test_input_without_sense_is_refused(changes, columns, request):
    with pytest.raises(BadInput, match=request.node.callspec.id):
        optim.terms(PROFILE, oracles.fleet(2, **{**vars(FLEET), **columns}), WORK._replace(**changes))
