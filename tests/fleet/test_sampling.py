"""Who is asked in a round: frequencies against the probabilities asked, and traces of availability."""

import collections

import numpy as np
import pytest

from sfl_jax.errors import BadInput
from sfl_jax.fleet import Sampling, cohort, read_availability

SAMPLES = np.array([10, 20, 30, 40])
NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def trace(tmp_path):
    def write(*lines, header="client,from_round,until_round"):
        path = tmp_path / "trace.csv"
        path.write_text("\n".join((header, *lines)) + "\n")
        return path

    return write


def test_uniform_without_a_trace_draws_as_ever():
    for round in range(5):
        ids, available = Sampling().cohort(3, round, SAMPLES, 2)
        np.testing.assert_array_equal(ids, cohort(3, round, 4, 2))
        assert available.all()


def test_by_size_the_first_client_comes_in_proportion_to_its_samples():
    seen = collections.Counter(
        int(Sampling("size").cohort(0, round, SAMPLES, 1)[0][0]) for round in range(4000)
    )
    shares = np.array([seen[k] for k in range(4)]) / 4000
    np.testing.assert_allclose(shares, SAMPLES / SAMPLES.sum(), atol=0.03)


def test_by_size_pairs_come_as_drawn_one_after_the_other():
    """Without replacement: P(i, then j) = p_i · p_j / (1 − p_i)."""
    p = SAMPLES / SAMPLES.sum()
    expected = {
        (i, j): p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])) for i in range(4) for j in range(i + 1, 4)
    }
    seen = collections.Counter(
        tuple(Sampling("size").cohort(1, round, SAMPLES, 2)[0].tolist()) for round in range(6000)
    )
    for pair, probability in expected.items():
        assert abs(seen[pair] / 6000 - probability) < 0.025, pair


def test_weights_follow_the_way_of_drawing():
    np.testing.assert_array_equal(Sampling().weights(SAMPLES), SAMPLES)
    np.testing.assert_array_equal(Sampling("size").weights(SAMPLES), np.ones(4))


def test_a_trace_says_who_is_available(trace):
    path = trace("b,2,3", "b, 5 ,", "c,1,1", "")
    own = read_availability(path, NAMES)
    there = [own.available(round).tolist() for round in range(6)]
    assert [x[1] for x in there] == [False, True, True, False, True, True]
    assert [x[2] for x in there] == [True] + [False] * 5
    assert all(x[0] and x[3] for x in there)
    sampling = Sampling("uniform", own)
    for round in range(6):
        ids, available = sampling.cohort(0, round, SAMPLES, 3)
        assert available.sum() == min(3, sum(there[round]))
        np.testing.assert_array_equal(available, np.array(there[round])[ids])
        assert (np.diff(ids) > 0).all()
    assert sampling.digest != Sampling().digest


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["x,1,2"], r"trace.csv:2: column client: 'x': must be a client of the fleet"),
        (["a,0,2"], r"trace.csv:2: client a: column from_round: '0': must be an integer, at"),
        (
            ["a,1,2", "b,3,2"],
            r"trace.csv:3: client b: column until_round: '2': must be an integer, at lea",
        ),
        (["a,1"], r"trace.csv:2: column until_round: missing; a line has 3 cells"),
        (["a,1.5,2"], r"column from_round: '1.5'"),
        ([f"a,{'9' * 5000},"], r"column from_round: '9{39}…': must be an integer, at least 1$"),
        ([], r"trace.csv:2: no rows; must have one for each span of rounds"),
    ],
)
def test_a_wrong_line_is_named(trace, lines, said):
    with pytest.raises(BadInput, match=said):
        read_availability(trace(*lines), NAMES)


def test_other_columns_other_ways_and_missing_files_are_refused(trace, tmp_path):
    with pytest.raises(BadInput, match=r"trace.csv:1: column 'round': must be one of client, from_round"):
        read_availability(trace(header="client,round"), NAMES)
    with pytest.raises(BadInput, match="No such file"):
        read_availability(tmp_path / "none.csv", NAMES)
    with pytest.raises(BadInput, match="sampling=best: must be one of uniform, size"):
        Sampling("best")
    with pytest.raises(BadInput, match="cohort_size=5: must be 1 to 4"):
        Sampling("size").cohort(0, 0, SAMPLES, 5)
