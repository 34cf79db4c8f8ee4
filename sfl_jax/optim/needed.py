"""The cuts that a fleet can do without: no client would ever be better off with them than with another.

To end by T at cut l takes a share s of w / (T - a), and w + s a = s T is a straight line in what the cut
asks for: work on the server, and client work, bits up, bits down and bits of the model, which make up a.
So where a mixture of two cuts asks no more of anything than a third one does, one of the two needs no larger
share than the third, at whatever rates, time and price of compute. Equal blocks in a row cost equally much,
so of each such run only the ends are left: 12 of EfficientNetV2-S's 44 cuts.
"""

import functools
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sfl_jax.optim.costs import Floats, Terms


def needed_cuts(terms: Terms) -> NDArray[np.int32]:
    """Cuts, ascending, among which there is a best one for every client, whatever the time and the server.

    Of several codecs: columns of options, to which all this applies alike.
    A cut is dropped only where those that replace it are open to every client that it is open to: they take
    no more memory than it does, or than every client has. Where energy is budgeted, one cut must replace it.
    """
    amounts = np.stack(
        [terms.forward_flop + terms.backward_flop, terms.up_bits, terms.down_bits, terms.model_bits,
         terms.work_flop], axis=1,
    )  # fmt: skip
    everywhere = terms.needed_bytes <= terms.memory_bytes.min()
    memory_bytes = np.where(everywhere, 0.0, terms.needed_bytes)
    return _needed(amounts.tobytes(), memory_bytes.tobytes(), terms.permitted.tobytes(), terms.energy is None)


@functools.lru_cache(maxsize=256)  # a network's cuts are the same every round
def _needed(amounts: bytes, memory_bytes: bytes, permitted: bytes, mixed: bool) -> NDArray[np.int32]:
    memory, open_ = np.frombuffer(memory_bytes), np.frombuffer(permitted, bool)
    table = np.frombuffer(amounts).reshape(len(memory), -1)
    left = np.flatnonzero(open_)
    # One at a time, or two that are equal would each be dropped for the other.
    for cut in left:
        others = left[(left != cut) & ((memory[left] <= memory[cut]) | (left == cut))]
        if _replaced(table[cut], table[others], mixed):
            left = left[left != cut]
    left = left.astype(np.int32)
    left.flags.writeable = False
    return left


def _replaced(cut: Floats, others: Floats, mixed: bool) -> bool:
    """Whether one of `others` (N, A), or a mixture of two, is no more than `cut` (A,) in anything."""
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
    """The same of two others, without rounding: the bound's proof rests on it."""
    rows = [
        tuple(map(Fraction, amounts))
        for amounts in zip(cut.tolist(), first.tolist(), second.tolist(), strict=True)
    ]
    part = max([Fraction(0), *((c - a) / (b - a) for c, a, b in rows if b < a)])
    return part <= 1 and all(a + part * (b - a) <= c for c, a, b in rows)
