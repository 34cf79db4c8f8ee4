"""The bytes, the work and the memory of a run, as a person reads them."""

import numpy as np
import pytest

from sfl_jax.commands import totals, words
from sfl_jax.run.clocks import Clock
from sfl_jax.run.ledger import Ledger, columns

ONE = Ledger(10_000, 4_000_000, 250, 3_000_000, 10_000, 7_000, 2_000_000_000, 5 * 10**12, 6 * 10**15)
KNOWN = Clock(np.array([2.0, 4.0, 6.0]), columns([ONE, ONE._replace(client_peak_bytes=9_000), ONE]))
UNKNOWN = Clock(KNOWN.seconds, columns([None, ONE, ONE]))
ACCURACIES = [None, 0.975, 0.99]


def test_a_run_tells_its_totals():
    rows = {name: more for name, *more in totals.run_rows(KNOWN)}
    assert rows["sent by clients"] == ["12 MB", "models 30 kB, smashed data 12 MB, labels 750 B"]
    assert rows["sent by the server"] == ["9.03 MB", "models 30 kB, gradients 9 MB"]
    assert rows["computed by clients"][0] == "15 TFLOP"
    assert rows["computed by the server"][0] == "18 PFLOP"
    assert rows["most memory of a client"][0] == "9 kB"
    assert rows["most memory of the server"][0] == "2 GB"


def test_methods_are_side_by_side_and_what_is_not_known_is_a_dash():
    clocks = {"exact": KNOWN, "no_split": UNKNOWN}
    titles, own, other = totals.method_rows(clocks)
    assert titles[1:3] == ("up", "down")
    assert own == ("exact", "12 MB", "9.03 MB", "15 TFLOP", "18 PFLOP", "9 kB", "2 GB")
    assert other == ("no_split", *6 * (words.NONE,))
    lines = totals.text([titles, own, other]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_an_accuracy_was_reached_after_seconds_and_bytes():
    titles, own, other = totals.accuracy_rows({"exact": KNOWN, "greedy": UNKNOWN}, ACCURACIES)
    assert titles[1:] == ("97 % accuracy", "98 % accuracy", "99 % accuracy")
    assert own == ("exact", "4.00 s, 14 MB", "6.00 s, 21.1 MB", "6.00 s, 21.1 MB")
    assert other == ("greedy", "4.00 s, -", "6.00 s, -", "6.00 s, -")
    titles, own = totals.accuracy_rows({"exact": KNOWN}, [0.15, None, 0.13])
    assert titles[1:] == ("10 % accuracy", "20 % accuracy", "30 % accuracy")
    assert own == ("exact", "2.00 s, 7.02 MB", words.NONE, words.NONE)
    never = totals.accuracy_rows({"exact": KNOWN, "greedy": KNOWN}, [0.05, None, 0.09])
    assert never[1:] == [("not reached", *3 * (words.NONE,))]


@pytest.mark.parametrize(
    ("best", "targets"),
    [
        (None, (0.1, 0.2, 0.3)), (0.3, (0.1, 0.2, 0.3)), (0.55, (0.3, 0.4, 0.5)),
        (0.9916, (0.97, 0.98, 0.99)), (1.0, (0.98, 0.99, 0.995)),
    ],
)  # fmt: skip
def test_the_accuracies_that_a_table_tells_are_the_highest_that_were_reached(best, targets):
    assert totals.targets([None, best, 0.02]) == targets


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (123_456, "123 kB"), (2e21, "2e+03 EB"), (np.nan, "-")],
)
def test_amounts_have_three_digits_and_a_prefix(number, text):
    assert words.amount(number, "B") == text
