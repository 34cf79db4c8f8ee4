"""Which optimisers may get joined leaves: none that looks at a leaf's norm, shape or name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfl_jax.federated.elementwise import may_join
from sfl_jax.federated.packing import pack

UNIT = {"conv": {"kernel": np.ones((3, 3, 1, 4), np.float32)}, "bn": {"scale": np.ones(4, np.float32)}}
LARGE = {"dense": {"kernel": np.ones((130, 140), np.float32), "bias": np.ones(140, np.float32)}}
UNITS = (UNIT, LARGE, {}, UNIT)


def by_path(has):
    """A mask for the leaves whose path `has` accepts."""
    return lambda params: jax.tree.map_with_path(lambda path, _: has(jax.tree_util.keystr(path)), params)


def by_axes(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


ALIKE = {
    "sgd": optax.sgd(0.1),
    "nesterov": optax.sgd(0.1, 0.9, nesterov=True),
    "adam": optax.adam(1e-3),
    "adamw with a schedule": optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-3, 10, 100)),
    "injected": optax.inject_hyperparams(optax.adamw)(1e-3),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
    "adagrad": optax.adagrad(0.1),
    "yogi": optax.yogi(0.1),
    "clipped number by number": optax.chain(optax.clip(1.0), optax.sgd(0.1)),
    "a mask of all": optax.adamw(1e-3, mask=by_path(lambda path: "nothing" not in path)),
}
BY_LEAF = {
    "lars": optax.lars(0.1),
    "lamb": optax.lamb(0.1),
    "adafactor": optax.adafactor(0.1),
    "clipped by block": optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)),
    "clipped by unit": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "clipped by the global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "a mask by axes": optax.adamw(1e-3, mask=by_axes),
    "a mask by name": optax.adamw(1e-3, mask=by_path(lambda path: "scale" not in path)),
    "a mask that asks for keys": optax.adamw(
        1e-3, mask=lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key != "nothing", params)
    ),
    "a mask by unit": optax.masked(optax.sgd(0.1), by_path(lambda path: path.startswith("[0]"))),
    "a mask of a small leaf": optax.adamw(1e-3, mask=by_path(lambda path: "dense']['bias" not in path)),
    "only where all is finite": optax.apply_if_finite(optax.sgd(0.1), 3),
}  # fmt: skip


def starting_from(function):
    """SGD that adds `function` of the first parameters."""

    def init(params):
        return jax.tree.map(function, params)

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, s: -u - s, updates, state), state

    return optax.GradientTransformation(init, update)


def stateless(function):
    """`function` of each update and its parameter."""
    return optax.stateless(lambda updates, params: jax.tree.map(function, updates, params))


def times(numbers):
    """Minus the updates times numbers that depend on the leaf."""
    return stateless(lambda u, p: -u * numbers(u).reshape(u.shape).astype(u.dtype))


@optax.stateless
def exchanged(updates, params):
    """The updates, with those of the first leaf and of the last leaf of its shape exchanged."""
    leaves, structure = jax.tree.flatten(updates)
    last = max(index for index, leaf in enumerate(leaves) if leaf.shape == leaves[0].shape)
    leaves[0], leaves[last] = leaves[last], leaves[0]
    return jax.tree.unflatten(structure, leaves)


FIRST_LEAF = optax.stateless(lambda updates, params: [x + jax.tree.leaves(updates)[0].sum() for x in updates])
CRAFTED = {
    "of the first parameters": (starting_from(lambda p: 0.1 * p), True),
    "of their mean": (starting_from(lambda p: jnp.full_like(p, p.mean())), False),
    "zeros or ones by size": (starting_from(lambda p: jnp.full_like(p, p.size > 10)), False),
    "by size": (times(lambda u: jnp.full(u.size, float(u.size))), False),
    "by place": (times(lambda u: jnp.arange(u.size)), False),
    "by row": (stateless(lambda u, p: -u * jnp.cumsum(jnp.ones_like(u), axis=0)), False),
    "by a table": (times(lambda u: jnp.asarray(np.linspace(0, 1, u.size))), False),
    "sorted": (stateless(lambda u, p: -jnp.sort(u, axis=None).reshape(u.shape)), False),
    "the neighbour's": (stateless(lambda u, p: -jnp.roll(u, 1)), False),
    "the first number's": (stateless(lambda u, p: jnp.full_like(u, u.reshape(-1)[0])), False),
    "the first leaf's": (FIRST_LEAF, False),
    "another leaf's": (exchanged, False),
    "where": (stateless(lambda u, p: jnp.where(p > 0, -u, u)), True),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_treats_all_numbers_alike_may_join_them(name):
    assert may_join(ALIKE[name], pack(UNITS).layouts)


@pytest.mark.parametrize("name", BY_LEAF)
def test_what_looks_at_a_leaf_may_not(name):
    assert not may_join(BY_LEAF[name], pack(UNITS).layouts)


@pytest.mark.parametrize("name", CRAFTED)
def test_every_way_to_tell_numbers_apart_is_seen(name):
    transformation, alike = CRAFTED[name]
    assert may_join(transformation, pack(UNITS).layouts) == alike


def test_a_place_counts_although_all_leaves_are_of_one_shape():
    units = ({"a": np.ones(3, np.float32)}, {"a": np.ones(3, np.float32)})
    assert may_join(optax.sgd(0.1), pack(units).layouts)
    assert not may_join(times(lambda u: jnp.arange(3)), pack(units).layouts)


def test_leaves_of_other_types_are_joined_apart():
    mixed = ({"a": np.ones(3, np.float32), "b": np.ones(3, jnp.bfloat16), "c": np.ones(2, np.float32)},)
    by_type = stateless(lambda u, p: -u * (1 if u.dtype == jnp.float32 else 2))
    assert may_join(by_type, pack(mixed).layouts)
    assert may_join(optax.adam(1e-3), pack(mixed).layouts)
    by_name = optax.adamw(1e-3, mask=by_path(lambda path: "c" not in path))
    assert not may_join(by_name, pack(mixed).layouts)
