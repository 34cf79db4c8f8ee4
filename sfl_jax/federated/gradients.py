"""Changes the gradient of a local step before the optimiser sees it. Each unit is treated by itself.

Client and server know the gradients of their own units alone. A rule that treats each unit by itself gives
the same numbers at every cut; a clip by the norm over all units would not.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sfl_jax.errors import BadInput


def check(proximal: float, clip_norm: float) -> None:
    """Raises BadInput for a negative factor or norm."""
    for name, value in (("proximal", proximal), ("clip_norm", clip_norm)):
        if not 0 <= value < float("inf"):
            raise BadInput(f"{name}={value:g}: must be a finite number, at least 0")


def adjusted(gradients: Any, params: Any, start: Any, proximal: float = 0.0, clip_norm: float = 0.0) -> Any:
    """The gradient of one unit as the optimiser takes it.

    Args:
      gradients, params: of one unit, pytrees of the same structure; params are those before the step.
      start: the global parameters at the beginning of the round.
      proximal: FedProx's factor mu (Li et al., arXiv 1812.06127). The loss gains mu/2·‖params − start‖², and
        the gradient mu·(params − start).
      clip_norm: the largest Euclidean norm of the unit's gradient, the proximal term included; 0 clips
      nothing.
    """
    if proximal:
        gradients = jax.tree.map(
            lambda g, p, s: g + (proximal * (p - s)).astype(g.dtype), gradients, params, start
        )
    if not clip_norm or not jax.tree.leaves(gradients):
        return gradients
    factor = jnp.minimum(1, clip_norm / jnp.maximum(_norm(gradients), jnp.finfo(jnp.float32).tiny))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)


def _norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm over all leaves, in float32 or wider."""
    squares = (
        jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).sum() for x in jax.tree.leaves(tree)
    )
    return jnp.sqrt(sum(squares))
