"""Schemes and codecs in a `Run`: the plan is what is trained, and impossible combinations are refused."""

import dataclasses

import finite
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from run import test_run

import sfl_jax as sfl
from sfl_jax import codecs, optim, planning
from sfl_jax.errors import BadInput
from sfl_jax.federated import protocol
from sfl_jax.run import rounds, wires
from sfl_jax.schemes.psl import Psl
from sfl_jax.schemes.sfl_v2 import SflV2
from sfl_jax.schemes.sl import Sl


class Layer(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        return jnp.tanh(nn.Dense(self.features)(x.reshape(len(x), -1)))


UNITS = [Layer(12), Layer(6), Layer(4)]
PLANNER = sfl.Planner(server_flops=1e12)
JOINED = Psl(server_batch="joined")


def make(**changes):
    usual = {"chain": sfl.Chain(UNITS), "planner": PLANNER, "execution": sfl.Execution()}
    return test_run.make(**usual | changes)


def small_clients():
    """Clients whose memory does not hold the whole network."""
    *_, most, whole = make().parts.terms.needed_bytes
    return dataclasses.replace(test_run.FLEET, memory_bytes=np.full(9, (most + whole) / 2))


@pytest.mark.parametrize(
    ("scheme", "barrier"),
    [
        pytest.param(SflV2(), "in_turn", marks=pytest.mark.slow),
        ("sl", "handover"),
        pytest.param(Psl(most=2), "lockstep", marks=pytest.mark.slow),
    ],
    ids=["sfl_v2", "sl", "psl"],
)
def test_a_scheme_trains_under_its_own_clock_and_goes_on_where_it_was(tmp_path, scheme, barrier):
    whole = make(scheme=scheme)
    lines = test_run.trained(whole, 4)
    assert whole.parts.planner.barrier == barrier
    plan = whole.plan()
    assert plan.plan.bound_s <= plan.plan.round_s * (1 + 1e-9)
    columns = plan.terms.columns(plan.plan.cuts, plan.plan.codecs)
    again_s = optim.round_seconds(plan.terms, columns, PLANNER.server_flops, barrier)
    assert plan.plan.round_s == pytest.approx(again_s, rel=1e-9)
    half = make(scheme=scheme)
    test_run.trained(half, 2)
    half.save(tmp_path)
    restored = sfl.Run.restore(tmp_path, **half_parts(scheme))
    assert test_run.trained(restored, 2) == lines[2:]
    finite.assert_equal(restored.variables, whole.variables)
    with pytest.raises(BadInput, match="was saved with another scheme"):
        sfl.Run.restore(tmp_path, **half_parts("sfl"))


def half_parts(scheme):
    return test_run.given(chain=sfl.Chain(UNITS), planner=PLANNER, execution=sfl.Execution(), scheme=scheme)


def test_the_order_of_clients_is_drawn_anew_every_round():
    run = make(scheme="sl")
    turns = [rounds.prepare(run.parts, number).assignments.turn for number in (0, 1, 2)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert make().parts.scheme.has_order is False


def test_a_plan_may_choose_a_codec_for_every_client():
    small = small_clients()
    run = make(codec=("float32", "int8", "int8"), fleet=small)
    assert len(run.parts.training.codecs) == 2, "named twice, it is one choice"
    cheap, dear = (make(codec=one, fleet=small).plan().plan.round_s for one in ("int8", "float32"))
    both = run.plan()
    assert both.plan.round_s <= min(cheap, dear) * (1 + 1e-9)
    crossing = (both.plan.cuts > 0) & (both.plan.cuts < len(UNITS))
    assert crossing.any()
    assert both.plan.codecs[crossing].any(), "fewer bits are sent sooner"
    assert not both.plan.codecs[~crossing].any()
    [line] = test_run.trained(run, 1)
    assert np.isfinite(line.train_loss)


def test_bits_of_a_plan_are_those_of_the_messages():
    up, down = codecs.create("int8"), codecs.create("topk:0.5")
    run = make(codec=up, codec_down=down)
    profile, chain = run.parts.profile, run.parts.training.chain
    wire = wires.wires(((up, down),), profile)["int8"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 12)), jnp.float32)
    for codec, bits in ((up, wire.up_bits), (down, wire.down_bits)):
        payload = codec.encode(x, jax.random.key(0))
        assert 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(payload)) == 5 * bits[1]
    terms, labels = run.parts.terms, 32
    np.testing.assert_array_equal(terms.up_bits[1:3], wire.up_bits[1:3] + labels)
    np.testing.assert_array_equal(terms.down_bits[1:3], wire.down_bits[1:3])
    assert len(chain) == 3


def protocol_of(run, number=0, **codecs):
    """(the protocol's world in a run's first round, the work of its clients, the prepared round)"""
    parts, begun = run.parts, run.variables
    chain, prepared = parts.training.chain, rounds.prepare(run.parts, number)
    world = protocol.World(
        chain.in_form("conv").units, [chain.unit_variables(begun, unit) for unit in range(len(chain))],
        optax.sgd(0.3, momentum=0.5), lambda x: parts.training.preprocess(jnp.asarray(x)),
        jnp.asarray(parts.data.train_images), jnp.asarray(parts.data.train_labels),
        planning.round_key(parts.seed, number, planning.TRAINING), **codecs,
    )  # fmt: skip
    works = [
        protocol.ClientWork(int(client), int(cut), float(weight), batches[:steps])
        for client, cut, weight, steps, batches in zip(*prepared.assignments[:5], strict=True)
    ]
    return world, works, prepared


@pytest.mark.slow
def test_training_sends_what_the_codec_says():
    """A compiled round of sfl against the protocol with the same codec."""
    codec = codecs.create("int8")
    run = make(codec=codec, optimizer=optax.sgd(0.3, momentum=0.5), fleet=small_clients())
    world, works, prepared = protocol_of(run, up=codec.transmit, down=codec.transmit)
    assert ((prepared.assignments.cut > 0) & (prepared.assignments.cut < 3)).any()
    [line] = test_run.trained(run, 1)
    assert {**line._asdict(), **prepared.ledger._asdict()} == line._asdict()
    expected, *_ = protocol.run_round(world, works)
    chain = run.parts.training.chain
    found = [chain.unit_variables(run.variables, unit)["params"] for unit in range(3)]
    plain, *_ = protocol.run_round(dataclasses.replace(world, up=lambda x, k: x, down=lambda g, k: g), works)

    def apart(other):
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves([unit["params"] for unit in other]), strict=True)
        return max(float(np.abs(a - b).max()) for a, b in pairs)

    # Rounding may move a number to the next step. The codec itself moves every number.
    assert apart(expected) < 0.1 * apart(plain)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"scheme": "sl", "devices": 2}, "devices=2: must be 0 or 1 with scheme=sl"),
        ({"scheme": "sl", "faults": sfl.Faults(deadline_factor=2.0)}, "deadline_factor=2: must be 0"),
        ({"scheme": "sl", "execution": sfl.Execution("auto", 3)}, "clients_per_chunk=3: must be 0 or 1 with"),
        ({"scheme": "psl", "planner": sfl.Planner(barrier="staged")}, "barrier=staged: must be session"),
        ({"scheme": JOINED, "skip_diverged": True}, "on_divergence=skip_client: must be stop"),
        ({"scheme": JOINED, "faults": sfl.Faults(0.5)}, "drop_probability=0.5: must be 0"),
        ({"scheme": Psl(most=2), "planner": sfl.Planner(min_cut=3)}, "max_cut=2: the chain has 3 units"),
        ({"scheme": Sl(tail_units=3)}, "tail_units=3: must be 0 to 2"),
        ({"codec": "int9"}, "codec=int9: must be one of float32"),
        ({"codec": "topk:2"}, "codec=topk:2"),
    ],
)  # fmt: skip
def test_what_a_scheme_cannot_do_is_refused_in_a_line(changes, line):
    with pytest.raises(BadInput) as caught:
        make(**changes)
    assert str(caught.value).startswith(line)
