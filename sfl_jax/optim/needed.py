"""The cuts that solvers need to try: no client is ever better off with one of the others.

To end by T at cut l a client needs a share s = w / (T - a), so w + s a = s T. The left side is linear in the
amounts of the cut: server work, and client work, bits up, bits down and model bits, which make up a. With
round-trip times and measured devices, messages and the seconds of each device are amounts as well. If a
mixture of two cuts is at most a third cut in every amount, one of the two needs no larger share than the
third. This holds for all rates, times and prices of compute. In a run of equal blocks only the cuts at the
ends are needed: EfficientNetV2-S keeps 12 of 44 cuts.
"""

import functools
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sfl_jax.optim.costs import Floats, Terms


def needed_cuts(terms: Terms) -> NDArray[np.int32]:
    """Cuts, ascending, that include a best one for every client at any time and with any server.

    With several codecs a cut here is a column. A cut is dropped only if its replacements are allowed for
    every client that may use it: they need no more memory than the cut, or fit in every client's memory. With
    energy budgets a single cut must replace it.
    """
    amounts = [
        terms.forward_flop + terms.backward_flop, terms.up_bits, terms.down_bits, terms.model_bits,
        terms.work_flop,
    ]  # fmt: skip
    if terms.latency is not None:
        amounts += [terms.latency.up_messages + terms.latency.down_messages, terms.latency.model_messages]
    if terms.devices is not None:  # the seconds of each device are one more amount
        amounts += list(terms.devices.forward_s + terms.devices.backward_s)
    amounts = np.stack(amounts, axis=1)
    everywhere = terms.needed_bytes <= terms.memory_bytes.min()
    memory_bytes = np.where(everywhere, 0.0, terms.needed_bytes)
    return _needed(amounts.tobytes(), memory_bytes.tobytes(), terms.permitted.tobytes(), terms.energy is None)


@functools.lru_cache(maxsize=256)  # because a network's cuts are the same every round
def _needed(amounts: bytes, memory_bytes: bytes, permitted: bytes, mixed: bool) -> NDArray[np.int32]:
    memory, open_ = np.frombuffer(memory_bytes), np.frombuffer(permitted, bool)
    table = np.frombuffer(amounts).reshape(len(memory), -1)
    left = np.flatnonzero(open_)
    # One at a time: else two equal cuts would each be dropped for the other.
    for cut in left:
        others = left[(left != cut) & ((memory[left] <= memory[cut]) | (left == cut))]
        if _replaced(table[cut], table[others], mixed):
            left = left[left != cut]
    left = left.astype(np.int32)
    left.flags.writeable = False
    return left


def _replaced(cut: Floats, others: Floats, mixed: bool) -> bool:
    """Whether one of `others` (N, A), or a mixture of two, is at most `cut` (A,) in every amount."""
    # first + part (second - first) <= cut, solved for the part: an interval for each amount.
    slope, room = (
        others - others[:, None],
        np.broadcast_to((cut - others)[:, None], (len(others),) * 2 + cut.shape),
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = room / slope
    low = np.where(slope < 0, ratio, 0.0).max(axis=2, initial=0.0)
    high = np.where(slope > 0, ratio, 1.0).min(axis=2, initial=1.0)
    found = (low <= high) & np.where(slope == 0, room >= 0, True).all(axis=2)
    pairs = np.argwhere(found if mixed else found & np.eye(len(others), dtype=bool))
    return any(_is_no_more(cut, others[first], others[second]) for first, second in pairs)


def _is_no_more(cut: Floats, first: Floats, second: Floats) -> bool:
    """The same for a mixture of two given cuts, without rounding: the proof of the bound needs it."""
    rows = [
        tuple(map(Fraction, amounts))
        for amounts in zip(cut.tolist(), first.tolist(), second.tolist(), strict=True)
    ]
    part = max([Fraction(0), *((c - a) / (b - a) for c, a, b in rows if b < a)])
    return part <= 1 and all(a + part * (b - a) <= c for c, a, b in rows)
