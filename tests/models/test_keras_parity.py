"""Every variant against keras.applications: same variables and images, same numbers."""

import gc
import math

import finite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import keras_models
from models.keras_models import MINI, Passes

from sfl_jax import models
from sfl_jax.models import keras_weights

EXACT = 1e-9  # float64 logits, relative
DEEP = 1e-7  # training in float64: batch norm of 1x1 images amplifies rounding unit by unit
NEGLIGIBLE = 1e-4  # a gradient this much smaller than all others is rounding of 0: batch norm cancels a bias
VARIANTS = [f"efficientnetv2-{name}" for name in ("b0", "b1", "b2", "b3", "s", "m", "l")]
LARGE = VARIANTS[4:]  # gradients fit in memory only with eager Keras and a chain of products
WITHOUT_GRADIENTS = [f"efficientnetv2-{name}" for name in ("b1", "b2", "m", "l")]


@pytest.fixture
def give_memory_back(name):
    """Programs of the large variants take gigabytes, and the next test cannot use them."""
    yield
    if name in LARGE:
        jax.clear_caches()
        gc.collect()


def chain_of(model, name, form="conv"):
    """(chain that drops nothing, imported variables, input scaling)."""
    channels, classes = model.input_shape[-1], model.output_shape[-1]
    with keras_models.mini_variant():
        chain = models.create(name, classes, channels, layer_form=form, drop_rate_scale=0)
    fresh = chain.init(jax.random.key(0), jnp.zeros((1, 32, 32, channels)))
    wide = jax.tree.map(lambda x: x.astype(jnp.result_type(float)), fresh)
    imported = keras_weights.load(model, name, chain, wide)
    return chain, imported.variables, imported.scaling


def scaled(images, scaling):
    return images / jnp.asarray(scaling.divisor) + jnp.asarray(scaling.offset)


def passes(chain, variables, images, direction, backward=True, large=False):
    """large: compiles with few optimisations, which takes less memory: 6 GB for L, with eager Keras."""

    def run(variables):
        def loss(params):
            logits, updated = chain.apply(variables._replace(params=params), images, True, jax.random.key(0))
            return (logits * direction).sum(), (logits, updated.batch_stats)

        inference, _ = chain.apply(variables, images)
        if backward:
            gradients, (training, batch_stats) = jax.grad(loss, has_aux=True)(variables.params)
        else:  # placeholders of the same shapes
            gradients, (_, (training, batch_stats)) = variables.params, loss(variables.params)
        return Passes(inference, training, batch_stats, gradients)

    result = keras_models.compiled(run, variables) if large else jax.jit(run)(variables)
    places, values = keras_weights.to_keras(chain, models.Variables(result.gradients, result.batch_stats))
    named = {
        f"{place.layer}/{place.name.removeprefix('depthwise_')}": value
        for place, value in zip(places, values, strict=True)
    }
    stats = {name: value for name, value in named.items() if "/moving_" in name}
    gradients = {name: value for name, value in named.items() if backward and name not in stats}
    return result._replace(gradients=gradients, batch_stats=stats)


def distance(actual, expected, floor=0.0):
    [(actual, expected)] = finite.pairs(actual, expected)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), floor))


def errors(actual, expected):
    """The largest relative error of each part; for statistics and gradients over each variable."""
    stats = {name: value for name, value in expected.batch_stats.items() if "/moving_" in name}
    assert set(actual.batch_stats) == set(stats)
    assert set(actual.gradients) == set(expected.gradients)
    total = np.sqrt(sum(np.linalg.norm(value) ** 2 for value in expected.gradients.values()))
    return Passes(
        distance(actual.inference, expected.inference),
        distance(actual.training, expected.training),
        max(distance(actual.batch_stats[name], value) for name, value in stats.items()),
        max(
            distance(actual.gradients[name], value, floor=NEGLIGIBLE * total)
            for name, value in expected.gradients.items()
        )
        if expected.gradients
        else 0.0,
    )


@pytest.mark.parametrize("part", ["inference", "training", "batch_stats", "gradients"])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_the_comparison_refuses_what_is_not_finite(part, name):
    def passes(number):
        named = {f"{place}/moving_mean": np.ones(2) for place in "abc"}
        arrays = {key: np.ones(2) for key in ("inference", "training")}
        parts = arrays | {"batch_stats": named, "gradients": dict(named)}
        if part in arrays:
            return Passes(**parts | {part: np.array([1.0, number])})
        parts[part][f"{name}/moving_mean"] = np.array([1.0, number])
        return Passes(**parts)

    assert max(errors(passes(1.0), passes(1.0))) == 0
    for a, b in ((math.nan, 1.0), (1.0, math.nan), (math.inf, math.inf)):
        with pytest.raises(AssertionError, match="not finite"):
            errors(passes(a), passes(b))


def check(name, size, form="conv", backward=True):
    with keras_models.precision("float64"):
        model = keras_models.make(name, size)
        chain, variables, scaling = chain_of(model, name, form)
        # If the last images are 1x1, batch norm needs a larger batch.
        pixels, direction = keras_models.batch(size, count=4 if size == 32 else 2)
        images = scaled(pixels, scaling)
        large = name in LARGE
        expected = keras_models.passes(model, images, direction, large, backward)
        found = errors(passes(chain, variables, images, direction, backward, large), expected)
    print(f"\n{name} {size}x{size} {form} " + " ".join(f"{error:.1e}" for error in found))
    assert found.inference <= EXACT
    assert max(found) <= DEEP


@pytest.mark.slow
@pytest.mark.parametrize(("size", "form"), [(33, "product"), (32, "conv"), (45, "conv")])
def test_every_kind_of_unit_is_keras(size, form):
    check(MINI, size, form)


@pytest.mark.slow
@pytest.mark.usefixtures("give_memory_back")
@pytest.mark.parametrize("name", VARIANTS)
def test_training_and_inference_are_keras(name):
    """Odd sizes are checked at b0, for every kind of unit, and by float32 logits of all variants. Gradients
    are checked for every kind of unit, at both ends of the B family, and at S. The other variants have only
    more and wider units.
    """
    check(name, 32, "product" if name in LARGE else "conv", backward=name not in WITHOUT_GRADIENTS)


@pytest.mark.slow
def test_the_product_form_of_b0_is_keras():
    check("efficientnetv2-b0", 33, "product")


@pytest.mark.usefixtures("give_memory_back")
@pytest.mark.parametrize("name", [MINI, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)])
def test_float32_logits_are_keras_with_the_scaling_that_keras_does_inside(name):
    with keras_models.precision("float32"):
        model = keras_models.make(name, 45, include_preprocessing=True)
        chain, variables, scaling = chain_of(model, name)
        pixels, _ = keras_models.batch(45)
        logits = keras_models.compiled(lambda v: chain.apply(v, scaled(pixels, scaling))[0], variables)
        found = distance(logits, keras_models.inference(model, pixels))
    print(f"\n{name} float32 {found:.1e}")
    assert found <= 1e-4


def _bn(unit, scale, bias):
    return unit | {"params": unit["params"] | {"bn": {"scale": scale, "bias": bias}}}


def _statistics(unit, mean, var):
    return unit | {"batch_stats": {"bn": {"mean": mean, "var": var}}}


def _kernel(unit, change):
    return unit | {"params": unit["params"] | {"conv": {"kernel": change(unit["params"]["conv"]["kernel"])}}}


MUTATIONS = {
    "statistics swapped": lambda unit, bn, stats: _statistics(unit, stats["var"], stats["mean"] ** 2),
    "scale and bias swapped": lambda unit, bn, stats: _bn(unit, bn["bias"], bn["scale"]),
    "kernel transposed": lambda unit, bn, stats: _kernel(unit, lambda kernel: kernel.swapaxes(0, 1)),
    "kernel flipped": lambda unit, bn, stats: _kernel(unit, lambda kernel: kernel[::-1]),
    "nothing": lambda unit, bn, stats: unit,
}


@pytest.mark.slow
def test_variables_that_are_mixed_up_in_one_unit_are_another_network():
    with keras_models.precision("float64"):
        model = keras_models.make(MINI, 33)
        chain, variables, scaling = chain_of(model, MINI)
        images = scaled(keras_models.batch(33)[0], scaling)
        expected = keras_models.inference(model, images)
        stem, front, back = chain.unit_variables(variables, 0), *chain.split_variables(variables, 1)
        run = jax.jit(lambda v: chain.apply(v, images)[0])
        for name, mutate in MUTATIONS.items():
            unit = mutate(stem, stem["params"]["bn"], stem["batch_stats"]["bn"])
            mutated = front._replace(params=(unit["params"],), batch_stats=(unit["batch_stats"],))
            found = distance(run(chain.join_variables(mutated, back)), expected)
            assert found <= EXACT if name == "nothing" else found > 1e-4, name
