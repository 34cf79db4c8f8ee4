"""ε of the codec `gaussian` against Google's accountant, an integral, and a direct measurement."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from sfl_jax import codecs
from sfl_jax.errors import BadInput

# (sigma, messages, delta, ε): dp-accounting 0.6.0,
# PLDAccountant(value_discretization_interval=1e-4).compose(GaussianDpEvent(sigma / 2), messages)
ACCOUNTANT = [
    (1, 1, 1e-5, 9.99725615024243),
    (4, 10, 1e-5, 7.511275904062699),
    (20, 100, 1e-6, 4.886554124377032),
    (50, 300, 1e-5, 2.875925372969417),
    (8, 1, 1e-3, 0.5920067218930314),
    (100, 1000, 1e-7, 3.218208882374871),
]


@pytest.mark.parametrize(("sigma", "messages", "delta", "expected"), ACCOUNTANT)
def test_epsilon_is_the_accountants(sigma, messages, delta, expected):
    found = codecs.epsilon(sigma, messages, delta)
    assert found == pytest.approx(expected, rel=1e-6)
    assert codecs.Gaussian(3.0, sigma).epsilon(messages, delta) == found
    # If a sample is left out instead of replaced, the difference is C, not 2C.
    assert codecs.epsilon(2 * sigma, messages, delta) < 0.7 * expected


@pytest.mark.parametrize(("sigma", "messages", "delta"), [case[:3] for case in ACCOUNTANT])
def test_delta_is_the_integral_over_all_messages(sigma, messages, delta):
    """δ = ∫ max(0, p - exp(ε) q) for N messages along the line between two opposite samples of norm C = 1."""
    eps = codecs.epsilon(sigma, messages, delta)
    noise = sigma / math.sqrt(messages)  # for the mean of N messages, which contains all their information

    def more(y):
        return max(0.0, stats.norm.pdf(y, 1, noise) - math.exp(eps) * stats.norm.pdf(y, -1, noise))

    first = eps * noise**2 / 2  # the point where both are equal
    found, _ = integrate.quad(more, first, first + 12 * noise + 2, epsabs=delta * 1e-9, limit=500)
    assert found == pytest.approx(delta, rel=1e-5)


def test_the_codec_is_as_private_as_it_says():
    """Counts how much likelier a sample's messages are than those of the worst other sample."""
    codec, many = codecs.Gaussian(2.0, 3.0), 400_000
    ones = jnp.full((many, 1), 1e9, jnp.float32)
    here, there = (
        np.asarray(codec.transmit(sign * ones, jax.random.key(seed))) for seed, sign in ((0, 1), (1, -1))
    )
    for eps in (0.1, 0.5):
        from_here = eps * 3.0**2 * 2.0**2 / (2 * 2.0)
        delta = np.mean(here > from_here) - math.exp(eps) * np.mean(there > from_here)
        assert codec.epsilon(1, float(delta)) == pytest.approx(eps, abs=0.03)


def test_epsilon_at_its_ends():
    assert codecs.epsilon(1.0, 0, 1e-5) == 0
    assert codecs.epsilon(0, 1, 1e-5) == math.inf
    assert codecs.epsilon(1e9, 1, 1e-5) == 0
    assert 1e12 < codecs.epsilon(1e-3, 10**6, 1e-300) < 1e13
    assert codecs.epsilon(6.0, 9, 1e-5) == pytest.approx(codecs.epsilon(2.0, 1, 1e-5), rel=1e-9)


def test_epsilon_falls_with_noise_and_delta_and_rises_with_messages():
    by_noise = [codecs.epsilon(sigma, 10, 1e-5) for sigma in (1, 2, 4, 8, 16, 1e3)]
    by_delta = [codecs.epsilon(4, 10, delta) for delta in (1e-12, 1e-9, 1e-3, 0.1)]
    by_messages = [codecs.epsilon(4, messages, 1e-5) for messages in (100, 10, 2, 1, 0)]
    for found in (by_noise, by_delta, by_messages):
        assert all(a > b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ((-1.0, 1, 0.1), "sigma=-1.0: must be at least 0 and finite"),
        ((math.nan, 1, 0.1), "sigma=nan: must be at least 0 and finite"),
        ((1.0, -1, 0.1), "messages=-1: must be at least 0"),
        ((1.0, 1, 0.0), "delta=0.0: must be above 0 and below 1"),
        ((1.0, 1, 1.0), "delta=1.0: must be above 0 and below 1"),
    ],
)
def test_others_are_refused(given, line):
    with pytest.raises(BadInput) as caught:
        codecs.epsilon(*given)
    assert str(caught.value) == line
