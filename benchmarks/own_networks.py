"""Times a training step of clients with their own weights, in a user's or a shipped network, in both forms.

    python -m benchmarks.own_networks --network=resnet --clients=10 --width=16
    python -m benchmarks.own_networks --shipped=vgg11 --clients=10

Prints the shortest of a few steps, in wall seconds and CPU seconds, and the seconds to compile. A step is the
gradient of a batch of 32 images of 32x32 and an SGD update, for all clients vmapped. The shipped `cnn` and
`mlp` get grey images of 28x28, as published.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sfl_jax.models import Chain, create
from sfl_jax.models.layers import FORMS
from sfl_jax.registry import NETWORKS

STEPS = 5


class Stem(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train)(x))


class Block(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        branch = nn.relu(norm()(conv(self.features, (3, 3), self.stride)(x)))
        branch = norm()(conv(self.features, (3, 3))(branch))
        if branch.shape != x.shape:
            x = norm()(conv(self.features, (1, 1), self.stride)(x))
        return nn.relu(x + branch)


class Pooled(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.max_pool(nn.relu(nn.Conv(self.features, (3, 3))(x)), (2, 2), (2, 2))


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.mean((1, 2)))


class Whole(nn.Module):
    """ResNet-18 for small images."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        *body, head = resnet(self.width)
        for unit in body:
            x = unit(x, train)
        return head(x)


def resnet(width):
    blocks = [
        Block(width << stage, 2 if stage and not block else 1) for stage in range(4) for block in range(2)
    ]
    return [Stem(width), *blocks, Head()]


def chain(network, width, form):
    if network == "whole":
        return Chain.from_module(Whole(width), jnp.zeros((2, 32, 32, 3)), layer_form=form)
    units = {"cnn": [Pooled(width), Pooled(2 * width), Head()], "resnet": resnet(width)}
    return Chain(units[network], layer_form=form)


def stepper(chain):
    def step(variables, images, labels):
        def loss_of(params):
            logits, after = chain.apply(variables._replace(params=params), images, True, jax.random.key(0))
            return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean(), after

        gradients, after = jax.grad(loss_of, has_aux=True)(variables.params)
        moved = jax.tree.map(lambda p, g: p - 0.05 * g, variables.params, gradients)
        return after._replace(params=moved)

    return jax.jit(jax.vmap(step))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--network", choices=["cnn", "resnet", "whole"], default="resnet")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--shipped", choices=NETWORKS.names(), help="use this network of sfl_jax instead")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    options = parser.parse_args()
    clients, rng = options.clients, np.random.default_rng(0)
    shape = (28, 28, 1) if options.shipped in ("cnn", "mlp") else (32, 32, 3)
    images = jnp.asarray(rng.normal(size=(clients, 32, *shape)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, (clients, 32)))
    for form in options.forms:
        if options.shipped:
            network = create(options.shipped, 10, shape[-1], layer_form=form)
        else:
            network = chain(options.network, options.width, form)
        one = network.init(jax.random.key(0), images[0])
        variables = jax.tree.map(lambda x: jnp.repeat(x[None], clients, 0), one)
        begun = time.perf_counter()
        run = stepper(network).lower(variables, images, labels).compile()
        compiled_s = time.perf_counter() - begun
        steps = []
        for _ in range(STEPS):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(variables, images, labels))
            steps.append((time.perf_counter() - wall, time.process_time() - cpu))
        wall_s, cpu_s = (min(column) for column in zip(*steps, strict=True))
        print(f"{form}: {wall_s:.2f} s, {cpu_s:.2f} s of CPU, compiled in {compiled_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()
