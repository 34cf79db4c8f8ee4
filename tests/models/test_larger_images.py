"""Both forms of the layers give the same outputs and gradient on images larger than MNIST's."""

import functools

import finite
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfl_jax import models
from sfl_jax.models import layers

B0 = "efficientnetv2-b0"
# Largest relative errors by norm in float32: of the logits, and of all gradients together. With images of
# 64x64, B0 ends in two images of 2x2, and batch norm over few numbers amplifies rounding: 9e-5 was seen.
CLOSE = (1e-4, 1e-3)


def case(name, size, form):
    """(chain, variables, images)."""
    chain = models.create(name, layer_form=form, drop_rate_scale=0)
    images = jnp.asarray(np.random.default_rng(size).normal(size=(2, size, size, 1)), jnp.float32)
    return chain, chain.init(jax.random.key(0), images), images


def step(chain, variables, images):
    """(logits, gradients of every parameter) of a training step."""

    def loss_of(params):
        logits, _ = chain.apply(variables._replace(params=params), images, True, jax.random.key(1))
        return -jax.nn.log_softmax(logits)[:, 3].mean(), logits

    gradients, logits = jax.grad(loss_of, has_aux=True)(variables.params)
    return logits, gradients


def distance(tree, other):
    pairs = finite.pairs(tree, other)
    a, b = (np.concatenate([np.ravel(x) for x in side]) for side in zip(*pairs, strict=True))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("efficientnetv2-tiny", 64), ("efficientnetv2-tiny", 224), (B0, 224)]
)
def test_both_forms_agree_and_need_memory_of_one_order(name, size):
    results, needed_bytes = {}, {}
    for form in layers.FORMS:
        chain, variables, images = case(name, size, form)
        run = jax.jit(functools.partial(step, chain)).lower(variables, images).compile()
        needed_bytes[form] = run.memory_analysis().temp_size_in_bytes
        results[form] = run(variables, images)
    errors = [distance(*pair) for pair in zip(results["product"], results["conv"], strict=True)]
    print(f"\n{name} {size}x{size}, logits and gradients: " + " ".join(f"{error:.1e}" for error in errors))
    print("MB: " + ", ".join(f"{form} {needed / 1e6:.0f}" for form, needed in needed_bytes.items()))
    assert all(error <= close for error, close in zip(errors, CLOSE, strict=True))
    # The patches of a 3x3 convolution are nine times its input; not all layers' patches exist at once.
    assert needed_bytes["product"] < 3 * needed_bytes["conv"]
    mirrored = run(variables, images[:, ::-1])
    assert min(distance(*pair) for pair in zip(mirrored, results["conv"], strict=True)) > 10 * max(CLOSE)
