"""The parts that a run is composed of, and the rule that says its learning rates."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sfl_jax import datasets, optim
from sfl_jax.federated.evaluation import Metric, accuracy
from sfl_jax.federated.execution import Execution
from sfl_jax.federated.session import Training
from sfl_jax.fleet import Faults, Fleet
from sfl_jax.models import Profile, Variables
from sfl_jax.planning import Planner
from sfl_jax.schemes import Scheme

RIVALS = ("no_split", "common_cut")  # whose clocks run beside the plan's
Say = Callable[[str], None]  # is told what is being done, for a person who waits


def silent(line: str) -> None:
    """Tells nobody."""


def always(round: int) -> float:
    """The same rate in every round."""
    return 1.0


@dataclasses.dataclass(frozen=True)
class Parts:
    """All that a run needs and that stays the same from round to round.

    Attributes:
      data: the samples. division: the indices of each client's training samples.
      fleet: the clients, with their samples. profile, terms: the costs of the network, and of each client.
      training: the network, the optimisers, and what prepares images.
      initial: makes the variables before the first round.
      scheme: whose copy of a unit a step uses, and who waits for whom.
      planner, faults: how rounds are planned, and what goes wrong in them.
      image_shape: (H, W, C) of what enters the network.
      cohort_size, local_epochs, batch_size: of every round. rate: the learning rate by round.
      eval_every: rounds between evaluations. seed: of cohorts, batches, delays and training.
      execution: how the devices are asked to compute it. devices: those of all processes.
      rivals: planning methods whose clocks run beside the plan's.
      metric: of each held-out sample; its mean is the accuracy of a line.
      network: what a person calls the network. program: what tells its compiled round from others.
    """

    data: datasets.Dataset
    division: Sequence[np.ndarray]
    fleet: Fleet
    profile: Profile
    terms: optim.Terms
    training: Training
    initial: Callable[[], Variables]
    scheme: Scheme
    planner: Planner
    faults: Faults
    image_shape: tuple[int, ...]
    cohort_size: int
    local_epochs: int
    batch_size: int
    rate: Callable[[int], float]
    eval_every: int
    seed: int
    execution: Execution
    devices: Sequence[Any]
    rivals: tuple[str, ...] = RIVALS
    metric: Metric = accuracy
    network: str = "network"
    program: str = ""

    @functools.cached_property
    def steps_max(self) -> int:
        """Local steps of the longest session."""
        return datasets.max_steps(self.division, self.local_epochs, self.batch_size)

    @property
    def optimizer_slots(self) -> int:
        """Numbers that the local optimiser keeps for each parameter."""
        return self.training.optimizer.slots


def cosine(rate: float, rounds: int, warmup_rounds: int = 0, falls: bool = True) -> Callable[[int], float]:
    """The rate by round: it rises linearly over the warm-up, then falls to 0 along a half cosine, or stays.

    A run with fewer rounds than the warm-up takes rises to its end.
    """
    warmup = min(warmup_rounds, rounds)

    def at(round: int) -> float:
        if round < warmup:
            return rate * (round + 1) / warmup
        if not falls:
            return rate
        return rate * (1 + math.cos(math.pi * (round - warmup) / (rounds - warmup))) / 2

    return at
