"""What changed since an earlier plan: the round, the settings, and each client's cut, share and seconds."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sfl_jax.errors import BadInput

LISTED = 20  # the most clients that are listed
_MOST_S = 1e300  # JSON may have integers that no float holds
_NAMED = 5  # how many new or missing clients are named
# Settings that are compared where both plans have them.
_SETTINGS = (
    "model", "image_size", "barrier", "method", "links", "band", "server_flops", "min_cut", "max_cut",
    "tail_units", "scheme", "codec", "codec_down", "local_epochs", "batch_size", "bits_per_float",
    "optimizer",
)  # fmt: skip
# Settings that a plan has only where they were asked for.
_ASKED_FOR = (
    "servers", "server_links", "server_memory_bytes", "rtt_s", "broadcast_bps", "traces", "interval",
    "quantile", "frontier", "round_at_most_s", "budget", "measured",
)  # fmt: skip
_COLUMNS = ("client", "cut", "unit", "share_flops", "client_s")


class Earlier(NamedTuple):
    """A plan.json: what stands before its clients, and some columns of them."""

    path: str
    head: dict[str, Any]
    columns: dict[str, list[Any]]


def read_plan(path: str) -> Earlier:
    """The plan of a file that `launch.plan` wrote. BadInput says what is wrong with the file."""
    try:
        head = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise BadInput(f"--compare_with={path}: {error.strerror}; give the path of a plan.json") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--compare_with={path}: must be a plan.json; it is no JSON ({error})") from error
    clients = head.pop("clients", None) if isinstance(head, dict) else None
    try:
        columns = {name: [client[name] for client in clients or ()] for name in _COLUMNS}
    except (TypeError, KeyError) as error:
        raise BadInput(f"--compare_with={path}: must be a plan.json; it lacks {error}") from error
    round_s = head.get("round_s")
    if isinstance(round_s, bool) or not isinstance(round_s, int | float) or not 0 <= round_s < _MOST_S:
        raise BadInput(f"--compare_with={path}: must be a plan.json; its round_s is {repr(round_s)[:40]}")
    if not columns["client"] or not all(isinstance(name, str) for name in columns["client"]):
        raise BadInput(f"--compare_with={path}: must be a plan.json; it has no clients")
    return Earlier(path, head, columns)


def difference(earlier: Earlier, head: Mapping[str, Any], columns: Mapping[str, Any]) -> str:
    """The change from an earlier plan to this one, as lines for the terminal.

    head, columns: what plan.json will have.
    """
    was_s, now_s = float(earlier.head["round_s"]), float(head["round_s"])
    place = {name: at for at, name in enumerate(earlier.columns["client"])}
    names = columns["client"].tolist()
    both = [(k, place[name]) for k, name in enumerate(names) if name in place]
    moved = [(k, at) for k, at in both if columns["cut"][k] != earlier.columns["cut"][at]]
    new = [name for name in names if name not in place]
    present = set(names)
    gone = [name for name in place if name not in present]
    change = f" ({now_s / was_s - 1:+.1%})" if was_s > 0 else ""
    lines = [
        ("since", f"{earlier.path}: round {was_s:.5g} s, now {now_s:.5g} s{change}"),
        *(("setting", f"{name}: {was}, now {now}") for name, was, now in _changed(earlier.head, head)),
        *((word, _listed(some)) for word, some in (("new", new), ("gone", gone)) if some),
        ("cuts", f"{len(moved)} of {len(both)} clients that both plans have cut elsewhere now"),
    ]
    text = "\n".join(f"{name:<11} {text}" for name, text in lines)
    return f"{text}\n\n{_rows(earlier, columns, moved[:LISTED])}\n" if moved else text


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]):
    for name in _SETTINGS:
        if name in was and name in now and was[name] != now[name]:
            yield name, was[name], now[name]
    for name in _ASKED_FOR:
        before, after = was.get(name) or "none", now.get(name) or "none"
        if before != after:
            yield name, before, after


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more


def _rows(earlier: Earlier, columns: Mapping[str, Any], moved) -> str:
    """A row for each of these clients, with what was and what is."""
    head: tuple[str, ...] = ("client", "cut", "now", "unit", "now", "share, FLOP/s", "now", "total, s", "now")
    rows: list[tuple[str, ...]] = [head]
    for k, at in moved:
        row = [str(columns["client"][k])]
        for name, form in (("cut", "{}"), ("unit", "{}"), ("share_flops", "{:.3g}"), ("client_s", "{:.4g}")):
            for value in (earlier.columns[name][at], columns[name][k]):
                is_known = isinstance(value, str) or (value is not None and math.isfinite(value))
                row.append((form.format(value) or "images") if is_known else "-")
        rows.append(tuple(row))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at in (0, 3, 4) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
