"""The differential privacy of the codec `gaussian`, in closed form."""

import math

from sfl_jax.errors import BadInput


def epsilon(sigma: float, messages: int, delta: float) -> float:
    """The smallest ε for which `messages` messages of the codec `gaussian` are (ε, δ)-differentially private.

    Two data sets are neighbours if one sample is replaced. Both versions of a message have a norm of at most
    C, so they differ by at most 2C, under noise sigma · C. N such messages are exactly as private as one
    message with √N times the difference. This also holds if a message depends on earlier ones (Dong, Roth and
    Su, arXiv 1905.02383). Balle and Wang (arXiv 1805.06530, theorem 8) give the exact δ of one message for
    each ε. This function solves it for ε. Random sampling gives no extra privacy here, because the server
    knows whose sample it gets.

    Args:
      sigma: the noise in units of C, at least 0.
      messages: how many messages depend on the sample. For a sample's own messages, without batch norm on the
        client, this is epochs × rounds. docs/codecs.md says when it is more, and what is not covered.
      delta: above 0 and below 1. Choose less than 1 / samples.

    Returns ε, infinite without noise. Raises BadInput if an argument is out of range.
    """
    if not 0 <= sigma < math.inf:
        raise BadInput(f"sigma={sigma}: must be at least 0 and finite")
    if messages < 0:
        raise BadInput(f"messages={messages}: must be at least 0")
    if not 0 < delta < 1:
        raise BadInput(f"delta={delta}: must be above 0 and below 1")
    if not messages:
        return 0.0
    if not sigma:
        return math.inf
    from scipy.optimize import root_scalar  # it takes long to import

    ratio = 2 * math.sqrt(messages) / sigma
    if _log_delta(ratio, 0.0) <= math.log(delta):
        return 0.0
    enough = ratio * (ratio / 2 + math.sqrt(-2 * math.log(delta)))  # the first term alone is below delta here
    found = root_scalar(lambda eps: _log_delta(ratio, eps) - math.log(delta), bracket=(0, enough))
    return float(found.root)


def _log_delta(ratio: float, eps: float) -> float:
    """log(Φ(μ/2 - ε/μ) - exp(ε) Φ(-μ/2 - ε/μ)). ratio: μ, the largest difference in units of the noise."""
    from scipy.special import log_ndtr

    larger, smaller = log_ndtr(ratio / 2 - eps / ratio), eps + log_ndtr(-ratio / 2 - eps / ratio)
    return float(larger + math.log(-math.expm1(min(smaller - larger, -math.ulp(0)))))  # rounding may give 0
