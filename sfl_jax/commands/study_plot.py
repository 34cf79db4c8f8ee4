"""The picture of a study: accuracy against rounds, seconds and bytes, a line for each combination."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sfl_jax.commands.study_table import sent_so_far
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
        counted = zip(lines, sent_so_far(lines), strict=True)
        tested = [(line, sent) for line, sent in counted if line.test_accuracy is not None]
        accuracy = [100 * line.test_accuracy for line, _ in tested]
        for panel, x in zip(
            panels,
            (
                [line.round for line, _ in tested],
                [line.simulated_s for line, _ in tested],
                [float("nan") if sent is None else sent / 1e9 for _, sent in tested],
            ),
            strict=True,
        ):
            panel.plot(x, accuracy, dash, color=colour, linewidth=1.4, label=name if is_first else None)
    for panel, title in zip(panels, ("rounds", "simulated seconds", "gigabytes sent"), strict=True):
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata=PNG_METADATA)
