"""Times each unit of a chain on this machine, forward and backward, as a client of split learning runs it."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sfl_jax.models import layers, units
from sfl_jax.models.chain import Chain

WARM_UPS = 2  # calls before the first that counts; the first compiles
FORMS = (layers.ALONE, "conv")  # of the layers; the faster one counts


class UnitSeconds(NamedTuple):
    """Median seconds of one unit for one batch."""

    unit: str
    forward_s: float
    backward_s: float


def unit_seconds(
    chain: Chain,
    image_shape: tuple[int, ...],
    batch_size: int,
    repetitions: int,
    say: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[UnitSeconds]:
    """The seconds of every unit in training, compiled, on the default device.

    Forward makes the output and keeps what the backward pass needs. Backward makes the gradients of the
    parameters and, but for the first unit of the network, of the input. The optimiser's step is not in it.

    repetitions: calls of each direction, whose median counts. say: gets the name of each unit in turn.
    """
    key = jax.random.key(0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((batch_size, *image_shape)), jnp.float32)
    timed = []
    for index, unit in enumerate(chain.units, start=chain.first_unit):
        name = units.name(unit, index)
        say(f"timing unit {index + 1} of {len(chain)}, {name}")
        with units.named_errors(f"unit {name}", x):
            of_forms = [
                _times(units.kind(units.in_form(unit, form)), form, x, key, index, repetitions, clock)
                for form in FORMS
            ]
        (forward_s, backward_s), x = min(of_forms, key=lambda each: sum(each[0]))
        timed.append(UnitSeconds(name, forward_s, backward_s))
    return timed


def _times(unit: nn.Module, form: str, x: Any, key: Any, index: int, repetitions: int, clock):
    """((forward, backward) in seconds, the output) of one unit in one form."""
    variables = dict(units.init(unit, jax.random.fold_in(key, index), x, units.shapes(unit, x)))
    params, state = variables.pop("params", {}), variables
    forward, backward = _directions(unit, form, index == 0)
    forward_s, (output, pull) = _median_s(lambda: forward(params, x, state, key), repetitions, clock)
    gradient = jax.tree.map(jnp.ones_like, output)
    backward_s, _ = _median_s(lambda: backward(pull, gradient), repetitions, clock)
    return (forward_s, backward_s), output


@functools.cache
def _directions(unit: nn.Module, form: str, is_first: bool):
    """Compiled forward and backward of a unit; equal units share them."""

    def run(params, x, state, key):
        return units.apply(unit, {"params": params, **state}, x, True, units.streams(unit, key), form)

    def forward(params, x, state, key):
        inputs = () if is_first else (x,)
        output, pull, _ = jax.vjp(lambda p, x=x: run(p, x, state, key), params, *inputs, has_aux=True)
        return output, pull

    return jax.jit(forward), jax.jit(lambda pull, gradient: pull(gradient))


def _median_s(call: Callable[[], Any], repetitions: int, clock) -> tuple[float, Any]:
    """The median seconds of some calls, and the last result. Waits for each result."""
    result, took_s = None, []
    for _ in range(WARM_UPS):
        jax.block_until_ready(call())
    for _ in range(repetitions):
        begun = clock()
        result = jax.block_until_ready(call())
        took_s.append(clock() - begun)
    return statistics.median(took_s), result
