"""`sfl` and `fl`: each client trains a copy of every unit. All copies are averaged after the round."""

import dataclasses
from typing import Any

from sfl_jax.schemes.scheme import CHUNKS, DEADLINE, OWN_NORM, SEVERAL_DEVICES, Scheme


@dataclasses.dataclass(frozen=True)
class Sfl(Scheme):
    """SplitFed V1 (Thapa et al., arXiv 2004.12088): the server holds a replica of its half for each client.

    With an identity codec the numbers are those of federated averaging, for any cuts.
    """

    name = "sfl"
    cuts_matter = False

    @property
    def clock(self) -> str:
        return "session"

    @property
    def allows(self) -> frozenset[str]:
        return frozenset((DEADLINE, SEVERAL_DEVICES, CHUNKS, OWN_NORM))

    def engine(self) -> Any:
        return None


@dataclasses.dataclass(frozen=True)
class Fl(Sfl):
    """Federated averaging (McMahan et al., arXiv 1602.05629): each client holds the whole network."""

    name = "fl"
    only_method = "no_split"
