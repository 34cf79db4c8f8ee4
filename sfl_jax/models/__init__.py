"""Networks as chains of units. Nothing here knows about clients."""

import inspect
from typing import Any

from sfl_jax.errors import BadInput
from sfl_jax.models import efficientnet_v2, layers
from sfl_jax.models.chain import Chain, Variables
from sfl_jax.models.profile import Profile, least_normalised, profile
from sfl_jax.models.timing import UnitSeconds, unit_seconds
from sfl_jax.registry import NETWORKS, NORMS

# What the function of a registered network takes, in this order.
TAKES = "(name, num_classes, in_channels, form, dtype, drop_rate_scale)"
VARIANTS = efficientnet_v2.VARIANTS

__all__ = [
    "VARIANTS", "Chain", "Profile", "UnitSeconds", "Variables", "create", "least_normalised", "profile",
    "unit_seconds",
]  # fmt: skip


def create(
    name: str,
    num_classes: int = 10,
    in_channels: int = 1,
    *,
    layer_form: str = "product",
    dtype: Any = None,
    drop_rate_scale: float = 1.0,
    norm: str = "batch",
) -> Chain:
    """The chain of a registered network.

    Args:
      name: a name of `registry.NETWORKS`; anything else raises BadInput, as does a function that takes other
        arguments than `TAKES`.
      num_classes: width of the classifier.
      in_channels: channels of the images; EfficientNet's stem refuses images with another number.
      layer_form: "product" or "conv", see `models.layers`; anything else raises BadInput.
      dtype: type of the arithmetic, e.g. bfloat16; None follows the inputs. Variables keep their type.
      drop_rate_scale: multiplies the published rates of dropout and stochastic depth; 0 drops nothing.
      norm: "batch", or "group" for networks that have batch norm: group norm takes its place. Anything else
        raises BadInput.
    """
    if layer_form not in layers.FORMS:
        raise BadInput(f"layer_form={layer_form}: must be one of {', '.join(layers.FORMS)}")
    if norm not in NORMS:
        raise BadInput(f"norm={norm}: must be one of {', '.join(NORMS)}")
    make, more = NETWORKS[name], {} if norm == "batch" else {"norm": norm}
    if more and "norm" not in inspect.signature(make).parameters:
        raise BadInput(f"norm={norm}: model={name} has no batch norm in whose place it could be")
    arguments = name, num_classes, in_channels, layer_form, dtype, drop_rate_scale
    try:
        inspect.signature(make).bind(*arguments, **more)
    except TypeError as error:
        raise BadInput(f"model={name}: its function must take {TAKES} ({error})") from error
    units = make(*arguments, **more)
    return Chain(units, layer_form=layer_form)
