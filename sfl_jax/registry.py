"""The names that flags and parts can have: one table for each kind, one line for each member.

A member is an object or its place, "module:attribute", which is imported on first use. So help and refusals
need no JAX. Other packages add members by entry points of the group `sfl_jax.KIND`.
"""

import importlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from sfl_jax.errors import BadInput, did_you_mean


class Registry(Mapping[str, Any]):
    """The members of one kind by name, in the order of registration.

    An unknown name raises BadInput, which lists the known ones.
    """

    def __init__(self, kind: str, members: Mapping[str, Any] | None = None):
        self.kind = kind
        self._members = dict(members or {})
        self._has_plugins = False

    def register(self, name: str, member: Any) -> Any:
        """Adds a member, an object or "module:attribute", and returns it."""
        self._members[name] = member
        return member

    def names(self) -> tuple[str, ...]:
        """All names; those of plug-ins come last."""
        return tuple(self)

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise BadInput(f"{self.kind}={name}: must be one of {', '.join(self)}{did_you_mean(name, self)}")
        member = self._members[name]
        if isinstance(member, str):
            module, _, attribute = member.partition(":")
            member = self._members[name] = getattr(importlib.import_module(module), attribute)
        return member

    def __contains__(self, name: object) -> bool:
        if name not in self._members:
            self._look_for_plugins()
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        self._look_for_plugins()
        return iter(self._members)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _look_for_plugins(self) -> None:
        if not self._has_plugins:
            self._has_plugins = True
            for point in metadata.entry_points(group=f"sfl_jax.{self.kind}"):
                self._members.setdefault(point.name, point.value)


_MODELS = "sfl_jax.models"
_VARIANTS = ("tiny", "b0", "b1", "b2", "b3", "s", "m", "l", "xl")
NETWORKS = Registry(
    "model",
    {f"efficientnetv2-{variant}": f"{_MODELS}.efficientnet_v2:units" for variant in _VARIANTS}
    | {
        "resnet18": f"{_MODELS}.resnet:units",
        "vgg11": f"{_MODELS}.vgg:units",
        "vit-tiny": f"{_MODELS}.vit:units",
        "cnn": f"{_MODELS}.cnn:units",
        "mlp": f"{_MODELS}.mlp:units",
    },
)
_OPTIM = "sfl_jax.optim"
METHODS = Registry(
    "method",
    {
        "exact": f"{_OPTIM}.exact:exact",
        "alternating": f"{_OPTIM}.alternating:method",
        "regression": f"{_OPTIM}.regression:method",
        "greedy": f"{_OPTIM}.baselines:greedy",
        "equal_shares": f"{_OPTIM}.baselines:equal_shares",
        "common_cut": f"{_OPTIM}.baselines:common_cut",
        "random_cut": f"{_OPTIM}.baselines:random_cut",
        "no_split": f"{_OPTIM}.baselines:no_split",
        "work_conserving": f"{_OPTIM}.serving:solve_serving",
    },
)
_PARTITION = "sfl_jax.datasets.partition"
PARTITIONS = Registry(
    "partition",
    {name: f"{_PARTITION}:{name}" for name in ("iid", "dirichlet", "shards", "quantity", "fleet")},
)
_OPTIMIZERS = "sfl_jax.federated.optimizers"
OPTIMIZERS = Registry("optimizer", {name: f"{_OPTIMIZERS}:{name}" for name in ("sgd", "adam")})
_SERVER_OPTIMIZERS = "sfl_jax.federated.server_optimizers"
SERVER_OPTIMIZERS = Registry(
    "server_optimizer", {name: f"{_SERVER_OPTIMIZERS}:{name}" for name in ("sgd", "adam", "yogi")}
)
_SCHEDULES = "sfl_jax.run.schedules"
SCHEDULES = Registry(
    "learning_rate_schedule",
    {name: f"{_SCHEDULES}:{name}" for name in ("constant", "cosine", "linear", "exponential", "step")},
)
_SCHEMES = "sfl_jax.schemes"
SCHEMES = Registry(
    "scheme",
    {
        "sfl": f"{_SCHEMES}.sfl:Sfl",
        "sfl_v2": f"{_SCHEMES}.sfl_v2:SflV2",
        "psl": f"{_SCHEMES}.psl:Psl",
        "sl": f"{_SCHEMES}.sl:Sl",
        "fl": f"{_SCHEMES}.sfl:Fl",
    },
)
_CODECS = "sfl_jax.codecs"
CODECS = Registry(
    "codec",
    {
        "float32": f"{_CODECS}.rounded:Float32",
        "bfloat16": f"{_CODECS}.rounded:BFloat16",
        "float16": f"{_CODECS}.rounded:Float16",
        "int8": f"{_CODECS}.quantised:Int8",
        "int4": f"{_CODECS}.quantised:Int4",
        "topk": f"{_CODECS}.topk:TopK",
        "gaussian": f"{_CODECS}.gaussian:Gaussian",
    },
)

# Names without members are here for the same reason: help and refusals read them without JAX.
STARTS = ("equal", "proportional", "random")  # for alternating
ROUNDINGS = ("need", "nearest")  # for regression
BARRIERS = ("session", "staged")
LINKS = ("fixed", "shannon", "fading")
BANDS = ("fixed", "pooled", "separate", "airtime")
FRONTIERS = ("none", "energy", "bytes")
SERVER_ORDERS = ("client", "step")  # for sfl_v2
SERVER_BATCHES = ("separate", "joined")  # for psl
SAMPLINGS = ("uniform", "size")
BATCH_NORMS = ("averaged", "local_statistics", "local", "reestimated")
NORMS = ("batch", "group")  # layers of the networks
LAYER_FORMS = ("product", "conv")
EXECUTIONS = ("vmap", "map")
