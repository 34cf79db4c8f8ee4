"""The picture of a study: accuracy against rounds, simulated seconds and bytes, a line for each combination."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sfl_jax.files import PNG_METADATA, whole_file

# Okabe and Ito's colours, which the colour-blind can tell apart; dashes from the second time on.
COLOURS = ("black", "#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#999999")
DASHES = ("-", "--", ":", "-.")


def write(path: Path, runs: Sequence[tuple[Mapping[str, str], Sequence[Any]]]) -> None:
    """Draws the runs: (the settings that vary, the lines of metrics.jsonl). Seeds of one combination share a
    colour.
    """
    styles = itertools.product(DASHES, COLOURS)
    chosen: dict[str, tuple[str, str]] = {}
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for values, lines in runs:
        name = ", ".join(f"{key} {value}" for key, value in values.items() if key != "seed") or "all"
        is_first = name not in chosen
        if is_first:
            chosen[name] = next(styles, ("-", "black"))
        dash, colour = chosen[name]
        sent = list(itertools.accumulate(line.ledger.total_bytes if line.ledger else 0 for line in lines))
        tested = [(line, total) for line, total in zip(lines, sent, strict=True) if line.test_accuracy is not None]
        accuracy = [100 * line.test_accuracy for line, _ in tested]
        for panel, x in zip(
            panels,
            (
                [line.round for line, _ in tested],
                [line.simulated_s for line, _ in tested],
                [total / 1e9 for _, total in tested],
            ),
            strict=True,
        ):
            panel.plot(x, accuracy, dash, color=colour, linewidth=1.4, label=name if is_first else None)
    for panel, title in zip(panels, ("rounds", "simulated seconds", "gigabytes sent"), strict=True):
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata=PNG_METADATA)
