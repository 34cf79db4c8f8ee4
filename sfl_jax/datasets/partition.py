"""Divides a training set among clients."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sfl_jax.errors import BadInput
from sfl_jax.registry import PARTITIONS


def partition(
    labels: Int[np.ndarray, " N"],
    clients: int,
    *,
    name: str = "iid",
    alpha: float = 0.5,
    shards_per_client: int = 2,
    min_samples: int = 1,
    samples: Int[np.ndarray, " K"] | None = None,
    seed: int = 0,
) -> list[Int[np.ndarray, " _"]]:
    """The samples of each client: disjoint, at least `min_samples` each, and all samples except under fleet.

    Names:
      iid: a random order, cut into parts whose sizes differ by at most one.
      dirichlet: each class is divided in its own proportions, drawn from Dirichlet(alpha) over clients
        (Yurochkin et al., arXiv 1905.12022).
      shards: samples sorted by label are cut into clients × shards_per_client equal shards, dealt at random
        (McMahan et al., arXiv 1602.05629).
      quantity: a random order, cut into parts whose sizes are drawn from Dirichlet(alpha).
      fleet: a random order, cut into parts of the sizes `samples`; the rest is not used.

    A small alpha makes clients very different, a large alpha makes them similar. A client that would get
    fewer than `min_samples` samples gets more, one by one, each from the client with the most at that moment.

    Args:
      labels: class of every sample, (N,).
      clients: number of clients, K.
      min_samples: least number of samples of a client.
      samples: samples of each client, (K,), positive; only for fleet.

    Returns:
      K sorted int64 arrays of indices into `labels`; equal arguments give equal results.

    Raises:
      BadInput: an unknown name; more clients (or shards, or `samples`, or clients × min_samples) than labels;
        alpha or a count that is not positive; fewer `samples` than min_samples.
    """
    PARTITIONS[name]  # refuses unknown names
    if not 1 <= clients <= len(labels):
        raise BadInput(f"clients={clients}: must be 1 to {len(labels)}, the number of training samples")
    if not 0 < alpha < np.inf:
        raise BadInput(f"dirichlet_alpha={alpha}: must be a positive number")
    if not clients <= clients * min_samples <= len(labels):
        raise BadInput(
            f"min_samples={min_samples}: must be 1 to {len(labels) // clients}"
            f" for {clients} clients and {len(labels)} samples"
        )
    pieces = clients * shards_per_client if name == "shards" else clients
    if not clients <= pieces <= len(labels):
        raise BadInput(
            f"shards_per_client={shards_per_client}: must be 1 to {len(labels) // clients}"
            f" for {clients} clients and {len(labels)} samples"
        )
    rng = np.random.default_rng([seed, PARTITIONS.names().index(name)])
    asked = Asked(labels, clients, rng, alpha, shards_per_client, min_samples, samples)
    owner = PARTITIONS[name](asked)
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner + 1, minlength=clients + 1)  # the first count is of samples without owner
    return np.split(order, np.cumsum(counts)[:-1])[1:]


class Asked(NamedTuple):
    """The arguments of a division; see `partition`."""

    labels: Int[np.ndarray, " N"]
    clients: int
    rng: np.random.Generator
    alpha: float
    shards_per_client: int
    min_samples: int
    samples: Int[np.ndarray, " K"] | None


def iid(asked: Asked) -> Int[np.ndarray, " N"]:
    """The owner of each sample (as for all divisions): parts whose sizes differ by at most one."""
    return _in_random_order(asked, np.full(asked.clients, 1 / asked.clients))


def quantity(asked: Asked) -> Int[np.ndarray, " N"]:
    """Parts whose sizes are drawn from Dirichlet(alpha)."""
    return _in_random_order(asked, asked.rng.dirichlet(np.full(asked.clients, asked.alpha)))


def dirichlet(asked: Asked) -> Int[np.ndarray, " N"]:
    """Each class is divided in its own proportions, drawn from Dirichlet(alpha) over clients."""
    labels, rng, owner = asked.labels, asked.rng, np.empty(len(asked.labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        owner[members] = _owners(len(members), rng.dirichlet(np.full(asked.clients, asked.alpha)))
    return _with_the_poor_fed(asked, owner)


def shards(asked: Asked) -> Int[np.ndarray, " N"]:
    """Equal pieces of the samples sorted by label, dealt at random."""
    labels, owner = asked.labels, np.empty(len(asked.labels), np.int64)
    pieces = asked.clients * asked.shards_per_client
    dealt = asked.rng.permutation(pieces) // asked.shards_per_client
    owner[np.argsort(labels, kind="stable")] = dealt[_owners(len(labels), np.full(pieces, 1 / pieces))]
    return _with_the_poor_fed(asked, owner)


def fleet(asked: Asked) -> Int[np.ndarray, " N"]:
    """Parts of the sizes `samples`; the rest has the owner -1."""
    owned = _owned(asked.samples, asked.clients, asked.min_samples, len(asked.labels))
    order, owner = asked.rng.permutation(len(asked.labels)), np.full(len(asked.labels), -1, np.int64)
    owner[order[: owned.sum()]] = np.repeat(np.arange(asked.clients), owned)
    return owner


def _in_random_order(asked, sizes):
    owner = np.empty(len(asked.labels), np.int64)
    owner[asked.rng.permutation(len(owner))] = _owners(len(owner), sizes)
    return _with_the_poor_fed(asked, owner)


def _with_the_poor_fed(asked, owner):
    _feed_the_poor(owner, asked.clients, asked.min_samples, asked.rng)
    return owner


def _owned(
    samples: Int[np.ndarray, " K"] | None, clients: int, min_samples: int, available: int
) -> Int[np.ndarray, " K"]:
    """`samples`, checked: one for each client, and together at most `available`."""
    if samples is None or samples.shape != (clients,) or samples.min() < 1:
        raise BadInput(f"partition=fleet: needs the samples of {clients} clients, at least 1 each")
    if samples.min() < min_samples:
        few = f"client {samples.argmin()} of the fleet has {samples.min()} samples"
        raise BadInput(f"min_samples={min_samples}: {few}; give it more, or use partition=iid")
    if samples.max() > available or samples.sum() > available:  # the first prevents an overflow in the sum
        raise BadInput(
            f"partition=fleet: the clients have {sum(samples.tolist())} samples in all, the training set has"
            f" {available}; use lower numbers, or partition=iid"
        )
    return samples


def _owners(samples: int, proportions: np.ndarray) -> np.ndarray:
    """Runs of 0, 1, 2… over `samples` places; the length of run k is proportion k of them (±1)."""
    ends = np.rint(np.cumsum(proportions) * samples).astype(np.int64)
    ends[-1] = samples
    return np.searchsorted(ends, np.arange(samples), side="right")


def _feed_the_poor(owner: np.ndarray, clients: int, least: int, rng: np.random.Generator) -> None:
    """Changes `owner` in place: each client with fewer than `least` samples takes more, one by one, each from
    the client with the most at that moment.
    """
    counts = np.bincount(owner, minlength=clients)
    order = np.argsort(owner, kind="stable")
    if least > 1:  # else they are the last samples of an owner: one class if the set is sorted
        shuffled = rng.permutation(len(owner))
        order = shuffled[np.argsort(owner[shuffled], kind="stable")]
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # among its owner's samples
    poor = np.repeat(np.arange(clients), np.maximum(least - counts, 0))
    owner[order[np.argsort(-rank, kind="stable")[: len(poor)]]] = poor
