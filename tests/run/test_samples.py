"""Samples that are not images: tokens and series, from arrays to a trained model."""

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn

import sfl_jax as sfl
from sfl_jax.errors import BadInput
from sfl_jax.models import profile

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 120)
TOKENS = RNG.integers(0, 6, (120, 7)) + 6 * LABELS[:, None]  # each class has its own words
SERIES = (
    np.cumsum(RNG.normal(size=(120, 9, 2)) + LABELS[:, None, None] - 1, 1) / 3
)  # which rise, fall or stay


class Words(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(18, 8)(x)


class Filters(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(8, (3,))(x))


class Mean(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.mean(1)


def run_of(samples, *first, **changes):
    data = sfl.datasets.from_arrays(samples[:90], LABELS[:90], samples[90:], LABELS[90:])
    parts = {
        "chain": sfl.Chain([*first, Mean(), nn.Dense(3)]), "data": data, "fleet": sfl.fleet.random_fleet(3),
        "optimizer": optax.adam(0.05), "planner": sfl.Planner(server_flops=1e9), "batch_size": 10,
        "execution": sfl.Execution("auto", 3, "vmap"),
    }  # fmt: skip
    return sfl.Run(**parts | changes)


@pytest.mark.parametrize(
    ("samples", "first", "bits"),
    [
        (TOKENS, Words(), 32),
        pytest.param(TOKENS.astype(np.uint16), Words(), 32, marks=pytest.mark.slow),  # kept as int32
        pytest.param(SERIES.astype(np.float32), Filters(), 32, marks=pytest.mark.slow),
        pytest.param(SERIES, Filters(), 64, marks=pytest.mark.slow),
        (SERIES.astype(ml_dtypes.bfloat16), Filters(), 16),
    ],
)
def test_it_learns_and_counts_the_bits_of_what_is_stored(samples, first, bits):
    run = run_of(samples, first)
    lines = list(run.rounds(3))
    assert lines[-1].train_loss < 0.8 * lines[0].train_loss
    assert (lines[-1].test_accuracy or 0) > 0.6
    raw, labels = run.parts.terms.up_bits[0], 32
    assert raw == samples[0].size * bits + labels
    logits = run.predict(samples[90:])  # the given type
    assert run.evaluate().accuracy == pytest.approx((logits.argmax(1) == LABELS[90:]).mean())
    with pytest.raises(BadInput, match=r"^images: of shape \(30,\); must be \(N, "):
        run.predict(samples[90:, 0, ...].reshape(30, -1)[:, 0])


def test_the_same_numbers_cost_and_learn_the_same_in_both_forms():
    forms = [
        [
            line.train_loss
            for line in run_of(TOKENS, Words(), execution=sfl.Execution(form, 3, "vmap")).rounds(2)
        ]
        for form in ("conv", "product")
    ]
    np.testing.assert_allclose(*forms, rtol=1e-5)
    words = profile(sfl.Chain([Words(), Mean(), nn.Dense(3)]), jax.ShapeDtypeStruct((7,), np.int32))
    assert words.smashed.tolist() == [7, 56, 8, 0]
    assert words.parameters.tolist() == [18 * 8, 0, 8 * 3 + 3]
    assert words.backward_macs.tolist() == [0, 0, 48]


@pytest.mark.slow
def test_a_whole_module_of_tokens_is_cut_by_itself():
    whole = nn.Sequential([nn.Embed(18, 8), lambda x: x.mean(1), nn.Dense(8), nn.relu, nn.Dense(3)])
    chain = sfl.Chain.from_module(whole, TOKENS[:2].astype(np.int32))
    assert len(chain) == 3
    lines = list(run_of(TOKENS, chain=chain).rounds(2))
    assert lines[1].train_loss < lines[0].train_loss


def test_grey_images_are_predicted_as_they_were_given():
    grey = RNG.integers(0, 256, (120, 4, 5), np.uint8)
    run = run_of(grey, nn.Conv(4, (3, 3)), Mean())
    np.testing.assert_array_equal(run.predict(grey[:5]), run.predict(grey[:5, ..., None]))
    with pytest.raises(BadInput, match=r"^images: of float32; must be uint8$"):
        run.predict(grey[..., None].astype(np.float32))
