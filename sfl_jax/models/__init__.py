"""Networks as chains of units. Nothing in here knows about clients."""

from typing import Any

from sfl_jax.errors import BadInput
from sfl_jax.models import efficientnet_v2
from sfl_jax.models.chain import Chain, Variables
from sfl_jax.models.profile import Profile, profile

VARIANTS = efficientnet_v2.VARIANTS

__all__ = ["VARIANTS", "Chain", "Profile", "Variables", "create", "profile"]


def create(
    name: str, num_classes: int = 10, in_channels: int = 1, *, layer_form: str = "product", dtype: Any = None
) -> Chain:
    """The chain of an EfficientNetV2 variant.

    Args:
      name: a key of `VARIANTS`; anything else raises BadInput.
      num_classes: width of the classifier.
      in_channels: channels of the images; others are refused by the stem.
      layer_form: "product" or "conv", see `models.layers`.
      dtype: of the arithmetic, e.g. bfloat16; None follows the inputs. Parameters and statistics stay as initialised.
    """
    if name not in VARIANTS:
        raise BadInput(f"--model={name}: must be one of {', '.join(VARIANTS)}")
    return Chain(efficientnet_v2.units(name, num_classes, in_channels, layer_form, dtype))
