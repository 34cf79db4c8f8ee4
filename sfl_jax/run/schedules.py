"""Learning rates by round: a rise over the first rounds, then a rule of `registry.SCHEDULES`."""

import math
from collections.abc import Callable

from sfl_jax.registry import SCHEDULES


def schedule(
    name: str,
    rate: float,
    rounds: int,
    warmup_rounds: int = 0,
    decay_rate: float = 0.5,
    decay_rounds: int = 10,
) -> Callable[[int], float]:
    """The learning rate by round, counted from 0.

    Args:
      name: of `registry.SCHEDULES`; anything else raises BadInput.
      rate: the largest learning rate. rounds: of the whole run.
      warmup_rounds: the rate rises linearly over these, at most `rounds`; the rule counts from their end.
      decay_rate: exponential and step multiply the rate by it once in `decay_rounds` rounds.
    """
    warmup, rule = min(warmup_rounds, rounds), SCHEDULES[name]

    def at(round: int) -> float:
        if round < warmup:
            return rate * (round + 1) / warmup
        return rule(rate, round - warmup, rounds - warmup, decay_rate, decay_rounds)

    return at


def constant(rate: float, round: int, rounds: int, decay_rate: float, decay_rounds: int) -> float:
    """The same rate in every round."""
    return rate


def cosine(rate: float, round: int, rounds: int, decay_rate: float, decay_rounds: int) -> float:
    """Falls to 0 along half a cosine (Loshchilov and Hutter, arXiv 1608.03983)."""
    return rate * (1 + math.cos(math.pi * round / rounds)) / 2


def linear(rate: float, round: int, rounds: int, decay_rate: float, decay_rounds: int) -> float:
    """Falls to 0 along a line."""
    return rate * (1 - round / rounds)


def exponential(rate: float, round: int, rounds: int, decay_rate: float, decay_rounds: int) -> float:
    """Is multiplied by `decay_rate` over each `decay_rounds` rounds, a little in every round."""
    return rate * decay_rate ** (round / decay_rounds)


def step(rate: float, round: int, rounds: int, decay_rate: float, decay_rounds: int) -> float:
    """Is multiplied by `decay_rate` after each `decay_rounds` rounds."""
    return rate * decay_rate ** (round // decay_rounds)
