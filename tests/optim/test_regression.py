import jax
import numpy as np
import pytest
from optim import oracles

from sfl_jax import fleet, models, optim
from sfl_jax.errors import BadInput
from sfl_jax.optim import regression

CUTS = tuple(range(1, 41))


def fitted(values):
    """The fits of one made-up quantity over 40 cuts."""
    return regression.fit_curve("made up", CUTS, tuple(map(float, values)))


X = np.array(CUTS) / 40
MADE = {
    "polynomial 1": 3 + 2 * X,
    "polynomial 3": 5 * X**3 - 2 * X,
    "power": 7 * X**2.5 + 1,
    "exponential": 0.2 * np.exp(3 * X) - 0.1,
    "reciprocal": 0.3 / (X + 0.2) + 1,
    "piecewise 3": np.interp(X, [0, 0.5, 1], [0, 5, 6]),
    "piecewise 6": np.interp(X, np.linspace(0, 1, 6), [4, 1, 3, 2, 6, 0]),
}


@pytest.mark.parametrize("family", MADE)
def test_data_of_a_family_are_found_to_be_of_it(family):
    curve = fitted(MADE[family])
    assert curve.chosen.family == family
    assert curve.chosen.r2 > 1 - 1e-9
    np.testing.assert_allclose(curve.chosen(CUTS), MADE[family], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_parameters_that_explain_only_noise_are_not_paid_for():
    for degree, truth in ((1, 3 + 2 * X), (2, 3 + 2 * X + 4 * X**2)):
        noisy = (truth + np.random.default_rng(seed).normal(size=40) * 0.05 for seed in range(8))
        chosen = [fitted(values).chosen for values in noisy]
        assert sum(fit.family == f"polynomial {degree}" for fit in chosen) >= 4
        # Choosing by error alone would always take the most parameters.
        assert np.mean([len(fit.parameters) for fit in chosen]) < 5


def test_the_record_of_a_fit_is_what_a_reader_would_compute():
    values = np.sqrt(X) + (X > 0.6)
    for fit in fitted(values).fits:
        errors = fit(CUTS) - values
        np.testing.assert_allclose(
            fit.r2, 1 - (errors**2).sum() / ((values - values.mean()) ** 2).sum(), rtol=1e-9
        )
        np.testing.assert_allclose(fit.worst, abs(errors).max() / values.max(), rtol=1e-9)
    aiccs = [fit.aicc for fit in fitted(values).fits]
    assert aiccs == sorted(aiccs)


def test_least_squares_is_least():
    values = np.sqrt(X) + (X > 0.6)
    for fit in fitted(values).fits:
        formula = regression.FAMILIES[fit.family][0]

        def squares(parameters, formula=formula):
            return ((formula(X, parameters) - values / values.max()) ** 2).sum()

        best = squares(np.array(fit.parameters))
        for nudge in np.eye(len(fit.parameters)):
            for size in (-1e-3, 1e-3):
                assert squares(np.array(fit.parameters) + size * nudge) >= best * (1 - 1e-6)


@pytest.mark.parametrize("units", [1, 2, 3, 4, 7, 30])
def test_chains_of_any_length_can_be_fitted(units):
    terms = optim.terms(oracles.profile(units), oracles.fleet(4), optim.Work())
    curves = optim.fit_curves(terms)
    assert [curve.quantity for curve in curves] == list(regression.QUANTITIES)
    assert all(np.isfinite(curve.chosen(np.linspace(0, units, 9))).all() for curve in curves)


@pytest.mark.parametrize("units", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_plans_on_fitted_curves_are_sound(units):
    for seed in range(4):
        terms = optim.terms(oracles.profile(units), oracles.fleet(4, seed), optim.Work())
        plan = optim.solve(terms, 1e9, "regression")
        oracles.assert_sound(terms.costs(), 1e9, plan)


def test_relaxed_terms_follow_the_fits_between_the_cuts_and_are_exact_at_the_end():
    terms = optim.terms(oracles.profile(30), oracles.fleet(4), optim.Work(min_cut=3))
    curves = optim.fit_curves(terms)
    relaxed = optim.relaxed(terms, curves)
    per_unit = regression.SAMPLES_PER_UNIT
    assert relaxed.shape == (4, 30 * per_unit + 1)
    sample = 17 * per_unit + 5
    np.testing.assert_allclose(relaxed.forward_flop[sample], curves[0].chosen(17 + 5 / per_unit), rtol=1e-12)
    np.testing.assert_allclose(relaxed.down_bits[sample], curves[3].chosen(17 + 5 / per_unit), rtol=1e-12)
    np.testing.assert_allclose(relaxed.up_bits[sample] - relaxed.down_bits[sample], 32)
    assert relaxed.permitted.sum() == (30 - 3) * per_unit + 1
    for name in ("forward_flop", "work_flop", "up_bits", "down_bits", "model_bits", "needed_bytes"):
        np.testing.assert_array_equal(getattr(relaxed, name)[[0, -1]], getattr(terms, name)[[0, -1]])


def test_where_the_fits_are_exact_the_relaxed_terms_are_the_table():
    profile = oracles.profile(20)
    profile.forward_macs, profile.backward_macs = np.full(20, 300_000), np.full(20, 600_000)
    profile.parameters, profile.state = np.full(20, 500), np.full(20, 10)
    profile.smashed = np.r_[1024, np.arange(19, -1, -1) * 100]
    terms = optim.terms(profile, oracles.fleet(10), optim.Work())
    curves = optim.fit_curves(terms)
    assert np.max([curve.chosen.worst for curve in curves]) < 1e-9
    relaxed = optim.relaxed(terms, curves)
    for name in (
        "forward_flop",
        "backward_flop",
        "work_flop",
        "up_bits",
        "down_bits",
        "model_bits",
        "needed_bytes",
    ):
        at_cuts = getattr(relaxed, name)[:: regression.SAMPLES_PER_UNIT]
        np.testing.assert_allclose(at_cuts[1:], getattr(terms, name)[1:], rtol=1e-9, err_msg=name)


def test_rounding_takes_the_nearest_allowed_cut_or_the_neighbour_that_needs_less():
    clients = oracles.fleet(3, memory_bytes=np.array([1e12, 2.2e6, 1e12]))
    terms = optim.terms(oracles.profile(5), clients, optim.Work(min_cut=2))
    costs = terms.costs()
    allowed = costs.allowed
    assert allowed[0].tolist() == [False, False, True, True, True, True]
    last = int(np.flatnonzero(allowed[1])[-1])
    assert last < 5
    samples = np.array([round(4.4 * 16), 5 * 16, 0])
    # Times from one that both neighbours meet to one that no neighbour meets.
    for round_s in np.geomspace(0.5 * costs.fixed_s[0].min(), 3 * costs.fixed_s[0].max(), 25):
        with jax.enable_x64(True):
            traced = jax.tree.map(jax.numpy.asarray, terms)
            nearest = regression.rounded(traced, samples, round_s, "nearest")
            need = regression.rounded(traced, samples, round_s, "need")
        assert nearest.tolist() == [4, last, 2]
        below, above = 4, 5
        left = round_s - costs.fixed_s[0]
        with np.errstate(divide="ignore"):
            share = np.where(left > 0, costs.server_flop[0] / left, np.inf)
        if np.isfinite(share[[below, above]]).any():
            assert need[0] == (above if share[above] < share[below] else below)
        else:
            assert need[0] == (above if costs.fixed_s[0, above] < costs.fixed_s[0, below] else below)
        assert need[1:].tolist() == [last, 2]  # only one neighbour is allowed for these two


@pytest.mark.slow
def test_rounding_by_need_is_nearer_to_the_optimum():
    profile = models.profile(models.create("efficientnetv2-b0"), (32, 32, 1))
    gaps = {rounding: [] for rounding in optim.ROUNDINGS}
    for seed in range(3):
        clients = fleet.random_fleet(30, seed=seed).with_samples([600] * 30)
        terms, flops = optim.terms(profile, clients, optim.Work()), 0.1 * clients.flops.sum()
        for rounding, found in gaps.items():
            plan = optim.solve(terms, flops, "regression", rounding=rounding)
            oracles.assert_sound(terms.costs(), flops, plan)
            found.append(plan.gap)
    assert np.mean(gaps["need"]) < 0.6 * np.mean(gaps["nearest"])


def test_dense_costs_have_no_curves():
    costs = optim.Costs(np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2), bool))
    with pytest.raises(BadInput, match=r"method=regression.* needs Terms"):
        optim.solve(costs, 1.0, "regression")
