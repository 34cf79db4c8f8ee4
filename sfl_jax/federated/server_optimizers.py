"""Optimisers of the server: they take the clients' mean change, once a round (Reddi et al., arXiv
2003.00295).

Their gradient is the model before the round minus the clients' mean, so that SGD of rate 1 is federated
averaging. The adaptive ones divide by the root of a running second moment plus `epsilon`, the paper's tau.
"""

import optax

from sfl_jax.registry import SERVER_OPTIMIZERS

DECAY = 0.99  # of the second moment, the paper's beta 2


def create(
    name: str = "sgd", rate: float = 1.0, momentum: float = 0.0, epsilon: float = 1e-3
) -> optax.GradientTransformation | None:
    """The optimiser of a name; None where it is federated averaging itself.

    Args:
      name: "sgd", "adam" or "yogi"; anything else raises BadInput.
      rate: multiplies its steps. momentum: of sgd, and the decay of the first moment of adam and yogi.
      epsilon: the paper's tau; small values make it more adaptive.
    """
    return SERVER_OPTIMIZERS[name](rate, momentum, epsilon)


def sgd(rate: float, momentum: float, epsilon: float) -> optax.GradientTransformation | None:
    """FedAvg, with momentum FedAvgM (Hsu et al., arXiv 1909.06335)."""
    return None if (rate, momentum) == (1, 0) else optax.sgd(rate, momentum or None)


def adam(rate: float, momentum: float, epsilon: float) -> optax.GradientTransformation:
    """FedAdam, with Adam's correction of the moments' bias, which the paper leaves out."""
    return optax.adam(rate, momentum, DECAY, epsilon)


def yogi(rate: float, momentum: float, epsilon: float) -> optax.GradientTransformation:
    """FedYogi, with the same correction."""
    return optax.yogi(rate, momentum, DECAY, epsilon)
