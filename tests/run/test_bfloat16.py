"""A short training in bfloat16 against the same in float32."""

import dataclasses

import pytest

from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.run import Run

ROUNDS = 20
CONFIG = Config(  # like the preset for MNIST, with a smaller network and smaller images
    model="efficientnetv2-tiny", image_size=16, server_flops=2e10, rounds=ROUNDS, eval_every=ROUNDS // 2,
    optimizer="adam", learning_rate=0.002, server_momentum=0.5, learning_rate_schedule="cosine",
    warmup_rounds=2, drop_rate_scale=0.0, head_init_scale=0.0,
    layer_form="product", execution="vmap", clients_per_chunk=5,
)  # fmt: skip
POINTS = 0.3


def accuracies(**changes):
    """Test accuracies in percent, half way and at the end."""
    run = Run.of(parts.build(dataclasses.replace(CONFIG, **changes)).parts)
    lines = list(run.rounds(ROUNDS))
    return [100 * line.test_accuracy for line in lines if line.test_accuracy is not None]


@pytest.mark.slow
def test_bfloat16_is_as_accurate_as_float32():
    (half_way, wide), (_, narrow) = accuracies(), accuracies(compute_dtype="bfloat16")
    print(f"\ntest accuracy: float32 {wide:.2f} %, bfloat16 {narrow:.2f} %")
    assert wide > 95
    assert abs(narrow - wide) <= POINTS
    assert wide - half_way > POINTS, "half the training is told from all of it"
