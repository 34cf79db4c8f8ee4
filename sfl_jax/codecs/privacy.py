"""What the noise of the codec `gaussian` promises, in closed form."""

import math

from scipy.optimize import root_scalar
from scipy.special import log_ndtr

from sfl_jax.errors import BadInput


def epsilon(sigma: float, messages: int, delta: float) -> float:
    """The smallest ε for which `messages` messages of the codec `gaussian` are (ε, δ)-differentially private.

    Two data sets are neighbours where one sample is replaced. Both versions of a message have a norm of at
    most C, so they differ by at most 2C, under noise sigma · C. N such messages are exactly as private as one
    with √N times the difference, also where each depends on what came before (Dong, Roth & Su, arXiv
    1905.02383). The δ of one message is known exactly for each ε (Balle & Wang, arXiv 1805.06530, theorem 8);
    this is solved for ε. Sampling is not assumed to help: the server knows whose sample it gets.

    Args:
      sigma: the noise in units of C, at least 0.
      messages: how many messages the sample has an influence on. For its own messages, without batch norm on
        the client, this is epochs × rounds. docs/codecs.md says when it is more, and what is not covered.
      delta: above 0 and below 1; choose less than 1 / samples.

    Returns ε, infinite without noise. Raises BadInput where an argument is outside of its range.
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
    ratio = 2 * math.sqrt(messages) / sigma
    if _log_delta(ratio, 0.0) <= math.log(delta):
        return 0.0
    enough = ratio * (ratio / 2 + math.sqrt(-2 * math.log(delta)))  # here the first term alone is below delta
    found = root_scalar(lambda eps: _log_delta(ratio, eps) - math.log(delta), bracket=(0, enough))
    return float(found.root)


def _log_delta(ratio: float, eps: float) -> float:
    """log(Φ(μ/2 - ε/μ) - exp(ε) Φ(-μ/2 - ε/μ)), μ being the largest difference in units of the noise."""
    larger, smaller = log_ndtr(ratio / 2 - eps / ratio), eps + log_ndtr(-ratio / 2 - eps / ratio)
    return float(larger + math.log(-math.expm1(min(smaller - larger, -math.ulp(0)))))  # rounding: not above 0
