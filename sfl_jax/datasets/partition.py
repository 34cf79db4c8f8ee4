"""Division of a training set among clients."""

import numpy as np
from jaxtyping import Int

from sfl_jax.errors import BadInput

SCHEMES = ("iid", "dirichlet", "shards", "quantity", "fleet")


def partition(
    labels: Int[np.ndarray, " N"],
    clients: int,
    *,
    scheme: str = "iid",
    alpha: float = 0.5,
    shards_per_client: int = 2,
    min_samples: int = 1,
    samples: Int[np.ndarray, " K"] | None = None,
    seed: int = 0,
) -> list[Int[np.ndarray, " _"]]:
    """Which samples each client owns: disjoint, `min_samples` or more each; covering all, except under fleet.

    Schemes:
      iid: a random order cut into parts whose sizes differ by at most one.
      dirichlet: each class is divided in proportions of its own, drawn from Dirichlet(alpha) over clients
        (Yurochkin et al., arXiv 1905.12022).
      shards: samples sorted by label are cut into clients × shards_per_client equal shards, dealt at random
        (McMahan et al., arXiv 1602.05629).
      quantity: a random order cut into parts of sizes drawn from Dirichlet(alpha).
      fleet: a random order cut into parts of the sizes `samples`; what is left belongs to nobody.
    A small alpha makes clients differ much, a large one little. A client that would get fewer samples than
    `min_samples` is given more, one by one from whichever client has most at that moment.

    Args:
      labels: class of every sample, (N,).
      clients: number of clients, K.
      min_samples: least number of samples of a client.
      samples: samples of each client, (K,) positive; needed by fleet alone.

    Returns:
      K sorted int64 arrays of indices into `labels`; the same for the same arguments.

    Raises:
      BadInput: unknown scheme; more clients (or shards, or `samples`, or clients × min_samples) than there
        are labels; alpha or a count not positive; fewer `samples` than min_samples.
    """
    if scheme not in SCHEMES:
        raise BadInput(f"--partition={scheme}: must be one of {', '.join(SCHEMES)}")
    if not 1 <= clients <= len(labels):
        raise BadInput(f"--clients={clients}: must be 1 to {len(labels)}, the number of training samples")
    if not 0 < alpha < np.inf:
        raise BadInput(f"--dirichlet_alpha={alpha}: must be a positive number")
    if not clients <= clients * min_samples <= len(labels):
        raise BadInput(
            f"--min_samples={min_samples}: must be 1 to {len(labels) // clients}"
            f" for {clients} clients and {len(labels)} samples"
        )
    shards = clients * shards_per_client if scheme == "shards" else clients
    if not clients <= shards <= len(labels):
        raise BadInput(
            f"--shards_per_client={shards_per_client}: must be 1 to {len(labels) // clients}"
            f" for {clients} clients and {len(labels)} samples"
        )
    rng = np.random.default_rng([seed, SCHEMES.index(scheme)])
    if scheme == "fleet":
        order = rng.permutation(len(labels))
        ends = np.cumsum(_owned(samples, clients, min_samples, len(labels)))
        return [np.sort(part) for part in np.split(order[: ends[-1]], ends[:-1])]
    owner = np.empty(len(labels), np.int64)
    if scheme == "dirichlet":
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            owner[members] = _owners(len(members), rng.dirichlet(np.full(clients, alpha)))
    elif scheme == "shards":
        order = np.argsort(labels, kind="stable")
        dealt = rng.permutation(shards) // shards_per_client
        owner[order] = dealt[_owners(len(labels), np.full(shards, 1 / shards))]
    else:
        sizes = np.full(clients, 1 / clients) if scheme == "iid" else rng.dirichlet(np.full(clients, alpha))
        owner[rng.permutation(len(labels))] = _owners(len(labels), sizes)
    _feed_the_poor(owner, clients, min_samples, rng)
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _owned(
    samples: Int[np.ndarray, " K"] | None, clients: int, min_samples: int, available: int
) -> Int[np.ndarray, " K"]:
    """`samples` themselves, which are as many as the clients and add up to no more than there are."""
    if samples is None or samples.shape != (clients,) or samples.min() < 1:
        raise BadInput(f"--partition=fleet: needs the samples of {clients} clients, at least 1 each")
    if samples.min() < min_samples:
        few = f"client {samples.argmin()} of the fleet has {samples.min()} samples"
        raise BadInput(f"--min_samples={min_samples}: {few}; give it more, or take --partition=iid")
    if samples.max() > available or samples.sum() > available:  # no overflow where none is above `available`
        raise BadInput(
            f"--partition=fleet: the clients' samples add up to {sum(samples.tolist())}, the training set has"
            f" {available}; lower them, or take --partition=iid"
        )
    return samples


def _owners(samples: int, proportions: np.ndarray) -> np.ndarray:
    """Consecutive runs of 0, 1, 2… over `samples` places, run k as long as proportion k says (±1)."""
    ends = np.rint(np.cumsum(proportions) * samples).astype(np.int64)
    ends[-1] = samples
    return np.searchsorted(ends, np.arange(samples), side="right")


def _feed_the_poor(owner: np.ndarray, clients: int, least: int, rng: np.random.Generator) -> None:
    """In place: each client with fewer than `least` samples takes more, one by one from whichever client has
    most at that moment.
    """
    counts = np.bincount(owner, minlength=clients)
    order = np.argsort(owner, kind="stable")
    if least > 1:  # whose samples would else all be the last, of one class where the set is sorted
        shuffled = rng.permutation(len(owner))
        order = shuffled[np.argsort(owner[shuffled], kind="stable")]
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # among its owner's samples
    poor = np.repeat(np.arange(clients), np.maximum(least - counts, 0))
    owner[order[np.argsort(-rank, kind="stable")[: len(poor)]]] = poor
