import functools
from typing import Any, NamedTuple

import finite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from jax.flatten_util import ravel_pytree

from sfl_jax import models
from sfl_jax.models import Chain, Variables, efficientnet_v2, layers, units

TOLERANCE = {False: 1e-5, True: 1e-10}  # by x64
KEY = jax.random.key(11)
EVERY_CUT = range(9)  # of efficientnetv2-tiny


class Case(NamedTuple):
    """A chain that drops often, in the conv form (it compiles fastest); its variables and a batch."""

    chain: Chain
    variables: Variables
    images: jax.Array
    labels: jax.Array


class Pass(NamedTuple):
    """The results of training on a batch; the last two have one pytree per unit."""

    loss: jax.Array
    logits: jax.Array
    batch_stats: tuple[Any, ...]
    gradients: tuple[Any, ...]


def create(name, **options):
    chain = models.create(name, **options)
    *blocks, classifier = [
        unit.clone(survival=0.5) if hasattr(unit, "survival") else unit for unit in chain.units
    ]
    return Chain((*blocks, classifier.clone(dropout=0.5)))


@functools.cache
def make_case(name, size, batch, x64, form="conv"):
    rng = np.random.default_rng(3)
    dtype = np.float64 if x64 else np.float32
    images, labels = rng.normal(size=(batch, size, size, 1)).astype(dtype), rng.integers(0, 10, batch)
    with jax.enable_x64(x64):
        chain = create(name, layer_form=form)
        variables = chain.init(jax.random.key(0), jnp.asarray(images))
        # Not the initial ones and zeros: with those, swapped scales or biases would not be noticed.
        noisy = jax.tree.map(lambda x: jnp.asarray(x + rng.uniform(0, 0.1, x.shape), dtype), variables)
        return Case(chain, noisy, jnp.asarray(images), jnp.asarray(labels))


def cross_entropy(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()


@jax.custom_vjp
def scaled(x):
    """A codec that is not the identity, and whose gradient is not its derivative."""
    return 0.5 * x


scaled.defvjp(lambda x: (0.5 * x, None), lambda _, gradient: (2.0 * gradient,))


def whole_pass(case, key=KEY, linked_cut=None):
    def at_boundary(unit, x):
        return scaled(x) if unit == linked_cut else x

    def loss_of(params):
        variables = case.variables._replace(params=params)
        logits, updated = case.chain.apply(variables, case.images, True, key, at_boundary)
        return cross_entropy(logits, case.labels), (logits, updated.batch_stats)

    (loss, (logits, stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(case.variables.params)
    return Pass(loss, logits, stats, gradients)


def pass_in_halves(case, cut, client_key=KEY, server_key=KEY, shift=0, up=1.0, down=1.0):
    """Client forward, server forward and backward, client backward. The smashed data are multiplied by `up`,
    their gradient by `down`.
    """
    client, server = case.chain.split(cut)
    server = Chain(server.units, server.first_unit + shift)
    front, back = case.chain.split_variables(case.variables, cut)

    def client_half(params):
        return client.apply(front._replace(params=params), case.images, True, client_key)

    def server_loss(params, smashed):
        logits, updated = server.apply(back._replace(params=params), smashed, True, server_key)
        return cross_entropy(logits, case.labels), (logits, updated.batch_stats)

    smashed, pullback, updated = jax.vjp(client_half, front.params, has_aux=True)
    (loss, (logits, stats)), (server_gradients, of_smashed) = jax.value_and_grad(
        server_loss, argnums=(0, 1), has_aux=True
    )(back.params, up * smashed)
    (client_gradients,) = pullback(down * of_smashed)
    return Pass(loss, logits, updated.batch_stats + stats, client_gradients + server_gradients)


def distance(actual, expected):
    """The norm of the difference over the norm of the expected values."""
    finite.pairs(actual, expected)
    actual, expected = (ravel_pytree(tree)[0] for tree in (actual, expected))
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def assert_close(actual, expected, tolerance):
    """Compares loss and logits, then statistics and gradients unit by unit."""
    assert distance(actual[:2], expected[:2]) < tolerance
    for of_units, expected_of_units in zip(actual[2:], expected[2:], strict=True):
        for unit, pair in enumerate(zip(of_units, expected_of_units, strict=True)):
            assert distance(*pair) < tolerance, f"unit {unit}"


@functools.cache
def reference(name, size, batch, x64):
    with jax.enable_x64(x64):
        return whole_pass(make_case(name, size, batch, x64))


def check_cut(name, size, batch, cut, x64):
    with jax.enable_x64(x64):
        halves = pass_in_halves(make_case(name, size, batch, x64), cut)
        assert_close(halves, reference(name, size, batch, x64), TOLERANCE[x64])


def check_linked_cut(name, size, batch, cut, x64):
    """With a codec that is not the identity the cut and both directions matter."""
    with jax.enable_x64(x64):
        case = make_case(name, size, batch, x64)
        whole = whole_pass(case, linked_cut=cut)
        assert_close(pass_in_halves(case, cut, up=0.5, down=2.0), whole, TOLERANCE[x64])
        if cut == 0:  # the images have no gradient
            others = [reference(name, size, batch, x64), whole_pass(case, linked_cut=1)]
        else:
            others = [pass_in_halves(case, cut, up=up, down=down) for up, down in ((1.0, 2.0), (0.5, 1.0))]
        for other in others:
            assert distance(other.gradients[: cut or None], whole.gradients[: cut or None]) > 1e-2


@pytest.mark.parametrize("x64", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "x64"])
@pytest.mark.parametrize(
    "cut", [pytest.param(c, marks=() if c in (0, 3, 8) else pytest.mark.slow) for c in EVERY_CUT]
)
def test_client_then_server_is_the_whole_chain_at_every_cut_of_tiny(cut, x64):
    check_cut("efficientnetv2-tiny", 16, 8, cut, x64)


@pytest.mark.parametrize("x64", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "x64"])
@pytest.mark.parametrize(
    "cut", [0, 3, *(pytest.param(c, marks=pytest.mark.slow) for c in (1, 2, 4, 5, 6, 7))]
)
def test_a_link_at_every_cut_of_tiny_is_that_between_client_and_server(cut, x64):
    check_linked_cut("efficientnetv2-tiny", 16, 8, cut, x64)


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
@pytest.mark.parametrize("cut", [0, 1, 5, 10, 17, 22, 23, 24])
def test_client_then_server_is_the_whole_chain_at_cuts_of_b0(cut, x64):
    check_cut("efficientnetv2-b0", 16, 4, cut, x64)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 7, 17, 26, 42])
def test_client_then_server_is_the_whole_chain_at_cuts_of_s(cut):
    check_cut("efficientnetv2-s", 16, 4, cut, x64=True)


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("efficientnetv2-b0", 5),
        ("efficientnetv2-b0", 17),
        ("efficientnetv2-b0", 23),
        ("efficientnetv2-s", 17),
    ],
)
def test_a_link_at_cuts_of_b0_and_s_is_that_between_client_and_server(name, cut, x64):
    check_linked_cut(name, 16, 4, cut, x64)


@pytest.mark.parametrize("cut", [0, 3, 6])
@pytest.mark.parametrize("mutation", [{"server_key": jax.random.key(12)}, {"shift": 1}, {"client_key": KEY}])
def test_halves_with_other_randomness_are_another_network(cut, mutation):
    """A server half with another key or wrong unit numbers differs; with the same key it does not."""
    case = make_case("efficientnetv2-tiny", 16, 8, False)
    expected = reference("efficientnetv2-tiny", 16, 8, False)
    halves = pass_in_halves(case, cut, **mutation)
    differs = distance(halves.logits, expected.logits) > 1e-2
    assert differs == ("client_key" not in mutation)


@pytest.mark.parametrize(("number", "is_its_own"), [(7, True), (6, False), (8, False)])
def test_a_block_drops_what_its_number_in_the_network_says(number, is_its_own):
    """Unit 7 alone draws the same numbers as in a chain, where all units draw together."""
    block = efficientnet_v2.FusedMBConv(8, 8, 1, 3, 1, 0.5, name="block")
    chain = Chain((block.clone(survival=1.0), block), 6)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4, 4, 8)), jnp.float32)
    variables = chain.init(KEY, images)
    outputs, _ = chain.apply(variables, images, train=True, key=KEY)
    rngs, x = {"drop": jax.random.fold_in(KEY, number)}, images
    for unit, index in ((chain.units[0], 0), (block, 1)):
        own = chain.unit_variables(variables, index)
        x, _ = unit.apply(own, x, True, rngs=rngs, mutable=["batch_stats"])
    assert finite.are_close(outputs, x, atol=1e-5) == is_its_own


def test_a_client_half_draws_from_its_key_too():
    case = make_case("efficientnetv2-tiny", 16, 8, False)
    expected = reference("efficientnetv2-tiny", 16, 8, False)
    halves = pass_in_halves(case, 6, client_key=jax.random.key(12))
    assert distance(halves.logits, expected.logits) > 1e-2
    assert distance(halves.gradients[0], expected.gradients[0]) > 1e-2


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        case = make_case("efficientnetv2-tiny", 16, 8, True)
        flat, unravel = ravel_pytree(case.variables.params)
        direction = np.random.default_rng(0).normal(size=flat.shape) / np.sqrt(flat.size)

        def loss(step):
            variables = case.variables._replace(params=unravel(flat + step * direction))
            logits, _ = case.chain.apply(variables, case.images, True, KEY)
            return cross_entropy(logits, case.labels)

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        gradient = ravel_pytree(reference("efficientnetv2-tiny", 16, 8, True).gradients)[0]
        assert slope == pytest.approx(np.vdot(gradient, direction), rel=1e-5)


@pytest.mark.slow
def test_both_forms_of_the_chain_are_equal():
    with jax.enable_x64(True):
        case = make_case("efficientnetv2-tiny", 16, 8, True, form="product")
        product = jax.jit(lambda variables: whole_pass(case._replace(variables=variables)))(case.variables)
        assert_close(product, reference("efficientnetv2-tiny", 16, 8, True), 1e-10)


@pytest.mark.parametrize(("form", "convolves"), [("product", False), ("conv", True)])
def test_vmapped_products_leave_no_convolution_in_the_program(form, convolves):
    """With per-client weights a convolution would become a grouped one, which is slow everywhere."""
    case = make_case("efficientnetv2-tiny", 8, 2, False, form)
    clients = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), case.variables)
    step = jax.vmap(lambda variables: whole_pass(case._replace(variables=variables)))
    assert ("conv_general_dilated" in str(jax.make_jaxpr(step)(clients))) == convolves


def init(chain, key, shape=(1, 16, 16, 1)):
    return chain.init(jax.random.key(key), jnp.zeros(shape))


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_variables_follow_from_the_key_alone():
    chain = models.create("efficientnetv2-tiny")
    variables = init(chain, 5)
    assert_same(variables, init(chain, 5, shape=(3, 9, 7, 1)))
    assert_same(variables, init(models.create("efficientnetv2-tiny", layer_form="conv"), 5))
    kernels, others = (
        [leaf for path, leaf in jax.tree.leaves_with_path(init(chain, key)) if "kernel" in path[-1].key]
        for key in (5, 6)
    )
    draws = [np.asarray(kernel).ravel()[:8].tobytes() for kernel in kernels + others]
    assert len(set(draws)) == len(draws) == 2 * 18


def test_every_variable_starts_as_its_name_says():
    for path, leaf in jax.tree.leaves_with_path(init(models.create("efficientnetv2-tiny"), 5)):
        constant = {"bias": 0, "mean": 0, "scale": 1, "var": 1}.get(path[-1].key)
        assert leaf.dtype == jnp.float32
        assert np.unique(leaf).tolist() == [constant] if constant is not None else np.std(leaf) > 0


def test_a_unit_starts_the_same_whatever_the_other_units_are():
    """So a server half that is initialised alone equals the back half of the whole chain."""
    chain = models.create("efficientnetv2-tiny", in_channels=1)
    variables = init(chain, 5)
    other = init(models.create("efficientnetv2-tiny", in_channels=3, num_classes=7), 5, shape=(1, 16, 16, 3))
    assert_same(variables.params[1:-1], other.params[1:-1])
    _, server = chain.split(3)
    _, back = chain.split_variables(variables, 3)
    assert_same(init(server, 5, shape=(1, 4, 4, 16)), back)
    _, classifier = chain.split(7)
    assert_same(init(classifier, 5, shape=(1, 64)).params, variables.params[7:])


@pytest.mark.parametrize("cut", EVERY_CUT)
def test_split_and_join_go_round(cut):
    chain, variables, images, _ = make_case("efficientnetv2-tiny", 16, 8, False)
    client, server = chain.split(cut)
    assert (len(client), len(server)) == (cut, 8 - cut)
    assert (client.first_unit, server.first_unit) == (0, cut)
    assert client.units + server.units == chain.units
    front, back = chain.split_variables(variables, cut)
    assert (len(front.params), len(back.batch_stats)) == (cut, 8 - cut)
    joined = chain.join_variables(front, back)
    assert jax.tree.structure(joined) == jax.tree.structure(variables)
    assert_same(joined, variables)
    for index in range(8):
        half, of_half, place = (client, front, index) if index < cut else (server, back, index - cut)
        unit = chain.unit_variables(variables, index)
        assert set(unit) == {"params", "batch_stats"}
        assert_same(unit, half.unit_variables(of_half, place))
    if cut in (0, 8):
        empty, of_empty = (client, front) if cut == 0 else (server, back)
        outputs, updated = empty.apply(of_empty, images, True, KEY)
        assert outputs is images
        assert updated == Variables((), ())


def test_a_half_can_be_split_again():
    chain = models.create("efficientnetv2-tiny")
    _, server = chain.split(3)
    middle, end = server.split(2)
    assert (middle.first_unit, end.first_unit) == (3, 5)
    assert middle.units + end.units == chain.units[3:]


@pytest.mark.parametrize("cut", [-1, 9])
def test_cuts_outside_the_chain_are_refused(cut):
    chain, variables, *_ = make_case("efficientnetv2-tiny", 16, 8, False)
    for split in (chain.split, functools.partial(chain.split_variables, variables)):
        with pytest.raises(ValueError, match=rf"cut={cut}: must be in 0\.\.8"):
            split(cut)


def test_chains_are_equal_by_value_so_that_jit_knows_them_again():
    chain, same, other = (models.create("efficientnetv2-tiny", classes) for classes in (10, 10, 7))
    assert chain == same
    assert hash(chain) == hash(same)
    assert chain != other
    assert chain.split(1)[1] != Chain(chain.units[1:], 0)


def test_evaluation_needs_no_key_and_changes_no_statistics():
    chain, variables, images, _ = make_case("efficientnetv2-tiny", 16, 8, False)
    logits, updated = chain.apply(variables, images)
    assert logits.shape == (8, 10)
    assert_same(updated, variables)
    np.testing.assert_array_equal(logits, chain.apply(variables, images, key=KEY)[0])
    one_by_one = jnp.concatenate([chain.apply(variables, images[i : i + 1])[0] for i in range(8)])
    np.testing.assert_allclose(logits, one_by_one, rtol=1e-4, atol=1e-5)


def test_training_without_a_key_is_refused():
    chain, variables, images, _ = make_case("efficientnetv2-tiny", 16, 8, False)
    with pytest.raises(InvalidRngError):
        chain.apply(variables, images, train=True)


@pytest.mark.parametrize("cut", [0, 4, 8])
def test_what_enters_a_unit_can_be_changed_at_its_boundary(cut):
    chain, variables, images, _ = make_case("efficientnetv2-tiny", 16, 8, False)
    client, server = chain.split(cut)
    front, back = chain.split_variables(variables, cut)
    visited = []

    def halve(index, x):
        visited.append((index, x.shape))
        return x / 2 if index == cut else x

    linked, _ = chain.apply(variables, images, at_boundary=halve)
    assert [index for index, _ in visited] == list(range(8))
    assert visited[0][1] == images.shape
    smashed, _ = client.apply(front, images)
    expected, _ = server.apply(back, smashed / 2 if cut < 8 else smashed)
    np.testing.assert_allclose(linked, expected, rtol=1e-5, atol=1e-6)
    plain, _ = chain.apply(variables, images)
    assert (distance(linked, plain) > 1e-3) == (cut < 8)
    visited.clear()
    server.apply(back, smashed, at_boundary=halve)
    assert [index for index, _ in visited] == list(range(cut, 8))


@pytest.mark.parametrize(
    ("dtype", "x64", "logits", "kept"),
    [
        (None, False, jnp.float32, jnp.float32),
        (jnp.bfloat16, False, jnp.bfloat16, jnp.float32),
        (None, True, jnp.float64, jnp.float64),
    ],
)
def test_types_of_numbers(dtype, x64, logits, kept):
    with jax.enable_x64(x64):
        case = make_case("efficientnetv2-tiny", 8, 2, x64, "product")
        chain = create("efficientnetv2-tiny", dtype=dtype)
        outputs, updated = jax.eval_shape(lambda v: chain.apply(v, case.images, True, KEY), case.variables)
        assert outputs.dtype == logits
        assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype(kept)}


def test_forms_are_the_two_that_are_documented():
    assert layers.FORMS == ("product", "conv")
    *with_form, classifier = models.create("efficientnetv2-tiny").units
    assert [units.reference_form(unit).form for unit in with_form] == ["conv"] * 7
    assert units.reference_form(classifier) is classifier
