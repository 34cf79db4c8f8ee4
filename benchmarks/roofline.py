"""The least time of a local step, and its real time: python -m benchmarks.roofline [--models=b0,s] ...

Milliseconds for all K clients, SGD with momentum, product form:

  flop       its multiply-adds at the rate of a large matrix product
  bytes      parameters, gradients, momentum, kept activations, each read and written once, as by a copy
  products   its own matrix products, one kind at a time, repeated on cached numbers
  optimizer  the update of momentum and parameters alone
  step       measured in a round; the rest of it is passes over activations

No peers are needed here; `training_speed` compares with them.
"""

import argparse
import collections
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from benchmarks.torch_peers import CLASSES
from benchmarks.training_speed import ceiling_flops, seconds, sfl_jax_round
from sfl_jax import models
from sfl_jax.federated.packing import pack
from sfl_jax.federated.session import cross_entropy

TIMED_S = 0.2  # per kind of product


def products(chain, clients, batch, size):
    """{(shapes, dimension numbers): how many} for the products in a step of vmapped clients."""
    image = jax.ShapeDtypeStruct((clients, batch, size, size, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((clients, batch), jnp.int32)
    one = jax.eval_shape(chain.init, jax.random.key(0), jax.ShapeDtypeStruct(image.shape[1:], image.dtype))
    variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct((clients, *x.shape), x.dtype), one)

    def gradients(variables, images, labels):
        def loss(params):
            now, key = variables._replace(params=params), jax.random.key(0)
            return cross_entropy(chain.apply(now, images, train=True, key=key)[0], labels).mean()

        return jax.grad(loss)(variables.params)

    found = collections.Counter()

    def count(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                shapes = tuple(factor.aval.shape for factor in equation.invars)
                found[shapes, equation.params["dimension_numbers"]] += 1
            for inner in core.jaxprs_in_params(equation.params):
                count(inner)

    count(jax.make_jaxpr(jax.vmap(gradients))(variables, image, labels).jaxpr)
    return found


def seconds_of_product(shapes, numbers):
    """Seconds of one product, repeated. Each reads a number of the one before, else XLA computes only one."""

    @jax.jit
    def repeat(x, y, times):
        def again(_, carry):
            x, y, last = carry
            x = x.at[(0,) * x.ndim].set(last)
            product = lax.optimization_barrier(lax.dot_general(x, y, numbers))
            return x, y, 1e-6 * product[(0,) * product.ndim]

        return lax.fori_loop(0, times, again, (x, y, jnp.float32(0)))[2]

    draw = np.random.default_rng(0)
    x, y = (jnp.asarray(draw.standard_normal(shape, np.float32)) for shape in shapes)

    def timed(times):
        return seconds(lambda: jax.block_until_ready(repeat(x, y, times)))

    times = 1
    timed(times)
    while (took_s := timed(times)) < TIMED_S:
        times *= 2
    return took_s / times


def seconds_of_optimizer(chain, clients, size, steps=4):
    """Seconds of a momentum step of all clients, with given gradients."""
    one = jax.eval_shape(chain.init, jax.random.key(0), jnp.zeros((1, size, size, 1)))
    packed = pack([jax.tree.map(lambda x: jnp.zeros((clients, *x.shape)), unit) for unit in one.params])
    leaves = [jnp.zeros((clients, leaf.size // clients)) for leaf in jax.tree.leaves(packed)]

    @jax.jit
    def run(params, momentum, gradients, times):
        def step(_, carry):
            params, momentum = carry
            momentum = [0.9 * m + g for m, g in zip(momentum, gradients, strict=True)]
            return [p - 0.02 * m for p, m in zip(params, momentum, strict=True)], momentum

        return lax.fori_loop(0, times, step, (params, momentum))

    def timed(times):
        return min(
            seconds(lambda: jax.block_until_ready(run(leaves, leaves, leaves, times))) for _ in range(3)
        )

    timed(1)
    return (timed(1 + steps) - timed(1)) / steps


def copy_bytes_per_s(size=2**28):
    """Bytes per second of a copy, reads and writes together."""
    data, copy = jnp.zeros(size // 4), jax.jit(lambda x: x + 1, donate_argnums=0)
    data = copy(data)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        data = jax.block_until_ready(copy(data))
        times.append(time.perf_counter() - begun)
    return 2 * size / min(times)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--models", default="b0")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batches", default="32")
    parser.add_argument("--sizes", default="32")
    parser.add_argument("--clients_per_chunk", type=int, default=4)
    options = parser.parse_args()
    chunks = options.clients // options.clients_per_chunk
    peak, bandwidth = ceiling_flops(), copy_bytes_per_s()
    print(f"{jax.devices()[0].device_kind}: {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    cases = itertools.product(
        options.models.split(","),
        *(map(int, text.split(",")) for text in (options.batches, options.sizes)),
    )
    for name, batch, size in cases:
        chain = models.create(f"efficientnetv2-{name}", CLASSES, 1, layer_form="product")
        profile = models.profile(chain, (size, size, 1))
        run, flop = sfl_jax_round(
            f"efficientnetv2-{name}", options.clients, batch, size, 5, options.clients_per_chunk
        )
        run(1)
        step_s = min((seconds(run, 5) - seconds(run, 1)) / 4 for _ in range(3))
        # Parameters are read three times and written once; momentum and gradients are written and read.
        floats = 8 * profile.parameters.sum() + 2 * batch * profile.activations.sum()
        kinds = products(chain, options.clients_per_chunk, batch, size)
        row = {
            "flop": flop / peak,
            "bytes": 4 * options.clients * int(floats) / bandwidth,
            "products": chunks * sum(many * seconds_of_product(*kind) for kind, many in kinds.items()),
            "optimizer": chunks * seconds_of_optimizer(chain, options.clients_per_chunk, size),
            "step": step_s,
        }
        print(f"{name}, {options.clients} clients, batch {batch}, {size}x{size}:", end=" ")
        print(", ".join(f"{what} {1e3 * took_s:.0f} ms" for what, took_s in row.items()), flush=True)


if __name__ == "__main__":
    main()
