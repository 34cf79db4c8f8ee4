"""Settings of a plan that exclude each other. The library and the commands ask here.

It imports nothing heavy, so that a command can refuse its flags at once.
"""

from typing import Any

from sfl_jax.errors import BadInput

WORK_CONSERVING = "work_conserving"
WITHIN_MEMORY = ("exact", "no_split")  # methods that know the server's memory: `no_split` leaves it nothing


def check(settings: Any, max_cut: int | None) -> None:
    """Raises BadInput for two settings that exclude each other.

    settings: a `planning.Planner`, or anything with its attributes. max_cut: None is no limit.
    """
    method, barrier, band = settings.method, settings.barrier, settings.band
    if max_cut is not None and max_cut < settings.min_cut:
        raise BadInput(f"max_cut={max_cut}: must be at least min_cut={settings.min_cut}")
    if method == WORK_CONSERVING and barrier != "session":
        raise BadInput(f"method={method}: needs barrier=session, not {barrier}")
    if band != "fixed" and (method, barrier) != ("exact", "session"):
        raise BadInput(f"band={band}: needs method=exact and barrier=session")
    if settings.broadcast_bps and band != "fixed":
        raise BadInput(f"broadcast_bps={settings.broadcast_bps:g}: needs band=fixed, not {band}")
    if settings.server_memory_bytes and method not in WITHIN_MEMORY:
        raise BadInput(
            f"server_memory_bytes={settings.server_memory_bytes:g}: needs method=exact, not {method}"
        )
