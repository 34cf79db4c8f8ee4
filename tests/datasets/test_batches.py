import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl_jax.datasets import batches, max_steps, session_steps

PARTS = [np.arange(start, start + size) for start, size in ((0, 10), (10, 3), (13, 25), (38, 1), (39, 8))]
ASKED = {"seed": 3, "round": 5, "local_epochs": 2, "batch_size": 4}


def drawn(ids, parts=PARTS, steps_max=20, **changes):
    return batches(parts, ids, steps_max=steps_max, **(ASKED | changes))


def test_steps_by_hand():
    """⌊D/4⌋ batches per epoch, at least one; two epochs."""
    assert session_steps(PARTS, 2, 4).tolist() == [4, 2, 12, 2, 4]
    assert max_steps(PARTS, 2, 4) == 12
    assert max_steps(PARTS, 1, 100) == 1
    indices, steps = drawn([2, 0])
    assert steps.tolist() == [12, 4]
    assert (indices.shape, indices.dtype, steps.dtype) == ((2, 20, 4), np.int32, np.int32)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 12),
    round=st.integers(0, 1000),
    data=st.data(),
)
def test_every_epoch_is_a_permutation_of_the_clients_own_samples(sizes, epochs, batch_size, round, data):
    order = np.random.default_rng(0).permutation(sum(sizes)) + 1  # from 1, so that 0 is only padding
    parts = np.split(order, np.cumsum(sizes)[:-1])
    ids = data.draw(st.lists(st.integers(0, len(parts) - 1), unique=True, min_size=1))
    room = max_steps(parts, epochs, batch_size) + data.draw(st.integers(0, 3))
    asked = {"local_epochs": epochs, "batch_size": batch_size, "round": round}
    indices, steps = drawn(ids, parts, room, **asked)
    for row, count, client in zip(indices, steps, ids, strict=True):
        size, part = sizes[client], set(parts[client].tolist())
        assert not row[count:].any()
        assert count == epochs * max(size // batch_size, 1)
        for epoch in row[:count].reshape(epochs, -1):
            assert set(epoch.tolist()) <= part
            if size >= batch_size:
                assert len(set(epoch.tolist())) == size // batch_size * batch_size
            else:
                times = np.unique(epoch, return_counts=True)[1]
                assert len(times) == size
                assert times.max() - times.min() <= 1
                np.testing.assert_array_equal(epoch[size:], epoch[:-size])


def test_a_client_gets_the_same_numbers_in_whatever_company():
    alone = {client: drawn([client])[0][0] for client in range(5)}
    for ids in ([0, 1, 2, 3, 4], [4, 2, 0], np.array([3, 1])):
        for row, client in zip(drawn(ids)[0], ids, strict=True):
            np.testing.assert_array_equal(row, alone[int(client)])
    more = [*PARTS[:2], np.arange(500, 700), *PARTS[3:]]
    np.testing.assert_array_equal(drawn([4], more, 200)[0][0, :20], alone[4])
    np.testing.assert_array_equal(drawn([2], steps_max=12)[0][0], alone[2][:12])


def test_seed_round_client_and_epoch_each_change_the_order():
    twins = [np.arange(30)] * 2
    rows = {
        "base": drawn([0], twins)[0][0],
        "seed": drawn([0], twins, seed=4)[0][0],
        "round": drawn([0], twins, round=6)[0][0],
        "client": drawn([1], twins)[0][0],
        "swapped": drawn([0], twins, seed=5, round=3)[0][0],
    }
    epochs = [epoch for row in rows.values() for epoch in row[:14].reshape(2, -1)]
    assert len({epoch.tobytes() for epoch in epochs}) == len(epochs)
    np.testing.assert_array_equal(drawn([0], twins)[0][0], rows["base"])


def test_orders_are_uniform():
    """Each of the 6 orders of three samples, in 3000 rounds, by chi square (5 degrees, 1e-6: 35.9)."""
    orders = [
        drawn([0], [np.arange(3)], 1, round=r, local_epochs=1, batch_size=3)[0].tobytes() for r in range(3000)
    ]
    counts = np.unique(orders, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 35.9


def test_nobody_and_too_little_room():
    indices, steps = drawn([])
    assert (indices.shape, steps.shape) == ((0, 20, 4), (0,))
    with pytest.raises(ValueError, match="steps_max=11: a session has 12 steps"):
        drawn([2], steps_max=11)
