"""Decides who the clients are, and which training samples each of them has."""

import dataclasses

import numpy as np
from jaxtyping import Int

from sfl_jax import datasets
from sfl_jax import fleet as fleets
from sfl_jax.commands.config import AUTO, Config
from sfl_jax.commands.rules import CLIENTS, RANDOM
from sfl_jax.errors import BadInput


def settle(config: Config, file: fleets.Fleet | None = None) -> tuple[Config, fleets.Fleet | None]:
    """Returns (`config` with the clients and partition that its fleet decides, the fleet of its file).

    file: the fleet file of `config`, if it was read already. The returned fleet is None for the random fleet.

    Raises:
      BadInput: the fleet file is wrong, it has another number of clients than --clients, or it has no samples
        and --partition=fleet needs them.
    """
    if config.fleet != RANDOM and file is None:
        file = fleets.read_fleet(config.fleet)
    number = config.clients or CLIENTS if file is None else len(file)
    if config.clients not in (0, number):
        raise BadInput(f"--clients={config.clients}: must be {number}, the clients of --fleet={config.fleet}")
    has_samples = file is not None and file.samples is not None
    partition = config.partition
    if partition == AUTO:
        partition = "fleet" if has_samples else "iid"
    if partition == "fleet" and not has_samples:
        raise BadInput(
            f"--partition=fleet: needs a fleet file with the column samples; --fleet={config.fleet} has none"
        )
    cohort = config.cohort_size
    if cohort == Config.cohort_size:  # the default is lowered for a smaller fleet
        cohort = min(cohort, number)
    return dataclasses.replace(config, clients=number, cohort_size=cohort, partition=partition), file


def clients(config: Config, file: fleets.Fleet | None) -> fleets.Fleet:
    """The fleet of a settled `config`. BadInput: --rtt_s, and the file has round-trip times."""
    fleet = fleets.random_fleet(config.clients, seed=config.seed) if file is None else file
    if not config.rtt_s:
        return fleet
    if fleet.rtt_s is not None:
        raise BadInput(f"--rtt_s={config.rtt_s}: --fleet={config.fleet} has the column rtt_s; leave one out")
    return dataclasses.replace(fleet, rtt_s=np.full(len(fleet), config.rtt_s))


def divide(
    config: Config, file: fleets.Fleet | None, labels: Int[np.ndarray, " N"]
) -> list[Int[np.ndarray, " _"]]:
    """The sample indices of each client, for a settled `config`."""
    if config.cohort_size > config.clients:
        raise BadInput(f"--cohort_size={config.cohort_size}: must be at most --clients={config.clients}")
    return datasets.partition(
        labels,
        config.clients,
        name=config.partition,
        alpha=config.dirichlet_alpha,
        shards_per_client=config.shards_per_client,
        min_samples=config.min_samples,
        samples=None if file is None else file.samples,
        seed=config.seed,
    )


def notes(
    config: Config, file: fleets.Fleet | None, parts: list[Int[np.ndarray, " _"]], samples: int
) -> list[str]:
    """Lines about columns of the fleet file and samples of the data that are not used."""
    if file is None:
        return []
    counts, lines = [len(part) for part in parts], []
    if config.partition == "fleet" and sum(counts) < samples:
        left = samples - sum(counts)
        lines.append(f"{left} of {samples} training samples not used: {config.fleet} asks for {sum(counts)}")
    if config.partition != "fleet" and file.samples is not None:
        least, most = min(counts), max(counts)
        each = f"each {least}" if least == most else f"{least} to {most}"
        lines.append(f"samples of {config.fleet} not used: --partition={config.partition} gives {each}")
    return lines + idle_columns(config, file)


def idle_columns(config: Config, file: fleets.Fleet) -> list[str]:
    """A line about columns of a fleet file that no plan of `config` uses, if there are any."""
    idle = [name for name in file.columns() if name in _idle(config, file)]
    energy = " and no column energy_j" if file.energy_j is None else ""
    return [f"{', '.join(idle)} of {config.fleet} not used: --links={config.links}{energy}"] if idle else []


def single_values(config: Config, parts: list[Int[np.ndarray, " _"]], least: int | None) -> list[str]:
    """A line about clients that learn badly or not at all, because batch norm averages over too few values.

    With one image in a batch, batch norm averages over a single image. With one value, the normalised value
    is 0 for any image. least: see `models.least_normalised`.

    Raises:
      BadInput: no client can learn.
    """
    if least is not None and least > 1 and config.batch_size == 1:
        return [
            f"--batch_size=1: batch norm averages over the {least} values of one image, which seldom "
            "trains well; choose at least 2"
        ]
    if least != 1:
        return []
    reason = f"batch norm would average over a single value at --image_size={config.image_size}"
    if config.batch_size == 1:
        raise BadInput(f"--batch_size=1: {reason}, so no client could learn; choose at least 2")
    single, clients = sum(len(part) < 2 for part in parts), len(parts)
    if single == clients:
        raise BadInput(f"--clients={clients}: each has one sample, and {reason}; choose fewer clients")
    if not single:
        return []
    return [
        f"{single} of {clients} clients learn almost nothing: they have one sample, and batch norm averages "
        "over a single value; --min_samples=2 gives every client two samples"
    ]


def _idle(config: Config, file: fleets.Fleet) -> set[str]:
    """Columns that have no effect with these links, or without limited energy."""
    idle = {"distance_m"} if config.links == "fixed" else {"uplink_bps", "downlink_bps"}
    if file.energy_j is None:
        idle |= {"cycles_per_s", "kappa"} | ({"transmit_w"} if config.links == "fixed" else set())
    return idle
