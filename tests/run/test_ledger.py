"""The ledger of a round against a protocol of two parties: what they sent, held and computed."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from run import test_run, test_schemes

import sfl_jax as sfl
from sfl_jax import codecs
from sfl_jax.federated import protocol, protocol_schemes
from sfl_jax.federated.protocol import SERVER
from sfl_jax.federated.protocol_statistics import estimate_statistics
from sfl_jax.federated.reestimation import BATCHES
from sfl_jax.run.ledger import Ledger, columns, ledger, sent_bytes, totals
from sfl_jax.run.rounds import cohort
from sfl_jax.schemes.psl import Psl
from sfl_jax.schemes.sfl import Fl, Sfl
from sfl_jax.schemes.sfl_v2 import SflV2
from sfl_jax.schemes.sl import Sl

BATCH, PROXIMAL = test_run.given()["batch_size"], 0.3
CODEC = codecs.create("int8")


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return jnp.tanh(nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x)))


# No size but that of the batch is a multiple of BATCH.
UNITS = [test_schemes.Layer(12), Normed(), test_schemes.Layer(5), test_schemes.Layer(4)]
L = len(UNITS)
CASES = {
    "sfl": (Sfl(), (1, 2, 4)),
    "sfl, tail": (Sfl(tail_units=1), (0, 1, 4)),
    "fl": (Fl(), (4, 4, 4)),
    "sfl_v2 by client": (SflV2(), (3, 0, 2)),
    "sfl_v2 by step": (SflV2(order="step"), (1, 2, 4)),
    "sl": (Sl(), (3, 1, 2)),
    "sl, tail": (Sl(tail_units=2), (1, 0, 4)),
    "psl": (Psl(most=2), (0, 2, 1)),
    "psl, tail": (Psl(most=2, tail_units=1), (0, 2, 1)),
    "psl without shared units": (Psl(), (0, 2, 4)),
    "psl, joined": (Psl(most=2, server_batch="joined"), (0, 2, 1)),
}
QUICK = ("sfl, tail", "psl")


class Watch:
    """Notes the bytes of the arrays that a party holds when it has done a backward pass."""

    def __init__(self, monkeypatch):
        self.copies = collections.defaultdict(dict)  # holder -> copy -> bytes that last
        self.activations = collections.defaultdict(list)  # holder -> of each pass, copy -> bytes
        begin, backward = protocol.Copy.__init__, protocol.Party.backward

        def begin_marked(copy, *given):
            begin(copy, *given)
            copy.origin = object()  # which a twin of the copy has too

        def backward_noted(party, gradient):
            of_input = backward(party, gradient)
            lasting = {
                copy.origin: nbytes((copy.variables, copy.state, copy.gradient)) for copy in party.copies
            }
            self.copies[party.holder].update(lasting)
            self.activations[party.holder].append({copy.origin: of_batch(copy) for copy in party.copies})
            return of_input

        monkeypatch.setattr(protocol.Copy, "__init__", begin_marked)
        monkeypatch.setattr(protocol.Party, "backward", backward_noted)

    def peak_bytes(self, holder, together):
        """together: whether all passes are under way at the same time."""
        passes = self.activations[holder]
        largest = {copy: max(one.get(copy, 0) for one in passes) for one in passes for copy in one}
        one_by_one = max((sum(one.values()) for one in passes), default=0)
        return sum(self.copies[holder].values()) + (sum(largest.values()) if together else one_by_one)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def of_batch(copy):
    """The bytes that a copy's backward pass needs, without the parameters."""
    return nbytes(
        [leaf for leaf in jax.tree.leaves(copy.pullback) if leaf.shape and leaf.shape[0] % BATCH == 0]
    )


def begun(scheme, cuts, came=None, **changes):
    """(the ledger of a round with these cuts, the run's parts, the protocol's world, the clients' work)

    The second client does not come if it may be missing. The others have unequal numbers of steps.
    """
    sizes = np.full(9, 20) if scheme.needs_equal_steps else np.array([10, 20, 30, 10, 20, 30, 10, 20, 30])
    partition = np.split(np.arange(180), np.cumsum(sizes)[:-1])
    run = test_schemes.make(chain=sfl.Chain(UNITS), scheme=scheme, partition=partition, **changes)
    world, works, prepared = test_schemes.protocol_of(run)
    came = np.array([True, scheme.needs_equal_steps, True]) if came is None else came
    works = [
        dataclasses.replace(work, cut=cut, weight=work.weight * here)
        for work, cut, here in zip(works, cuts, came, strict=True)
    ]
    plan = prepared.plan._replace(cuts=np.array(cuts, np.int32))
    return ledger(run.parts, cohort(run.parts, 0)[2], plan, came), run.parts, world, works


def run_round(scheme, world, works, skip_diverged=False):
    """What the parties of the protocol did in a round."""
    transport = protocol.Transport()
    shared = {"tail_units": scheme.tail_units, "skip_diverged": skip_diverged}
    order = range(len(works))
    if isinstance(scheme, Sfl):
        protocol.run_round(world, works, transport=transport, **shared)
    elif isinstance(scheme, SflV2):
        protocol_schemes.run_sfl_v2(world, works, order, scheme.order, transport=transport, **shared)
    elif isinstance(scheme, Sl):
        protocol_schemes.run_sl(world, works, order, transport=transport, **shared)
    else:
        protocol_schemes.run_psl(
            world, works, scheme.max_cut(L), scheme.server_batch, transport=transport, **shared
        )
    return transport


def flop(profile, transport, is_server):
    macs = {protocol.FORWARD: profile.forward_macs, protocol.BACKWARD: profile.backward_macs}
    of_passes = sum(
        2 * int(macs[direction][unit]) * samples
        for (holder, direction, unit), samples in transport.applied.items()
        if (holder == SERVER) == is_server
    )
    of_fedprox = sum(
        3 * int(profile.parameters[unit]) * times
        for (holder, unit), times in transport.pulled.items()
        if (holder == SERVER) == is_server
    )
    return of_passes + of_fedprox


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_ledger_is_what_the_parties_sent_held_and_computed(case, monkeypatch):
    scheme, cuts = CASES[case]
    found, parts, world, works = begun(scheme, cuts)
    watch = Watch(monkeypatch)
    transport = run_round(scheme, world, works)
    sent = transport.bytes
    clients = [work.client for work in works]
    together = isinstance(scheme, Sfl) or scheme.needs_equal_steps
    assert found == Ledger(
        model_down_bytes=sent[protocol.MODEL_DOWN],
        smashed_up_bytes=sent[protocol.SMASHED_UP] + sent[protocol.GRADIENT_UP],
        labels_up_bytes=sent[protocol.LABELS_UP],
        gradient_down_bytes=sent[protocol.GRADIENT_DOWN] + sent[protocol.FEATURES_DOWN],
        model_up_bytes=sent[protocol.MODEL_UP],
        client_peak_bytes=max(watch.peak_bytes(client, True) for client in clients),
        server_peak_bytes=watch.peak_bytes(SERVER, together),
        client_flop=flop(parts.profile, transport, False),
        server_flop=flop(parts.profile, transport, True),
    )
    whole = totals(columns([found]))
    assert whole["up_bytes"] + whole["down_bytes"] == sum(sent.values())
    assert (found.labels_up_bytes > 0) == (scheme.tail_units == 0 and min(cuts) < L)


def white_to_nan(images):
    return jnp.where((images == 255).all((1, 2, 3), keepdims=True), jnp.nan, images / 127.5 - 1)


def diverging(scheme, **changes):
    """A run in which one client sees a bad image in its second step."""
    sizes = np.array([10, 20, 30, 10, 20, 30, 10, 20, 30])
    given = {
        "chain": sfl.Chain(UNITS), "scheme": scheme, "skip_diverged": True, "preprocess": white_to_nan,
        "planner": sfl.Planner("random_cut", server_flops=1e12, min_cut=0),
        "partition": np.split(np.arange(180), np.cumsum(sizes)[:-1]), **changes,
    }  # fmt: skip
    _, works, _ = test_schemes.protocol_of(test_schemes.make(**given))
    bad = max(works, key=lambda work: len(work.batches))
    assert len(bad.batches) > 2
    data = test_run.DATA
    images = data.train_images.copy()
    images[bad.batches[1, 0]] = 255
    return test_schemes.make(**given, data=dataclasses.replace(data, train_images=images))


def assert_line_is(line, transport, profile):
    """The counts of a line are what the parties sent and computed."""
    sent = transport.bytes
    assert line.model_down_bytes == sent[protocol.MODEL_DOWN]
    assert line.smashed_up_bytes == sent[protocol.SMASHED_UP] + sent[protocol.GRADIENT_UP]
    assert line.labels_up_bytes == sent[protocol.LABELS_UP]
    assert line.gradient_down_bytes == sent[protocol.GRADIENT_DOWN] + sent[protocol.FEATURES_DOWN]
    assert line.model_up_bytes == sent[protocol.MODEL_UP]
    assert line.client_flop == flop(profile, transport, False)
    assert line.server_flop == flop(profile, transport, True)


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_fedprox_counts_where_its_term_is_computed(case):
    scheme, cuts = CASES[case]
    plain, *_ = begun(scheme, cuts)
    found, parts, world, works = begun(scheme, cuts, proximal=PROXIMAL)
    transport = run_round(scheme, dataclasses.replace(world, proximal=PROXIMAL), works)
    assert_line_is(found, transport, parts.profile)
    assert found.client_flop + found.server_flop > plain.client_flop + plain.server_flop


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Sfl(), Sfl(tail_units=3), Fl()], ids=["sfl", "tail", "fl"])
def test_statistics_that_are_estimated_again_are_those_of_the_parties_and_count(scheme):
    """Also where a client diverges: it has no part in them."""
    run = diverging(scheme, batch_norm="reestimated")
    world, works, _ = test_schemes.protocol_of(run)
    [line] = test_run.trained(run, 1)
    transport, shared = protocol.Transport(), {"tail_units": scheme.tail_units}
    variables, _, diverged = protocol.run_round(world, works, True, transport, **shared)
    before = transport.bytes[protocol.MODEL_DOWN]
    new = dataclasses.replace(world, variables=variables)
    sound = [work for work in works if work.client not in diverged]
    expected = estimate_statistics(new, sound, BATCHES, transport=transport, **shared)
    assert len(sound) == len(works) - 1
    assert transport.bytes[protocol.MODEL_DOWN] > before
    assert_line_is(line, transport, run.parts.profile)
    found = run.variables.batch_stats[1]
    for ours, theirs, old in zip(
        *map(jax.tree.leaves, (found, expected[1]["batch_stats"], variables[1]["batch_stats"])), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert np.abs(ours - old).max() > 1e-2


@pytest.mark.parametrize(
    "case",
    [
        name if name == "sfl, tail" else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
        if not CASES[name][0].needs_equal_steps  # which ends the run
    ],
)
def test_a_client_that_diverges_counts_what_it_sent_and_computed(case):
    """One sees a number that is not finite in its second of several steps. The line of a run counts this."""
    scheme, _ = CASES[case]
    run = diverging(scheme, proximal=PROXIMAL)
    world, works, planned = test_schemes.protocol_of(run, proximal=PROXIMAL)
    [line] = test_run.trained(run, 1)
    transport = run_round(scheme, world, works, skip_diverged=True)
    assert line.clients == len(works) - 1
    assert_line_is(line, transport, run.parts.profile)
    assert line.client_flop < planned.ledger.client_flop
    assert (line.model_up_bytes < line.model_down_bytes) == (case not in ("sl", "sl, tail"))


@pytest.mark.slow
def test_with_a_codec_the_payloads_count_and_nothing_else_changes():
    """With a tail, features and their gradient are coded too."""
    scheme, cuts = Sfl(tail_units=1), (2, 1, 1)
    plain, *_ = begun(scheme, cuts)
    coded, _, world, works = begun(scheme, cuts, codec=CODEC)
    sent = collections.Counter()

    def link(way):
        def send(x, key):
            sent[way] += nbytes(CODEC.encode(x, key))
            return CODEC.transmit(x, key)

        return send

    run_round(scheme, dataclasses.replace(world, up=link("up"), down=link("down")), works)
    assert 0 < sent["up"] < plain.smashed_up_bytes
    assert coded == plain._replace(smashed_up_bytes=sent["up"], gradient_down_bytes=sent["down"])


def test_a_client_that_holds_most_has_room_to_spare_in_its_plan():
    """The planner's limit and the ledger are one formula: a byte less, and the cut is not allowed."""
    found, parts, *_ = begun(Sfl(), (2, 1, 2))
    for bytes, allowed in ((found.client_peak_bytes, True), (found.client_peak_bytes - 1, False)):
        tight = parts.terms._replace(memory_bytes=np.full(9, float(bytes)))
        assert tight.column(2)[2].all() == allowed


def test_a_round_to_which_nobody_came_is_all_zeros():
    found, *_ = begun(Sfl(), (2, 1, 2), came=np.zeros(3, bool))
    assert found == Ledger(*9 * (0,))


def test_a_round_counts_those_who_came():
    run = test_schemes.make(chain=sfl.Chain(UNITS), faults=sfl.Faults(drop_probability=0.4))
    world, works, prepared = test_schemes.protocol_of(run)
    assert 0 < prepared.turnout.came.sum() < 3
    transport = run_round(Sfl(), world, works)
    assert sent_bytes(columns([prepared.ledger])) == sum(transport.bytes.values())
    assert prepared.ledger.client_flop == flop(run.parts.profile, transport, False)


def test_totals_are_sums_and_the_largest_peaks_and_unknown_where_a_round_is():
    one, other = (Ledger(*np.arange(first, first + 9)) for first in (1, 100))
    whole = totals(columns([other, one]))
    assert whole["smashed_up_bytes"] == 2 + 101
    assert whole["server_flop"] == 9 + 108
    assert (whole["client_peak_bytes"], whole["server_peak_bytes"]) == (105, 106)
    assert whole["up_bytes"] == (2 + 101) + (3 + 102) + (5 + 104)
    assert whole["down_bytes"] == (1 + 100) + (4 + 103)
    assert all(np.isnan(value) for value in totals(columns([one, None])).values())
