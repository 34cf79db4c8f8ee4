"""--compute_dtype=bfloat16: products and activations are narrow; what is kept, updated or summed is not."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import rounds
from jax.extend import core

from sfl_jax import models
from sfl_jax.federated.packing import PackedVariables
from sfl_jax.federated.round import Model, run_round, start_model, sum_of_sessions
from sfl_jax.federated.session import batch_loss

NARROW, WIDE = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
KEY, RATE = jax.random.key(3), jnp.asarray(rounds.RATE)


def training(dtype, form="product", **changes):
    chain = models.create("efficientnetv2-tiny", dtype=dtype, layer_form=form)
    return dataclasses.replace(rounds.training(chain=chain), **changes)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                    yield from equations(getattr(inner, "jaxpr", inner))


def types_of_products(function, *arguments):
    """{types of both factors: the number of such products}."""
    products = ("dot_general", "conv_general_dilated")
    return Counter(
        tuple(factor.aval.dtype for factor in equation.invars)
        for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if equation.primitive.name in products
    )


def types(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("form", ["product", "conv"])
@pytest.mark.parametrize(("dtype", "arithmetic"), [(jnp.bfloat16, NARROW), (None, WIDE)])
def test_every_product_of_a_step_and_its_gradient_is_of_the_type_asked_for(dtype, arithmetic, form):
    variables, samples = rounds.start()
    images, labels = rounds.preprocess(samples.images[:4]), samples.labels[:4]

    def gradients(params):
        now = variables._replace(params=params)
        return jax.grad(
            lambda p: batch_loss(training(dtype, form), now._replace(params=p), images, labels, 3, KEY),
            has_aux=True,
        )(params)

    found = types_of_products(gradients, variables.params)
    assert set(found) == {(arithmetic, arithmetic)}
    assert found.total() > 3 * len(rounds.CHAIN)
    of_params, batch_stats = jax.eval_shape(gradients, variables.params)
    assert types((of_params, batch_stats)) == {WIDE}


def test_what_clients_keep_and_what_is_summed_is_float32():
    work = rounds.assignments()
    variables, samples = rounds.start()
    narrow = training(jnp.bfloat16, server_optimizer=optax.sgd(1.0, 0.5))
    arguments = (samples, work, KEY, RATE)
    total = functools.partial(sum_of_sessions, narrow, 3)
    sums, *_ = jax.eval_shape(total, PackedVariables.of(variables), *arguments)
    assert types(sums) == {WIDE}
    model, loss, _ = jax.eval_shape(
        functools.partial(run_round, narrow, 3, None), start_model(narrow, variables), *arguments
    )
    assert len(jax.tree.leaves(model.server_state)) > 0
    assert types((model, loss)) == {WIDE}
    found = types_of_products(total, PackedVariables.of(variables), *arguments)
    assert set(found) == {(NARROW, NARROW)}


@pytest.mark.slow
def test_a_mean_over_clients_keeps_what_bfloat16_would_round_away():
    """Clients without steps return exactly the float32 variables that they were given."""
    variables, samples = rounds.start()
    work = rounds.assignments(steps=0)
    run = jax.jit(functools.partial(run_round, training(jnp.bfloat16), 3, None))
    model, *_ = run(Model.of(variables), samples, work, KEY, RATE)
    assert rounds.difference(model.variables, variables) < 1e-6
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), variables)
    assert rounds.difference(rounded, variables) > 1e-3


@pytest.mark.slow
def test_a_round_in_bfloat16_is_near_that_in_float32_and_not_it():
    variables, samples = rounds.start()
    work = rounds.assignments(steps=1)
    narrow, wide = (
        jax.jit(functools.partial(run_round, training(dtype, "conv"), 3, None))(
            Model.of(variables), samples, work, KEY, RATE
        )[0].variables
        for dtype in (jnp.bfloat16, None)
    )

    def change(after):
        return np.concatenate(
            [np.ravel(a - b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(variables), strict=True)]
        )

    error = np.linalg.norm(change(narrow) - change(wide)) / np.linalg.norm(change(wide))
    print(f"\nchange of a round, relative: {error:.1e}")
    assert 1e-3 < error < 0.1
