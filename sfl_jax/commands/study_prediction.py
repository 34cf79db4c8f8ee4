"""Predicts the rounds and the seconds of trainings to an accuracy, and shows them beside the real ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax import codecs
from sfl_jax.commands import flags, parts, words, workdir
from sfl_jax.errors import BadInput
from sfl_jax.federated.moments import squared_gradients
from sfl_jax.optim.rounds_model import Features, RoundsModel, features, fit_rounds, left_out, restarted
from sfl_jax.run.clocks import clocks

VARIED = ("cut", "max_cut", "local_epochs", "codec")
SCHEMES = ("psl", "sfl_v2")
_IMAGES = 512  # for the gradient's parts
_MOST_ROUNDS = 2000  # whose plans are made for a predicted time


class Row(NamedTuple):
    """One setting: real numbers where it was trained and reached the accuracy, predicted ones for all."""

    values: Mapping[str, str]
    rounds: float | None
    seconds: float | None
    predicted_rounds: float
    predicted_seconds: float


def check(varied: Mapping[str, Sequence[str]]) -> None:
    """BadInput for settings that the model does not know."""
    for name in varied:
        if name not in VARIED:
            raise BadInput(f"--vary={name}: must be one of {', '.join(VARIED)} with --predict")


def spread(cases: Sequence[Any], number: int) -> list[int]:
    """The places of `number` cases that differ much: the first, then always the farthest from those."""
    levels = [sorted({case.values[name] for case in cases}) for name in cases[0].values]
    names = list(cases[0].values)
    points = np.array(
        [
            [
                level.index(case.values[name]) / max(len(level) - 1, 1)
                for name, level in zip(names, levels, strict=True)
            ]
            for case in cases
        ]
    )
    chosen = [0]
    while len(chosen) < min(number, len(cases)):
        nearest = np.abs(points[:, None] - points[chosen]).sum(axis=2).min(axis=1)
        chosen.append(int(nearest.argmax()))
    return chosen


def crossing(accuracies: Sequence[float | None], target: float) -> float | None:
    """The round, with a fraction, at which the accuracy reaches the target, if it grows evenly in between."""
    before, at = 0.0, 0
    for round, now in enumerate(accuracies, 1):
        if now is None:
            continue
        if now >= target:
            return at + (round - at) * (target - before) / (now - before)
        before, at = now, round
    return None


def predict(
    cases: Sequence[Any], lines: Mapping[int, Sequence[Any]], target: float
) -> tuple[list[Row], RoundsModel]:
    """A row for each case, and the constants of all known rounds.

    lines: of metrics.jsonl, by the place of a trained case. A trained case is predicted from the others.
    BadInput if the scheme is none of SCHEMES, or no training reached the target.
    """
    built = [parts.build(flags.parse(case.flags, "train")) for case in cases]
    scheme = built[0].parts.scheme.name
    if scheme not in SCHEMES:
        raise BadInput(f"--predict={target:g}: needs --scheme={' or '.join(SCHEMES)}, not {scheme}")
    real = {place: crossing([line.test_accuracy for line in own], target) for place, own in lines.items()}
    reached = [place for place, rounds in real.items() if rounds is not None]
    if not reached:
        raise BadInput(
            f"--predict={target:g}: no training reached this accuracy; choose less, or more --rounds"
        )
    # The parts change in training and from one training to another, so their mean is taken.
    gradients = [_gradient(cases[place], built[place]) for place in reached]
    gradient = np.mean([squares / squares.sum() for squares in gradients], axis=0)
    known = Features(*np.array([_features(one, gradient) for one in built]).T)
    rounds = np.array([real[place] for place in reached], float)
    model = fit_rounds(known.of(reached), rounds)
    expected = model.rounds(known)
    expected[reached] = left_out(known.of(reached), rounds)
    rows = []
    for place, case in enumerate(cases):
        own = real.get(place)
        seconds = None if own is None else _at([line.simulated_s for line in lines[place]], own)
        ahead_s = _planned_s(built[place].parts, float(expected[place]))
        rows.append(Row(case.values, own, seconds, float(expected[place]), ahead_s))
    return rows, model


def table(rows: Sequence[Row], model: RoundsModel, target: float) -> str:
    """The rows as a person reads them, the shortest predicted time first."""
    names = list(rows[0].values)
    header = [*names, "rounds", "predicted", "simulated", "predicted"]
    order = sorted(rows, key=lambda row: row.predicted_seconds)
    body = [
        [*row.values.values(), _number(row.rounds), _number(row.predicted_rounds),
         words.NONE if row.seconds is None else words.clock(row.seconds), words.clock(row.predicted_seconds)]
        for row in order
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [
        "  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in (header, *body)
    ]
    known = [
        (row.rounds, row.predicted_rounds)
        for row in rows
        if row.rounds and math.isfinite(row.predicted_rounds)
    ]
    errors = [abs(predicted / real - 1) for real, predicted in known]
    mean = f"; off by {np.mean(errors):.0%} in the mean, {max(errors):.0%} at most" if errors else ""
    constants = ", ".join(f"{name} {value:.3g}" for name, value in model._asdict().items())
    title = f"to {100 * target:g} %, each predicted from the other trainings{mean}"
    return "\n".join([title, *lines, f"constants: {constants}"])


def _number(value: float | None) -> str:
    return words.NONE if value is None or not math.isfinite(value) else f"{value:.1f}"


def _features(built: parts.Built, gradient) -> tuple[float, float, float, float]:
    own, config = built.parts, built.config
    most = len(own.training.chain) if config.max_cut < 0 else config.max_cut
    steps = float(own.terms.steps.mean())
    # Adam corrects for the start of its momentum.
    restarts = restarted(steps, config.momentum if config.optimizer == "sgd" else 0.0)
    errors = [_error(up) + _error(down) for up, down in parts.codec_pairs(config)]
    return features(
        gradient, most, steps, restarts, steps if config.keep_server_state else restarts, min(errors)
    )


def _error(codec) -> float:
    """The relative squared error of a codec on normal numbers."""
    x = jax.random.normal(jax.random.key(0), (64, 256))
    there = codecs.create(codec).transmit(x, jax.random.key(1))
    return float(((there - x) ** 2).sum() / (x**2).sum())


def _gradient(case, built: parts.Built):
    """The squared gradient of each unit, at the last model of a training."""
    variables = workdir.trained(str(case.directory)).variables
    data = built.parts.data
    images, labels = (jnp.asarray(part[:_IMAGES]) for part in (data.train_images, data.train_labels))
    return squared_gradients(built.parts.training, variables, images, labels)


def _planned_s(own, rounds: float) -> float:
    """The simulated seconds (a fraction of a round included) that plans take for these rounds."""
    if not rounds <= _MOST_ROUNDS:
        return math.inf
    (clock, *_) = clocks(own, math.ceil(rounds), rivals=()).values()
    return _at(clock.seconds.tolist(), rounds)


def _at(ends_s: Sequence[float], rounds: float) -> float:
    return float(np.interp(rounds, np.arange(len(ends_s) + 1), [0.0, *ends_s]))
