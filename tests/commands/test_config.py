import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl_jax import registry
from sfl_jax.commands import config as config_lib
from sfl_jax.commands.config import Config, validate
from sfl_jax.errors import BadInput

REFUSED = [
    ("model", "resnet50"), ("image_size", 7), ("partition", "random"), ("dirichlet_alpha", 0.0),
    ("clients", -1), ("cohort_size", 0), ("fleet", "no/such/fleet.csv"), ("server_flops", 0.0),
    ("server_flops", -1e9), ("server_flops", math.inf), ("server_flops", math.nan), ("method", "best"),
    ("barrier", "none"), ("links", "radio"), ("band", "both"),
    ("min_cut", -1), ("rounds", 0), ("local_epochs", 0), ("batch_size", 0),
    ("batch_size", 2**31), ("optimizer", "lamb"), ("learning_rate", 0.0), ("learning_rate", math.nan),
    ("momentum", 1.0), ("momentum", -0.1), ("weight_decay", -1e-9), ("learning_rate_schedule", "stairs"),
    ("warmup_rounds", -1), ("seed", -1), ("clients_per_chunk", -1), ("memory_budget_gib", -1.0),
    ("execution", "loop"),
    ("server_memory_bytes", -1.0), ("servers", "no/such/servers.csv"),
    ("layer_form", "fft"), ("compute_dtype", "int8"), ("devices", -1), ("eval_every", 0), ("workdir", " "),
    ("dataset", ""),
]  # fmt: skip

ACCEPTED = [
    ("image_size", 8), ("cohort_size", 100), ("server_flops", 5e-324),
    ("min_cut", 0), ("batch_size", 2**31 - 1), ("momentum", 0.0),
    ("momentum", math.nextafter(1, 0)), ("weight_decay", 0),
    ("warmup_rounds", 100), ("seed", 0), ("learning_rate", 1),
]  # fmt: skip


def test_flag_names_are_those_of_the_contract():
    # Written from the contract, not from the code.
    contract = {
        *("model", "dataset", "data_dir", "image_size", "partition", "dirichlet_alpha", "clients"),
        *("cohort_size", "rounds", "local_epochs", "batch_size", "optimizer", "learning_rate", "momentum"),
        *("weight_decay", "seed", "fleet", "server_flops", "method", "min_cut", "barrier", "execution"),
        *(
            "clients_per_chunk",
            "compute_dtype",
            "devices",
            "eval_every",
            "workdir",
        ),
    }
    names = [field.name for field in config_lib.fields_of("train")]
    assert contract <= set(names)
    assert len(names) == len(set(names))


def test_every_field_has_what_a_flag_needs():
    for field in dataclasses.fields(Config):
        assert all(field.metadata[key] for key in ("help", "group", "commands")), field.name
        assert type(field.default) in (int, float, bool, str), field.name
        assert field.default in field.metadata.get("choices", (field.default,)), field.name


def test_defaults_are_the_recipe_that_reached_99_percent():
    """Written from the top of presets/mnist.flags, not from the code. The preset sets only the rest."""
    recipe = {
        "model": "efficientnetv2-b0", "image_size": 32, "cohort_size": 10, "server_flops": 2e10,
        "method": "exact", "local_epochs": 1, "batch_size": 32, "optimizer": "adam", "learning_rate": 0.002,
        "momentum": 0.9, "server_momentum": 0.5, "learning_rate_schedule": "cosine", "warmup_rounds": 4,
        "drop_rate_scale": 0.0, "head_init_scale": 0.0,
    }  # fmt: skip
    assert Config().to_dict() | recipe == Config().to_dict()


@pytest.mark.parametrize("command", ["train", "compare", "plan", "report"])
def test_defaults_are_valid(command):
    validate(Config(), command)
    assert config_lib.fields_of(command)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused_with_flag_and_value(name, value):
    with pytest.raises(BadInput) as caught:
        validate(dataclasses.replace(Config(), **{name: value}))
    message = str(caught.value)
    assert message.startswith(f"--{name}={'' if name in ('workdir', 'dataset') else value}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 3.5),
        ("batch_size", True),
        ("batch_size", "32"),
        ("seed", None),
        ("plot", 1),
        ("momentum", "0"),
    ],
)
def test_another_type_is_refused(name, value):
    with pytest.raises(BadInput, match=f"^--{name}={value}: must be "):
        Config.from_dict({name: value})


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_edges_are_accepted(name, value):
    validate(dataclasses.replace(Config(), **{name: value}))


def test_limits_between_flags_name_both():
    with pytest.raises(BadInput, match=r"--cohort_size=11: must be at most --clients=10"):
        validate(Config(clients=10, cohort_size=11))
    with pytest.raises(BadInput, match=r"--cohort_size=101: must be at most --clients=100"):
        validate(Config(cohort_size=101))
    validate(Config(cohort_size=101, fleet=__file__))  # whose clients are not counted here
    with pytest.raises(BadInput, match=r"--warmup_rounds=6: must be at most --rounds=5"):
        validate(Config(rounds=5, warmup_rounds=6))
    validate(Config(clients=5), "plan")  # planning knows no cohort
    for other in ({"method": "greedy"}, {"barrier": "staged"}, {"band": "pooled"}):
        with pytest.raises(
            BadInput, match=r"--target_round_s=2: needs --method=exact, --barrier=session and --band=fixed"
        ):
            validate(Config(target_round_s=2.0, **other), "plan")
    for other in ({"method": "greedy"}, {"barrier": "staged"}):
        for command in ("train", "plan"):
            with pytest.raises(BadInput, match=r"--band=pooled: needs --method=exact and --barrier=session"):
                validate(Config(band="pooled", **other), command)


def test_a_setting_of_another_partition_is_refused():
    """A user who says how uneven the classes are does not want them even."""
    for partition in ("auto", "iid", "shards", "fleet"):
        with pytest.raises(
            BadInput, match=r"^--dirichlet_alpha=0.1: needs --partition=dirichlet or --partition=quantity$"
        ):
            validate(Config(dirichlet_alpha=0.1, partition=partition))
    for partition in ("dirichlet", "quantity"):
        validate(Config(dirichlet_alpha=1e-9, partition=partition))
        with pytest.raises(BadInput, match=r"^--shards_per_client=3: needs --partition=shards$"):
            validate(Config(shards_per_client=3, partition=partition))
    validate(Config(shards_per_client=3, partition="shards"))


def test_starts_are_of_methods_that_alternate():
    for starts in ("best", "", "equal,", "equal, random", "equal;random"):
        with pytest.raises(
            BadInput, match=f"^--starts={starts}: must be some of equal, proportional, random"
        ):
            validate(Config(method="alternating", starts=starts), "plan")
    for method in ("alternating", "regression"):
        validate(Config(method=method, starts="proportional,random,random"), "plan")
        validate(Config(method=method, recall=True), "plan")
    for name, value in (("starts", "random"), ("recall", True)):
        words = f"--{name}={str(value).lower()}: needs --method=alternating or --method=regression"
        with pytest.raises(BadInput, match=words):
            validate(Config(**{name: value}), "train")


def test_fleet_must_be_a_file(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        validate(Config(fleet=str(tmp_path)))
    path = tmp_path / "fleet.csv"
    path.touch()
    validate(Config(fleet=str(path)))


@given(
    st.builds(
        Config,
        clients=st.integers(10, 10**6),
        server_flops=st.floats(1e-300, 1e300),
        learning_rate=st.floats(1e-9, 1e3),
        method=st.sampled_from(tuple(registry.METHODS)),
        data_dir=st.text(st.characters(exclude_characters="~$#%`'\"\\")).map(str.strip),
        plot=st.booleans(),
    )
)
def test_dict_round_trip_through_json(config):
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_dict_with_what_does_not_belong_is_refused():
    with pytest.raises(BadInput, match="bathc_size"):
        Config.from_dict({"bathc_size": 3})
    with pytest.raises(BadInput, match=r"--batch_size=0: must be an integer, at least 1"):
        Config.from_dict({**Config().to_dict(), "batch_size": 0})
    assert Config.from_dict({"rounds": 7}) == Config(rounds=7)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().rounds = 3  # pyright: ignore


def test_choices_are_those_of_the_registries():
    """Other code reads the registries too, so no list of names exists twice."""
    from sfl_jax import models

    assert {name for name in registry.NETWORKS if name.startswith("eff")} == set(models.VARIANTS)
    of_fields = {field.name: field.metadata.get("choices") for field in dataclasses.fields(Config)}
    kinds = {
        "model": "NETWORKS", "method": "METHODS", "optimizer": "OPTIMIZERS", "scheme": "SCHEMES",
        "barrier": "BARRIERS", "server_order": "SERVER_ORDERS",
    }  # fmt: skip
    for name, kind in kinds.items():
        assert of_fields[name] == tuple(getattr(registry, kind)), name


def test_a_run_may_go_on_with_other_settings_that_change_no_numbers_but_for_rounding():
    """Written independently of the code. A new flag is harmful unless it is added here."""
    harmless = {
        *(
            "data_dir",
            "fleet",
            "availability",
            "on_divergence",
        ),  # places whose contents are compared, and what to do then
        *("clients_per_chunk", "execution", "memory_budget_gib", "devices", "deterministic"),
        *("compilation_cache", "num_processes", "process_id", "coordinator_address"),
        *("heartbeat_timeout_seconds", "join_timeout_s", "workdir", "eval_every", "checkpoint_every_rounds"),
        *("checkpoint_every_s", "keep", "on_write_error", "allow_config_change", "tensorboard"),
    }
    for field in config_lib.fields_of("train"):
        before = Config().to_dict() | {field.name: object()}
        listed = config_lib.changes(before, dataclasses.replace(Config(), layer_form="conv"), "train")
        changed = listed.keys() - {"layer_form"}
        assert all(line.startswith(f"--{name}=") for name, line in listed.items())
        assert changed == {field.name} - harmless - {"layer_form"}, field.name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cohort_size=5: must be 1 to 3", "--cohort_size=5: must be 1 to 3"),
        ("--clients=5: must be", "--clients=5: must be"),
        ("needs method=exact and barrier=session", "needs --method=exact and --barrier=session"),
        ("the_method=exact, runs/seed=1, x.seed=2", "the_method=exact, runs/seed=1, x.seed=2"),
        ("the method of seeds", "the method of seeds"),
    ],
)
def test_what_rooms_below_name_is_a_flag_to_who_types_it(text, said):
    assert config_lib.as_flags(text) == said
