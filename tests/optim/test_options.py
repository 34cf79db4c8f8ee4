import itertools

import jax
import numpy as np
import pytest
from optim import oracles

from sfl_jax import optim
from sfl_jax.errors import BadInput

KEY = jax.random.key(3)
PROFILE = oracles.profile(3)
FLOAT32 = optim.Wire(PROFILE.smashed * 32, PROFILE.smashed * 32)
INT8 = optim.Wire(PROFILE.smashed * 8 + 32, PROFILE.smashed * 8 + 32)
# Fewer bits up, more bits down: the best codec depends on the client's links.
LOPSIDED = optim.Wire(PROFILE.smashed * 4, PROFILE.smashed * 60)
WORK = optim.Work(batch_size=64)
BARRIERS = ("session", *optim.CLOCKS)


def terms_of(seed=0, clients=3, work=WORK, wires=None, **columns):
    return optim.terms(PROFILE, oracles.fleet(clients, seed, **columns), work, wires)


def test_columns_are_cuts_and_codecs_and_nothing_is_encoded_at_the_ends():
    terms = terms_of(wires={"float32": FLOAT32, "int8": INT8})
    assert terms.options.cut.tolist() == [0, 1, 1, 2, 2, 3]
    assert terms.options.codec.tolist() == [0, 0, 1, 0, 1, 0]
    one, two = PROFILE.smashed[1:3]
    images = PROFILE.smashed[0] * 8 + 32
    ups = [images, one * 32 + 32, one * 8 + 64, two * 32 + 32, two * 8 + 64, 0]
    assert terms.up_bits.tolist() == ups
    assert terms.down_bits.tolist() == [0, one * 32, one * 8 + 32, two * 32, two * 8 + 32, 0]
    plain = terms_of()
    for name in ("forward_flop", "backward_flop", "work_flop", "model_bits", "needed_bytes", "permitted"):
        np.testing.assert_array_equal(getattr(terms, name), getattr(plain, name)[[0, 1, 1, 2, 2, 3]])
    cuts, codecs = np.array([0, 1, 2, 3, 1, 0]), np.array([1, 1, 0, 1, 0, 0])
    columns = terms.columns(cuts, codecs)
    assert columns.tolist() == [0, 2, 3, 5, 1, 0]
    chosen = terms.chosen(columns)
    assert chosen.cut.tolist() == cuts.tolist()
    assert chosen.codec.tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.slow
def test_one_codec_gives_the_plans_of_none_bit_for_bit():
    for seed, barrier in itertools.product(range(2), BARRIERS):
        plain, coded = terms_of(seed), terms_of(seed, wires={"float32": FLOAT32})
        for mine, other in zip(jax.tree.leaves(plain), jax.tree.leaves(coded), strict=True):
            np.testing.assert_array_equal(mine, other)
        for method in optim.STAGED_METHODS if barrier != "session" else optim.METHODS:
            mine, other = (optim.solve(terms, 1e9, method, barrier, KEY) for terms in (plain, coded))
            for field, expected in zip(mine, other, strict=True):
                assert np.array_equal(field, expected, equal_nan=True)
            assert mine.codecs.tolist() == [0, 0, 0]


def pairs(wires):
    """All vectors of (cut, codec) pairs for three clients."""
    each = [(cut, name) for cut in range(1, 4) for name in wires]
    return itertools.product(each, repeat=3)


@pytest.mark.parametrize("barrier", BARRIERS)
def test_the_optimum_is_that_of_all_pairs(barrier):
    wires = {"float32": FLOAT32, "lopsided": LOPSIDED, "int8": INT8}
    del wires["int8" if barrier == "session" else "float32"]
    names, used = tuple(wires), set()
    for seed, server_flops in itertools.product(range(3), (1e8, 1e10)):
        terms = terms_of(seed, wires=wires)
        plan = optim.solve(terms, server_flops, "exact", barrier)
        alone = {name: terms_of(seed, wires={name: wire}) for name, wire in wires.items()}

        def round_s(choice, alone=alone, server_flops=server_flops):
            """Each client's entry from the terms of its codec alone."""
            mine = [alone[name] for _, name in choice]
            mixed = alone[names[0]]._replace(
                **{
                    field: np.concatenate([getattr(one, field) for one in mine])
                    for field in (
                        "forward_flop",
                        "backward_flop",
                        "work_flop",
                        "up_bits",
                        "down_bits",
                        "model_bits",
                    )
                },
                needed_bytes=np.zeros(12),
                permitted=np.ones(12, bool),
                options=None,
            )
            columns = np.array([4 * client + cut for client, (cut, _) in enumerate(choice)])
            return optim.round_seconds(mixed, columns, server_flops, barrier)

        best_s = min(map(round_s, pairs(wires))) if barrier != "session" else None
        mine = [(int(cut), names[codec]) for cut, codec in zip(plan.cuts, plan.codecs, strict=True)]
        assert plan.round_s == pytest.approx(round_s(mine), rel=1e-9)
        if barrier == "session":
            best_s = oracles.best_round_s(terms.costs(), server_flops)
        assert plan.round_s == pytest.approx(best_s, rel=3e-9)
        assert plan.bound_s <= best_s * (1 + 1e-12)
        used |= {name for cut, name in mine if 0 < cut < 3}
        worst = [min(optim.solve(one, server_flops, "exact", barrier).round_s for one in alone.values())]
        assert plan.round_s <= min(worst) * (1 + 2e-9)
    assert used  # at least one client cuts in the middle


def test_forgetting_the_codec_would_be_noticed():
    terms = terms_of(1, wires={"float32": FLOAT32, "int8": INT8})
    plan = optim.solve(terms, 1e10)
    assert plan.codecs.any()
    right = optim.round_seconds(terms, terms.columns(plan.cuts, plan.codecs), 1e10, "session")
    assert right == pytest.approx(plan.round_s, rel=1e-9)
    assert optim.round_seconds(terms, terms.columns(plan.cuts), 1e10, "session") > right * 1.01


@pytest.mark.parametrize("method", [method for method in optim.METHODS if method != "regression"])
def test_every_method_chooses_options(method):
    terms = terms_of(2, wires={"float32": FLOAT32, "int8": INT8})
    plan = optim.solve(terms, 1e9, method, key=KEY)
    columns = terms.columns(plan.cuts, plan.codecs)
    oracles.assert_sound(terms.costs(), 1e9, plan._replace(cuts=columns))
    assert plan.cuts.max() <= 3
    assert plan.codecs.max() <= 1
    absent = optim.solve(terms, 1e9, method, key=KEY, present=np.array([True, False, True]))
    assert (absent.cuts[1], absent.codecs[1]) == (3, 0)


def test_the_other_questions_are_answered_in_options_too():
    terms = terms_of(1, wires={"float32": FLOAT32, "int8": INT8})
    plan = optim.solve(terms, 1e10)
    server = optim.smallest_server(terms, plan.round_s)
    columns = terms.columns(server.cuts, server.codecs)
    fixed_s, work, _ = terms.at(columns)
    ends_s = fixed_s + np.divide(work, server.shares, out=np.zeros(3), where=work > 0)
    assert (ends_s <= plan.round_s * (1 + 1e-12)).all()
    assert server.server_flops <= 1e10 * (1 + 1e-9)
    assert optim.sensitivity(terms, plan).per_client_s.sum() == pytest.approx(1)
    ends_s = optim.session_ends_s(terms, plan, 1e10)
    np.testing.assert_allclose(ends_s, plan.client_s, rtol=1e-12)
    serving = optim.solve_serving(terms, 1e10)
    np.testing.assert_allclose(optim.session_ends_s(terms, serving, 1e10), serving.client_s, rtol=1e-9)
    band = optim.solve_bandwidth(terms, 1e10, 3.0, reference_hz=1.0)
    assert band.codecs.any()
    np.testing.assert_allclose(optim.session_ends_s(terms, band, 1e10), band.client_s, rtol=1e-9)
    # If every float has 8 bits anyway, the codecs do not differ.
    eight = terms_of(1, work=WORK._replace(bits_per_float=8))
    assert plan.round_s == pytest.approx(optim.solve(eight, 1e10).round_s, rel=0.02)


def test_a_cut_that_serves_nobody_is_named_as_a_cut():
    terms = terms_of(wires={"a": FLOAT32, "b": INT8}, memory_bytes=np.array([1e12, 10.0, 1e12]))
    with pytest.raises(optim.Infeasible, match="client 1: cut 3 needs"):
        optim.solve(terms, 1e9, "no_split")


def test_what_options_cannot_be_is_refused():
    with pytest.raises(BadInput, match="method=regression: fits one curve"):
        optim.solve(terms_of(wires={"float32": FLOAT32, "int8": INT8}), 1e9, "regression")
    with pytest.raises(BadInput, match="method=regression: smashed data and gradients take different bits"):
        optim.solve(terms_of(wires={"lopsided": LOPSIDED}), 1e9, "regression")
    with pytest.raises(BadInput, match=r"wires=\{\}: give the bits of at least one codec"):
        terms_of(wires={})
    with pytest.raises(BadInput, match=r"wires\[a\].up_bits: shape \(2,\); must be \(4,\)"):
        terms_of(wires={"a": optim.Wire(np.ones(2), np.ones(4))})
    with pytest.raises(BadInput, match=r"wires\[a\].down_bits=.*: must be finite"):
        terms_of(wires={"a": optim.Wire(np.ones(4), np.full(4, np.nan))})
