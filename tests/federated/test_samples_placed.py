"""Samples stay on a device if they fit. If not, a round sends the rows that it needs."""

import math
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from federated import rounds

from sfl_jax import datasets, fleet
from sfl_jax.datasets import rows
from sfl_jax.errors import BadInput
from sfl_jax.federated import devices
from sfl_jax.federated.balance import fill_chunks
from sfl_jax.federated.round import Model
from sfl_jax.federated.session import Samples
from sfl_jax.models import Chain
from sfl_jax.run import metrics


class Linear(nn.Module):
    """A network that compiles fast."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(x.reshape(len(x), -1))


HERE = jax.devices()[:1]
TINY = Chain((Linear(),))
TRAINING = rounds.training(chain=TINY)
KEY = jax.random.key(7)


def noise(count):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 4, 4, 1), np.uint8)
    return Samples(images, rng.integers(0, 10, count).astype(np.int32))


def work(seed=0, samples=64):
    own = rounds.assignments([1] * 3, steps=[2, 1, 2], seed=seed)
    return own._replace(batches=own.batches % samples)


def arguments(samples, own, free_bytes):
    model = devices.replicate(Model.of(rounds.start(TINY, size=4)[0]), HERE)
    return model, devices.place_samples(samples, HERE, free_bytes), own, KEY, rounds.RATE


@pytest.fixture(scope="module")
def resident():
    return devices.Rounds(TRAINING, 2, HERE)


@pytest.fixture(scope="module")
def sending():
    return devices.Rounds(TRAINING, 2, HERE)


def test_samples_stay_where_half_of_the_memory_holds_them():
    samples = noise(100)
    total = 100 * (4 * 4 * 1 + 4)
    assert isinstance(devices.place_samples(samples, HERE, 2 * total).images, jax.Array)
    assert devices.place_samples(samples, HERE, 2 * total - 2) is samples


def test_a_process_places_on_its_own_devices():
    of_processes = [SimpleNamespace(process_index=index) for index in (1, 0, 0)]
    assert devices._indices_here(of_processes) == [1, 2]


def test_what_is_placed_is_donated_without_its_source():
    source = jax.numpy.ones(8)
    placed = devices.replicate(source, HERE)
    jax.jit(lambda x: 2 * x, donate_argnums=0)(placed)
    assert placed.is_deleted()
    assert source.sum() == 8


def test_images_in_a_file_are_checked_before_they_stay(tmp_path):
    few = noise(5)
    mapped = np.memmap(tmp_path / "images", np.uint8, "w+", shape=few.images.shape)
    mapped[:] = few.images
    sums = rows.checksums(few.images)
    kept = devices.place_samples(few._replace(images=rows.checked(mapped, sums)), HERE)
    np.testing.assert_array_equal(kept.images, few.images)
    sums[3] += 1
    with pytest.raises(BadInput, match="damaged"):
        devices.place_samples(few._replace(images=rows.checked(mapped, sums)), HERE)


def test_samples_that_are_placed_are_no_part_of_what_a_round_needs(resident):
    few, many = noise(64), noise(6400)
    assert devices.bytes_placed(few) == 0
    placed = arguments(many, work(), math.inf)
    assert devices.bytes_placed(placed[1]) == 6400 * 20
    need = resident.bytes_needed(*placed)
    assert need == resident.bytes_needed(*arguments(few, work(), math.inf))
    # It holds the mean, and the parameters, gradients and momentum of two clients at once.
    assert need > 7 * devices.bytes_placed(placed[0]) > 0


def test_what_is_sent_is_needed_twice(resident, sending):
    """The next round's samples may arrive while a round still reads its own."""
    stays, sent = (
        run.bytes_needed(*arguments(noise(64), work(), free))
        for run, free in ((resident, math.inf), (sending, 0))
    )
    arranged, _ = fill_chunks(work(), 2, 1)
    room = devices.room(arranged, 64, 1)
    assert room == 32
    assert sent - stays == pytest.approx(2 * room * 20, abs=200)
    assert stays > 2 * sum(x.nbytes for x in jax.tree.leaves(arranged))


def test_sending_changes_no_bit(resident, sending):
    results = [run(*arguments(noise(64), work(), free)) for run, free in ((resident, math.inf), (sending, 0))]
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert np.isfinite(results[0][1])


def test_rounds_of_few_samples_compile_nothing_new(sending):
    sending.bytes_needed(*arguments(noise(64), work(), 0))  # 32 rows
    with metrics.CompileClock() as clock:
        for count in (3, 30, 7, 11, 2):
            jax.block_until_ready(sending(*arguments(noise(64), work(seed=count, samples=count), 0)))
    assert clock.compilations == 0


@pytest.mark.parametrize("name", ["iid", "quantity"])
def test_several_devices_are_sent_little_more_than_they_need(name):
    """100 clients of MNIST, ten a round on four devices, in few shapes.

    Each device gets less than twice what the one with the most needs. Room for the longest possible sessions
    would be 232,320 rows under quantity (S = 121).
    """
    labels = np.random.default_rng(0).integers(0, 10, 60_000)
    parts = datasets.partition(labels, 100, name=name, alpha=0.5, seed=0)
    sent, shapes = 0, set()
    for round in range(5):
        ids = fleet.cohort(0, round, 100, 10)
        batches, steps = datasets.batches(
            parts, ids, seed=0, round=round, local_epochs=1, batch_size=32,
            steps_max=datasets.max_steps(parts, 1, 32),
        )  # fmt: skip
        own = rounds.assignments([1] * 10, steps=steps)._replace(batches=batches)
        arranged, _ = fill_chunks(own, 2, 4)
        room = devices.room(arranged, len(labels), 4)
        own = [devices._part(arranged, device, 4) for device in range(4)]
        needed = [len(np.unique(one.batches[devices._are_used(one)])) for one in own]
        assert max(needed) <= room < 2 * max(needed)
        sent, shapes = sent + 4 * room, shapes | {room}
    assert sent <= 232_320 * (0.75 if name == "quantity" else 0.2)
    assert len(shapes) <= 3


def test_a_device_never_has_room_for_more_than_it_can_use():
    arranged, _ = fill_chunks(work(), 2, 1)
    assert devices.room(arranged, 20, 1) == 20
    one = jax.tree.map(lambda x: x[:1, :3] if x.ndim > 1 else x[:1], work())
    assert devices.room(one._replace(batches=one.batches[:, :, :3]), 64, 1) == 6
    idle = arranged._replace(steps=np.zeros_like(arranged.steps))
    assert devices.room(idle, 20, 1) == 1
