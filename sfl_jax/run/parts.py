"""The parts that a run is composed of, and the rule for its learning rate."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sfl_jax import datasets, optim
from sfl_jax.federated.evaluation import Metric, accuracy
from sfl_jax.federated.execution import Execution
from sfl_jax.federated.session import Training
from sfl_jax.fleet import Faults, Fleet, Sampling
from sfl_jax.models import Profile, Variables
from sfl_jax.planning import Planner
from sfl_jax.run import clients
from sfl_jax.schemes import Scheme

RIVALS = ("no_split", "common_cut")  # planning methods whose clocks run beside that of the plan
Say = Callable[[str], None]  # shows a line to a person who waits


def silent(line: str) -> None:
    """A `Say` that shows nothing."""


def always(round: int) -> float:
    """A learning rate that stays the same in every round."""
    return 1.0


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run that stay the same from round to round.

    Attributes:
      data: the samples.
      division: the indices of each client's training samples.
      fleet: the clients, with their samples.
      profile: the costs of the network. terms: the costs of each client.
      training: the network, the optimisers and the preprocessing.
      initial: makes the variables before the first round.
      scheme: whose copy of a unit a step uses, and who waits for whom.
      planner: how rounds are planned.
      faults: what goes wrong in rounds.
      image_shape: (H, W, C) of the samples that enter the network.
      cohort_size, local_epochs, batch_size: the same in every round.
      rate: the learning rate by round.
      eval_every: rounds between evaluations.
      seed: draws cohorts, batches, delays and training.
      execution: how the devices compute a round; some choices may be open.
      devices: the devices of all processes.
      rivals: planning methods whose clocks run beside that of the plan.
      metric: a number for each test sample; its mean is a line's accuracy.
      sampling: how the clients of a round are drawn.
      network: a readable name of the network.
      program: distinguishes the compiled round from others of the same network.
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
    sampling: Sampling = Sampling()  # noqa: RUF009 frozen
    network: str = "network"
    program: str = ""

    @functools.cached_property
    def steps_max(self) -> int:
        """The local steps of the longest session."""
        return datasets.max_steps(self.division, self.local_epochs, self.batch_size)

    @functools.cached_property
    def mix(self) -> np.ndarray:
        """The part that each class has in the samples of each client; (clients, classes)."""
        return clients.mix(self.data.train_labels, self.division, self.data.num_classes)

    @property
    def optimizer_slots(self) -> int:
        """How many numbers the local optimiser keeps for each parameter."""
        return self.training.optimizer.slots
