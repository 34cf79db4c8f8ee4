"""Codecs: what is done to smashed data and their gradient at the cut. They round, quantise or add noise."""

from sfl_jax.codecs.codec import Codec, create
from sfl_jax.codecs.gaussian import Gaussian
from sfl_jax.codecs.privacy import epsilon
from sfl_jax.codecs.quantised import Int4, Int8
from sfl_jax.codecs.rounded import BFloat16, Float16, Float32
from sfl_jax.codecs.topk import TopK

__all__ = [
    "BFloat16",
    "Codec",
    "Float16",
    "Float32",
    "Gaussian",
    "Int4",
    "Int8",
    "TopK",
    "create",
    "epsilon",
]
