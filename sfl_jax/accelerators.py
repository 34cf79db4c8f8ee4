"""Switches of GPUs and TPUs."""

import os

import jax

from sfl_jax.config import Config

# Kernels that add in a fixed order, and none chosen by measuring, which may choose differently next time.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


def switch(config: Config) -> None:
    """Set what --deterministic and --matmul_precision ask for.

    The former has an effect only before JAX computes anything.
    What the user has set in the environment stays where the flags ask for nothing, and wins in XLA_FLAGS.
    """
    if config.deterministic:
        os.environ["XLA_FLAGS"] = f"{DETERMINISTIC} {os.environ.get('XLA_FLAGS', '')}"
    if config.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", config.matmul_precision)
