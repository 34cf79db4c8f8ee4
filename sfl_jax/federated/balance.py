"""Distributes the clients of a round over devices, so that all devices end at about the same time."""

import heapq

import jax
import numpy as np
from jaxtyping import Int

from sfl_jax.federated.session import Assignment


def fill_chunks(assignments: Assignment, clients_per_chunk: int, devices: int = 1) -> tuple[Assignment, int]:
    """Returns the assignments ordered for D devices and padded with idle clients, and the clients in a chunk.

    Clients with sessions of similar length share a chunk, so that few steps are masked. `deal` balances the
    chunks. The leading axis becomes D * (chunks of a device) * (clients in a chunk), device by device. Its
    length depends only on the number of clients, so other clients need no new compilation.
    """
    steps = np.asarray(assignments.steps)
    size = chunk_size(len(steps), clients_per_chunk, devices)
    order = np.argsort(-steps, kind="stable")
    chunks = -(-len(steps) // size)
    slots = -(-chunks // devices)
    starts = deal(steps[order][::size], devices, slots) * size
    places = (starts[:, None] + np.arange(size)).reshape(-1)[: len(steps)]

    def arrange(x):
        filled = np.zeros((devices * slots * size, *x.shape[1:]), x.dtype)
        filled[places] = np.asarray(x)[order]
        return filled

    return jax.tree.map(arrange, assignments), size


def deal(steps: Int[np.ndarray, " N"], devices: int, slots: int) -> Int[np.ndarray, " N"]:
    """A place in 0..devices*slots - 1, device by device, for each of N chunks. The longest chunk comes first.

    Each chunk goes to the device with the least work so far and a free slot. This is "longest processing time
    first". It is within a third of the optimum (Graham 1969) if slots do not bind.
    """
    queue, used = [(0, device) for device in range(devices)], [0] * devices
    places = np.empty(len(steps), np.int64)
    for chunk, own in enumerate(steps):
        load, device = heapq.heappop(queue)
        places[chunk] = device * slots + used[device]
        used[device] += 1
        if used[device] < slots:
            heapq.heappush(queue, (load + int(own), device))
    return places


def chunk_size(clients: int, most: int, devices: int = 1) -> int:
    """The clients in a chunk: the fewest with which no device has more chunks than it must. At most `most`.

    For example, 17 clients in chunks of at most 16 need two chunks. Chunks of 9 are enough: one place is
    idle.
    """
    turns = -(-clients // (devices * most))
    return -(-clients // (devices * turns))


def places_per_client(clients: int, size: int, devices: int = 1) -> float:
    """How many places a round in chunks of `size` computes for each client, at least 1.

    An idle place takes as long as a filled one. All devices take as long as the one with the most chunks.
    """
    turns = -(-clients // (devices * size))
    return turns * size * min(devices, clients) / clients
