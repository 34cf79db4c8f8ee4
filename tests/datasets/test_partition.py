import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl_jax.commands.config import AUTO, PARTITIONS
from sfl_jax.datasets import partition
from sfl_jax.errors import BadInput
from sfl_jax.registry import PARTITIONS as REGISTERED

ALL = tuple(REGISTERED)
NAMES = tuple(name for name in ALL if name != "fleet")  # fleet has its own rule


def balanced(samples, classes=10):
    """Equally many labels of each class, in random order."""
    return np.random.default_rng(7).permutation(np.arange(samples) % classes).astype(np.int32)


def class_shares(labels, parts):
    """The share of every class that each client owns; (K, classes)."""
    counts = np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])
    return counts / counts.sum(0)


def sizes(parts):
    return np.array([len(part) for part in parts])


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    clients=st.integers(1, 60),
    name=st.sampled_from(NAMES),
    alpha=st.sampled_from([1e-300, 1e-6, 0.1, 1.0, 1e9]),
    shards=st.integers(1, 3),
    least=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
)
def test_parts_are_disjoint_complete_sorted_and_of_a_least_size(
    labels, clients, name, alpha, shards, least, seed
):
    labels = np.array(labels)
    clients = min(clients, len(labels) // max(least, shards if name == "shards" else 1))
    if not clients:
        return
    asked = {"name": name, "alpha": alpha, "shards_per_client": shards, "seed": seed}
    asked["min_samples"] = least
    parts = partition(labels, clients, **asked)
    assert len(parts) == clients
    assert all(len(part) >= least and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    for part, again in zip(parts, partition(labels, clients, **asked), strict=True):
        np.testing.assert_array_equal(part, again)


def test_flags_offer_every_scheme():
    assert (AUTO, *ALL) == PARTITIONS


@pytest.mark.parametrize("name", NAMES)
def test_seed_matters(name):
    labels = balanced(500)
    one, other = (partition(labels, 5, name=name, seed=seed) for seed in (1, 2))
    assert not np.array_equal(np.concatenate(one), np.concatenate(other))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "quantity"])
def test_who_gets_a_sample_has_nothing_to_do_with_its_place(name):
    parts = partition(np.zeros(10_000, int), 2, name=name, alpha=5.0)
    for part in parts:
        assert part.mean() == pytest.approx(5000, abs=5 * 2887 / np.sqrt(len(part)))


def test_iid_has_equal_sizes_and_every_client_sees_every_class():
    labels = balanced(6007)
    parts = partition(labels, 10)
    assert set(sizes(parts)) == {600, 601}
    assert abs(class_shares(labels, parts) - 0.1).max() < 0.05


def test_dirichlet_shares_of_a_class_follow_the_distribution():
    """Mean 1/K, variance (1/K)(1 - 1/K) / (alpha K + 1), independent between classes."""
    clients, alpha, labels = 20, 0.3, balanced(200_000, classes=200)
    shares = class_shares(labels, partition(labels, clients, name="dirichlet", alpha=alpha))
    assert shares.mean() == pytest.approx(1 / clients, rel=1e-9)
    spread = (1 - 1 / clients) / clients / (alpha * clients + 1)
    assert shares.var() == pytest.approx(spread, rel=0.15)
    assert shares.mean(1) == pytest.approx(1 / clients, abs=5 * np.sqrt(spread / 200))
    between = np.corrcoef(shares[:, :50].T)[np.triu_indices(50, 1)]
    assert abs(between.mean()) < 0.05


def test_alpha_is_a_dial_from_unlike_to_alike():
    labels = balanced(10_000)
    largest = [
        class_shares(labels, partition(labels, 10, name="dirichlet", alpha=alpha)).max(0).mean()
        for alpha in (0.01, 0.1, 1, 10, 1000)
    ]
    assert largest == sorted(largest, reverse=True)
    assert largest[0] > 0.8
    assert largest[-1] < 0.12


def test_shards_give_each_client_few_classes_and_equal_sizes():
    labels = balanced(6000)
    parts = partition(labels, 100, name="shards", shards_per_client=2)
    assert set(sizes(parts)) == {60}
    classes = [len(np.unique(labels[part])) for part in parts]
    assert max(classes) <= 2
    assert np.mean(classes) > 1.5  # a client's two shards have the same class one time in ten


def test_quantity_skews_sizes_and_not_classes():
    labels = balanced(100_000)
    parts = partition(labels, 20, name="quantity", alpha=0.5)
    share = sizes(parts) / len(labels)
    assert share.std() == pytest.approx(np.sqrt(0.05 * 0.95 / 11), rel=0.5)
    mixed = np.array(
        [np.bincount(labels[part], minlength=10) / len(part) for part in parts if len(part) > 2000]
    )
    assert abs(mixed - 0.1).max() < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_as_many_clients_as_samples_get_one_each(name):
    parts = partition(balanced(50), 50, name=name, alpha=0.01, shards_per_client=1)
    assert set(sizes(parts)) == {1}


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=12), left=st.integers(0, 9), seed=st.integers(0)
)
def test_a_fleet_owns_as_many_as_it_says_in_random_order(counts, left, seed):
    labels = np.zeros(sum(counts) + left, int)
    asked = {"name": "fleet", "samples": np.array(counts), "seed": seed}
    parts = partition(labels, len(counts), **asked)
    assert sizes(parts).tolist() == counts
    assert all((np.diff(part) > 0).all() for part in parts)
    owned = np.concatenate(parts)
    assert len(np.unique(owned)) == sum(counts)
    assert set(owned.tolist()) <= set(range(len(labels)))
    for part, again in zip(parts, partition(labels, len(counts), **asked), strict=True):
        np.testing.assert_array_equal(part, again)


def test_what_a_fleet_owns_has_nothing_to_do_with_its_place():
    asked = {"name": "fleet", "samples": np.array([2000, 1000, 2000])}
    for part in partition(np.zeros(10_000, int), 3, **asked):
        assert part.mean() == pytest.approx(5000, abs=5 * 2887 / np.sqrt(len(part)))
    ones, others = (partition(np.zeros(10_000, int), 3, **asked, seed=seed) for seed in (1, 2))
    assert not np.array_equal(ones[0], others[0])


@pytest.mark.parametrize("least", [1, 2, 5])
def test_the_poor_are_fed_by_the_largest(least):
    """Compares with a loop that moves one sample at a time from the client with the most."""
    labels = np.zeros(80, int)
    rng = np.random.default_rng([3, NAMES.index("quantity")])
    counts = np.diff(np.rint(np.cumsum(rng.dirichlet(np.full(15, 0.05))) * 80).astype(int), prepend=0)
    assert (counts < least).sum() > 5
    poor = np.flatnonzero(counts < least)
    for client in poor:
        while counts[client] < least:
            counts[counts.argmax()] -= 1
            counts[client] += 1
    got = sizes(partition(labels, 15, name="quantity", alpha=0.05, seed=3, min_samples=least))
    assert sorted(got) == sorted(counts)
    assert (got[poor] == least).all()


@pytest.mark.parametrize(("name", "alpha"), [("dirichlet", 0.2), ("quantity", 0.4)])
def test_nobody_loses_but_who_has_most(name, alpha):
    """A client that neither needs nor gives samples keeps its own."""
    labels, asked = balanced(2000), {"name": name, "alpha": alpha, "seed": 1}
    before, after = (partition(labels, 40, **asked, min_samples=least) for least in (1, 20))
    poor, gave = sizes(before) < 20, sizes(after) < sizes(before)
    assert 5 < poor.sum() < 35
    assert (sizes(after)[poor] == 20).all()
    for mine, own, was_poor in zip(after, before, poor, strict=True):
        assert was_poor or set(mine) <= set(own)
    assert sizes(after)[gave].min() >= sizes(after)[~gave].max() - 1


def test_what_the_poor_are_given_is_of_every_class_although_the_set_is_sorted():
    labels = np.repeat(np.arange(10), 1000)
    asked = {"name": "quantity", "alpha": 0.05, "min_samples": 100}
    parts = [part for part in partition(labels, 20, **asked) if len(part) == 100]
    assert len(parts) > 5
    assert min(len(np.unique(labels[part])) for part in parts) >= 8


def test_one_sample_each_is_divided_as_ever():
    """With min_samples=1 the draw is the one before min_samples existed."""
    parts = partition(balanced(60), 12, name="quantity", alpha=0.1, seed=4)
    assert sizes(parts).tolist() == [1, 1, 1, 37, 6, 4, 1, 1, 1, 5, 1, 1]
    assert [part.sum() for part in parts] == [28, 59, 27, 934, 244, 116, 58, 56, 53, 92, 52, 51]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"clients": 11}, "clients=11: must be 1 to 10, the number of training samples"),
        ({"clients": 0}, "clients=0: must be 1 to 10"),
        ({"clients": -3}, "clients=-3: must be 1 to 10"),
        ({"name": "even"}, "partition=even: must be one of iid, dirichlet, shards, quantity, fleet"),
        ({"name": "dirichlet", "alpha": 0.0}, "dirichlet_alpha=0.0: must be a positive number"),
        ({"name": "quantity", "alpha": float("nan")}, "dirichlet_alpha=nan"),
        ({"name": "dirichlet", "alpha": float("inf")}, "dirichlet_alpha=inf"),
        ({"min_samples": 6}, "min_samples=6: must be 1 to 5 for 2 clients and 10 samples"),
        ({"min_samples": 0}, "min_samples=0: must be 1 to 5"),
        (
            {"name": "fleet", "samples": np.array([3, 1]), "min_samples": 2},
            "min_samples=2: client 1 of the fleet has 1 samples; give it more, or",
        ),
        ({"name": "fleet"}, "partition=fleet: needs the samples of 2 clients, at least 1 each"),
        ({"name": "fleet", "samples": np.array([1])}, "partition=fleet: needs the samples of 2 clients"),
        ({"name": "fleet", "samples": np.array([1, 0])}, "partition=fleet: needs the samples of 2"),
        (
            {"name": "fleet", "samples": np.array([9, 2])},
            "partition=fleet: the clients have 11 samples in all",
        ),
        ({"name": "shards", "shards_per_client": 6}, "shards_per_client=6: must be 1 to 5"),
        ({"name": "shards", "shards_per_client": 0}, "shards_per_client=0: must be 1 to 5"),
    ],
)
def test_bad_input(asked, message):
    with pytest.raises(BadInput) as caught:
        partition(balanced(10), **({"clients": 2} | asked))
    assert str(caught.value).startswith(message)
