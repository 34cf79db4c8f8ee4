"""EfficientNetV2 of keras.applications with random variables: the oracle of the chains' tests."""

import contextlib
from typing import Any, NamedTuple
from unittest import mock

import compiling
import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras.src.applications import efficientnet_v2 as keras_source
from keras.src.backend.common import dtypes

from sfl_jax import registry
from sfl_jax.models import efficientnet_v2

MINI = "efficientnetv2-mini"  # the stages of tiny below Keras' head: every kind of unit, quick to compile


class Passes(NamedTuple):
    """The results of a batch: logits in inference and in training, and from training the updated
    batch-norm statistics and the gradients of `sum(logits * direction)`. In the end by Keras' names.
    """

    inference: Any
    training: Any
    batch_stats: Any
    gradients: Any


@contextlib.contextmanager
def precision(dtype):
    """Sets Keras and JAX both to float32 or both to float64, and keeps Keras from narrowing float64."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    narrowing = {} if dtype == "float64" else dtypes.BIT64_TO_BIT32_DTYPE
    try:
        with jax.enable_x64(dtype == "float64"), mock.patch.object(dtypes, "BIT64_TO_BIT32_DTYPE", narrowing):
            yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


@contextlib.contextmanager
def mini_variant():
    """In this context `models.create` knows MINI."""
    variant = efficientnet_v2.VARIANTS["efficientnetv2-tiny"]._replace(head_channels=1280)
    known = mock.patch.dict(registry.NETWORKS._members, {MINI: efficientnet_v2.units})
    with mock.patch.dict(efficientnet_v2.VARIANTS, {MINI: variant}), known:
        yield


def make(variant, /, size=32, channels=3, classes=10, **options):
    """A model that drops nothing. All variables are random, so that a swap of two is noticed."""
    options = {"include_preprocessing": False, "classifier_activation": None} | options
    options |= {"weights": None, "input_shape": (size, size, channels), "classes": classes}
    with mock.patch.object(keras.initializers.VarianceScaling, "__call__", _zeros):
        if variant == MINI:
            model = keras_source.EfficientNetV2(1.0, 1.0, size, blocks_args=_mini_blocks(), **options)
        else:
            letter = variant.removeprefix("efficientnetv2-").upper()
            model = getattr(keras.applications, f"EfficientNetV2{letter}")(**options)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    randomise(model)
    return model


def randomise(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        else:
            fan_in = np.prod(weight.shape[:-1]) if weight.name == "kernel" else 100
            weight.assign(rng.normal(size=weight.shape) / np.sqrt(fan_in))


def passes(model, images, direction, eagerly=False, backward=True):
    """backward: whether to compute gradients.

    eagerly: runs one operation at a time, without compiling. XLA:CPU makes the gradient of a depthwise kernel
    dense, (C, C); compiled, those of L took 38 GB together.
    """
    trainable, others = ([v.value for v in vs] for vs in _variables(model))

    def run(trainable, others):
        def loss(trainable):
            logits, updated = model.stateless_call(trainable, others, images, training=True)
            return (logits * direction).sum(), (logits, updated)

        inference, _ = model.stateless_call(trainable, others, images, training=False)
        if backward:
            gradients, (training, updated) = jax.grad(loss, has_aux=True)(trainable)
        else:
            gradients, (_, (training, updated)) = [], loss(trainable)
        return Passes(inference, training, updated, gradients)

    # Optimised: XLA:CPU has no fast convolution in float64, and without optimisations it is slower still.
    result = run(trainable, others) if eagerly else jax.jit(run)(trainable, others)
    named = [
        {variable.path: value for variable, value in zip(vs, values, strict=True)} if values else {}
        for vs, values in zip(_variables(model), (result.gradients, result.batch_stats), strict=True)
    ]
    return result._replace(gradients=named[0], batch_stats=named[1])


def inference(model, images):
    values = [[v.value for v in vs] for vs in _variables(model)]
    return compiled(lambda a, b: model.stateless_call(a, b, images, training=False)[0], *values)


def compiled(function, *arguments):
    """Compiles faster than by default, and runs."""
    return jax.jit(function).lower(*arguments).compile(compiler_options=compiling.FAST)(*arguments)


def batch(size, channels=3, count=4, classes=10):
    """(pixels, a direction for the logits)."""
    rng = np.random.default_rng(size)
    pixels = rng.integers(0, 256, (count, size, size, channels))
    return jnp.asarray(pixels, float), jnp.asarray(rng.normal(size=(count, classes)))


def _variables(model):
    return model.trainable_variables, model.non_trainable_variables


def _zeros(_, shape, dtype=None, **__):
    return jnp.zeros(shape, dtype)


def _mini_blocks():
    stages = efficientnet_v2.VARIANTS["efficientnetv2-tiny"].stages
    return [
        {
            "kernel_size": stage.kernel_size, "num_repeat": stage.repeats, "strides": stage.stride,
            "input_filters": stage.in_channels, "output_filters": stage.out_channels,
            "expand_ratio": stage.expansion, "se_ratio": stage.squeeze_excite,
            "conv_type": 0 if stage.squeeze_excite else 1,
        }
        for stage in stages
    ]  # fmt: skip
