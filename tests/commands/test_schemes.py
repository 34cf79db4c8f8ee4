"""--scheme and --codec from the command line."""

import dataclasses
import json

import pytest
from commands import small_world

from sfl_jax import registry
from sfl_jax.commands import flags, parts, plan, rules, train
from sfl_jax.commands.config import Config, fields_of
from sfl_jax.errors import BadInput
from sfl_jax.schemes.psl import Psl
from sfl_jax.schemes.sfl import Sfl
from sfl_jax.schemes.sfl_v2 import SflV2
from sfl_jax.schemes.sl import Sl

FLAGS = [
    *small_world.FLAGS[:5],
    "--batch_size=4",
    "--server_flops=1e12",
    *small_world.FLAGS[9:],
    "--rounds=2",
]


@pytest.mark.parametrize(
    ("given", "scheme"),
    [
        (
            ["--scheme=sfl_v2", "--server_order=step", "--nokeep_server_state"],
            SflV2(order="step", keeps_state=False),
        ),
        (["--scheme=psl", "--max_cut=3", "--server_batch=joined"], Psl(most=3, server_batch="joined")),
        (["--scheme=sl", "--tail_units=1"], Sl(tail_units=1)),
        ([], Sfl()),
    ],
)  # fmt: skip
def test_a_scheme_is_what_its_flags_say(given, scheme):
    assert parts.scheme(flags.parse([*FLAGS, *given], "train")) == scheme


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--server_order=step"], "--server_order=step: needs --scheme=sfl_v2"),
        (["--max_cut=0"], "--max_cut=0: must be at least --min_cut=1"),
        (["--max_cut=3", "--scheme=fl"], "--max_cut=3: --scheme=fl has no cut"),
        (["--scheme=sflv2"], "--scheme=sflv2: must be one of sfl, sfl_v2, psl, sl, fl; did you mean sfl_v2?"),
    ],
)
def test_flags_of_another_scheme_are_refused(given, line):
    with pytest.raises(BadInput) as caught:
        flags.parse([*FLAGS, *given], "train")
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"barrier": "staged"}, "barrier=staged: must be session; scheme=psl has its own clock"),
        (
            {"method": "greedy"},
            "method=greedy: must be one of exact, common_cut, random_cut",
        ),
        ({"band": "pooled"}, "band=pooled: must be fixed; scheme=psl has its own clock"),
        ({"deadline_factor": 2.0}, "deadline_factor=2: must be 0 with scheme=psl, where a late client"),
        ({"codec": "topk"}, "codec=topk: must be topk:part with numbers, such as topk:0.5"),
    ],
)
def test_what_a_scheme_does_not_allow_is_refused_before_data_are_read(changes, line):
    config = Config(scheme="psl", dataset="no such data", **changes)
    with pytest.raises(BadInput, match=f"^{line}"):
        parts.build(config)
    if "deadline_factor" not in changes:
        with pytest.raises(BadInput, match=f"^{line}"):
            parts.read_terms(config)


@dataclasses.dataclass(frozen=True)
class Mine(Sfl):
    """A plug-in scheme with the clock and the abilities of sfl."""

    name = "mine"


def test_a_plug_in_may_do_what_it_declares(monkeypatch):
    monkeypatch.setitem(registry.SCHEMES._members, "mine", Mine)
    config = Config(scheme="mine", barrier="staged", deadline_factor=2.0)
    rules.check(config, "train", {field.name for field in fields_of("train")})
    assert parts.planner(config).barrier == "staged"


def test_a_run_in_turn_with_a_codec_stops_and_goes_on_and_says_what_it_did(tmp_path, capfd):
    given = [*FLAGS, "--scheme=sfl_v2", "--codec=int8", f"--workdir={tmp_path}"]
    with small_world.world():
        assert train.main(given) == 0
        assert train.main(given) == 0
        assert train.main([*given, "--codec=int4"]) == 2
    said = capfd.readouterr()
    assert "--codec=int4 (was int8)" in said.err
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]


def test_a_run_without_a_split_ends_with_its_own_clock(tmp_path, capfd):
    with small_world.world():
        assert train.main([*FLAGS, "--scheme=fl", f"--workdir={tmp_path}"]) == 0
    assert "simulated time, no_split (this plan)" in capfd.readouterr().out


@pytest.mark.slow
def test_a_plan_is_under_the_clock_of_the_scheme(tmp_path, capfd):
    rounds_s = {}
    for scheme, codec in (("sfl", "float32"), ("sfl", "int8"), ("sl", "float32"), ("psl", "float32")):
        output = tmp_path / f"{scheme}-{codec}.json"
        done = plan.main([
            "--model=efficientnetv2-tiny", "--clients=12", "--cohort_size=12", "--server_flops=1e12",
            f"--scheme={scheme}", f"--codec={codec}", f"--output={output}",
        ])  # fmt: skip
        assert done == 0, capfd.readouterr().err
        rounds_s[scheme, codec] = json.loads(output.read_text())["round_s"]
    assert rounds_s["sfl", "int8"] <= rounds_s["sfl", "float32"] < rounds_s["sl", "float32"]
