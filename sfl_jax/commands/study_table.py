"""What the runs of a study came to: rows with means and standard deviations, and their table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sfl_jax.commands import words


def summarised(
    runs: Sequence[tuple[Mapping[str, str], Sequence[Any]]], targets: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for each combination but the seed: means, and standard deviations where there are several runs.

    runs: (the settings that vary, the lines of metrics.jsonl). targets: accuracies from 0 to 1.
    """
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for values, lines in runs:
        groups.setdefault(_key(values), []).append(measured(lines, targets))
    rows = []
    for key, found in groups.items():
        values = {name: [one[name] for one in found] for name in found[0]}
        row = {"settings": dict(key), "runs": len(found)}
        row |= _with_spread(values)
        row["by_round"] = _by_round([lines for own, lines in runs if _key(own) == key])
        rows.append(row)
    return rows


def _key(values):
    return tuple((name, value) for name, value in values.items() if name != "seed")


def _with_spread(values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The mean of each list, and its standard deviation where it has several numbers."""
    found = {name: _of_all(statistics.fmean, own) for name, own in values.items()}
    if any(len(own) > 1 for own in values.values()):
        found |= {f"{name}_sd": _of_all(statistics.stdev, own) for name, own in values.items()}
    return found


def _by_round(all_lines: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over the runs in each round that all of them tested."""
    names = ("train_loss", "test_loss", "test_accuracy", "client_accuracy_worst", "simulated_s")
    return [
        {"round": lines[0].round} | _with_spread({n: [getattr(line, n) for line in lines] for n in names})
        for lines in zip(*all_lines, strict=False)
        if all(line.test_accuracy is not None for line in lines)
    ]


def measured(lines: Sequence[Any], targets: Sequence[float]) -> dict[str, float | None]:
    """What a run came to: accuracies, simulated seconds, bytes, and when each target was first reached."""
    from sfl_jax.commands import totals

    tested = [line for line in lines if line.test_accuracy is not None]
    sums = sent_so_far(lines)
    found: dict[str, float | None] = {
        "test_accuracy": tested[-1].test_accuracy if tested else None,
        "best_accuracy": max((line.test_accuracy for line in tested), default=None),
        "client_accuracy_worst": tested[-1].client_accuracy_worst if tested else None,
        "simulated_s": lines[-1].simulated_s,
        "bytes": sums[-1],
        "wall_s": lines[-1].wall_s,
    }
    for target in targets:
        place = totals.first_round([line.test_accuracy for line in lines], target)
        known = place is not None
        found[f"rounds_to_{target:g}"] = lines[place].round if known else None
        found[f"seconds_to_{target:g}"] = lines[place].simulated_s if known else None
        found[f"bytes_to_{target:g}"] = sums[place] if known else None
    return found


def sent_so_far(lines: Sequence[Any]) -> list[float | None]:
    """The bytes that crossed until the end of each round; None where a line does not count them."""
    from sfl_jax.run import ledger

    sums = ledger.sent_bytes(ledger.columns(lines)).cumsum()
    return [None if total != total else float(total) for total in sums]  # NaN


def cells(rows: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> list[list[str]]:
    """The rows as a person reads them, below a row of titles."""
    names = list(rows[0]["settings"])
    header = [*names, "accuracy", "worst client", "simulated", "bytes"]
    header += [f"to {100 * target:g} %: rounds, seconds, bytes" for target in targets]
    body = [
        [
            *(row["settings"][name] for name in names),
            words.percent(row["test_accuracy"]) + _spread(row),
            words.percent(row["client_accuracy_worst"]),
            words.clock(row["simulated_s"]),
            _bytes(row["bytes"]),
            *(_to(row, target) for target in targets),
        ]
        for row in rows
    ]
    return [header, *body]


def table(rows: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> str:
    """The rows as text in columns."""
    found = cells(rows, targets)
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) for line in found)
    return "\n".join(line.rstrip() for line in lines)


def _to(row, target):
    if row[f"rounds_to_{target:g}"] is None:
        return "-"
    seconds, sent = words.clock(row[f"seconds_to_{target:g}"]), _bytes(row[f"bytes_to_{target:g}"])
    return f"{row[f'rounds_to_{target:g}']:g}, {seconds}, {sent}"


def _spread(row):
    sd = row.get("test_accuracy_sd")
    return "" if sd is None else f" ± {100 * sd:.2f}"


def _bytes(number):
    return words.NONE if number is None else words.amount(number, "B")


def _of_all(function, values):
    """None if a run has no value: a mean over the others would flatter."""
    return None if None in values else function(values)
