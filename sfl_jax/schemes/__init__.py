"""Schemes: whose copy of a unit a step uses, who waits for whom, and what that costs."""

from typing import Any

from sfl_jax.errors import BadInput
from sfl_jax.registry import SCHEMES
from sfl_jax.schemes.scheme import CHUNKS, DEADLINE, OWN_NORM, SEVERAL_DEVICES, Scheme

__all__ = ["CHUNKS", "DEADLINE", "OWN_NORM", "SCHEMES", "SEVERAL_DEVICES", "Scheme", "create"]


def create(scheme: str | Scheme, **options: Any) -> Scheme:
    """Returns the scheme of this name with these options. A `Scheme` is returned unchanged.

    Raises BadInput for an unknown scheme, or for an option that it does not have.
    """
    if isinstance(scheme, Scheme):
        return scheme
    kind = SCHEMES[scheme]
    try:
        return kind(**options)
    except TypeError:
        unknown = [name for name in options if name not in kind.__dataclass_fields__]
        raise BadInput(f"scheme={scheme}: has no {', '.join(unknown)}") from None
