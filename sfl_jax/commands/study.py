"""Trains one run for each combination of some settings, and compares accuracy, simulated time and bytes.

A run that is done is not trained again, so that a study that was interrupted goes on. Runs that differ in
--seed alone become one row, with mean and standard deviation.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sfl_jax.commands import flags, words
from sfl_jax.commands.interruption import INTERRUPTED, SAVED, interruption
from sfl_jax.commands.program import program
from sfl_jax.errors import BadInput
from sfl_jax.files import PNG_MARK, ensure_ours, ensure_writable, whole_file

WORKDIR, TARGETS = "runs/study", "0.9,0.95,0.98"
TABLE, PICTURE = "study.json", "study.png"
POLL_S = 0.1  # between two looks at a training
USAGE = """usage: {name} --vary=NAME=VALUE,VALUE [--vary=…] [--targets=…] [--workdir=DIR] [flags of training]

{about}

  --vary=NAME=V1,V2   a setting of training and its values; cut=1,3 gives every client this cut; several
                      --vary make all combinations
  --predict=0.9       with psl and sfl_v2: also predict the rounds and seconds to this accuracy, each
                      training from the others
  --pilots=N          with --predict: train only N of the runs, and the one that is predicted to be quickest
  --targets=0.9,0.98  accuracies whose rounds, seconds and bytes are told (default {targets})
  --workdir=DIR       a directory for each run, {table} and {picture} (default {workdir})
  all other flags     hold in all runs, as in {train}

examples
  {name} --vary=scheme=sfl,sfl_v2,psl,sl --vary=cut=1,2 --model=cnn --rounds=20
  {name} --vary=seed=0,1,2 --vary=codec=float32,int8,int4 --preset=quick"""


class Case(NamedTuple):
    """One run. values: the settings that vary. flags: of training. directory: of the run."""

    values: dict[str, str]
    flags: list[str]
    directory: Path


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h", "--helpfull"} & set(arguments):
        print(_usage())
        return 0
    return flags.coded(lambda: study(*_split(arguments)))


def study(
    varied: Mapping[str, Sequence[str]],
    rest: Sequence[str],
    workdir: str,
    targets: Sequence[float],
    predicted: float = 0.0,
    pilots: int = 0,
) -> int:
    """Trains all cases, then writes the table and the picture. Returns the exit code.

    predicted: an accuracy whose rounds are predicted too; 0 for none. pilots: how many cases are trained
    before the best of the others; 0 trains all.
    """
    ahead: Any = None
    if predicted:
        from sfl_jax.commands import study_prediction as ahead

        ahead.check(varied)
    ensure_writable(workdir, "workdir", workdir)
    ensure_ours(Path(workdir, TABLE), b'{"varied"', "workdir", workdir)
    ensure_ours(Path(workdir, PICTURE), PNG_MARK, "workdir", workdir)
    combinations = itertools.product(*varied.values())
    cases = [_case(dict(zip(varied, values, strict=True)), rest, workdir) for values in combinations]
    cases = [case for case in cases if _can_be_trained(case)]
    if not cases:
        raise BadInput("--vary: no combination can be trained")
    chosen = ahead.spread(cases, pilots) if pilots else range(len(cases))
    done, failed = _train_all([cases[place] for place in chosen])
    if failed == SAVED:
        return SAVED
    if done and predicted and pilots:
        best = min(ahead.predict(cases, _lines(cases, done), predicted)[0], key=_quickest)
        more, code = _train_all([case for case in cases if case.values == best.values and case not in done])
        done, failed = done + more, code or failed
        if failed == SAVED:
            return SAVED
    if done:
        _write(varied, done, workdir, targets)
    if done and predicted:
        rows, model = ahead.predict(cases, _lines(cases, done), predicted)
        print(ahead.table(rows, model, predicted))
    return failed


def _quickest(row) -> float:
    return row.predicted_seconds


def _lines(cases, done):
    """The lines of the trained cases, by place."""
    from sfl_jax.run import recording

    return {cases.index(case): recording.logged(str(case.directory)) for case in done}


def _train_all(cases: Sequence[Case]) -> tuple[list[Case], int]:
    """The cases that were trained, and the exit code: SAVED if a signal ended them."""
    done, failed = [], 0
    for number, case in enumerate(cases, 1):
        print(f"{number} of {len(cases)}: {_name(case.values)}", file=sys.stderr, flush=True)
        code = _train(case)
        if code == SAVED:
            print("interrupted; the same command goes on", file=sys.stderr)
            return done, SAVED
        failed = failed or code
        done += [] if code else [case]
    return done, failed


def _write(varied, cases, workdir, targets) -> None:
    from sfl_jax.commands import study_plot
    from sfl_jax.run import recording

    runs = [(case.values, recording.logged(str(case.directory))) for case in cases]
    rows = summarised(runs, targets)
    with whole_file(Path(workdir, TABLE)) as file:
        text = json.dumps({"varied": {name: list(values) for name, values in varied.items()}, "rows": rows})
        file.write(text.encode())
    study_plot.write(Path(workdir, PICTURE), runs)
    print(table(rows, targets))
    print(f"written: {Path(workdir, TABLE)}, {Path(workdir, PICTURE)}")


def summarised(
    runs: Sequence[tuple[Mapping[str, str], Sequence[Any]]], targets: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for each combination but the seed: means, and standard deviations where there are several runs.

    runs: (the settings that vary, the lines of metrics.jsonl). targets: accuracies from 0 to 1.
    """
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for values, lines in runs:
        key = tuple((name, value) for name, value in values.items() if name != "seed")
        groups.setdefault(key, []).append(measured(lines, targets))
    rows = []
    for key, found in groups.items():
        values = {name: [one[name] for one in found] for name in found[0]}
        row = {"settings": dict(key), "runs": len(found)}
        row |= {name: _of_all(statistics.fmean, own) for name, own in values.items()}
        if len(found) > 1:
            row |= {f"{name}_sd": _of_all(statistics.stdev, own) for name, own in values.items()}
        rows.append(row)
    return rows


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


def table(rows: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> str:
    """The rows as a person reads them."""
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
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = (
        "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) for line in (header, *body)
    )
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


def _split(arguments):
    """(settings that vary, flags of all runs, workdir, targets, accuracy to predict, pilots)."""
    varied: dict[str, list[str]] = {}
    rest, workdir, targets, predicted, pilots = [], WORKDIR, TARGETS, "", ""
    for argument in arguments:
        name, has_value, value = argument.partition("=")
        if name in ("--vary", "--workdir", "--targets", "--predict", "--pilots") and not has_value:
            raise BadInput(f"{name}: write {name}=VALUE")
        if name == "--vary":
            setting, _, values = value.partition("=")
            if not setting or not all(values.split(",")) or setting in varied:
                raise BadInput(f"--vary: {value!r}: must be NAME=VALUE,VALUE, each name once")
            varied[setting] = values.split(",")
        elif name == "--workdir":
            workdir = value
        elif name == "--targets":
            targets = value
        elif name == "--predict":
            predicted = value
        elif name == "--pilots":
            pilots = value
        else:
            rest.append(argument)
    if not varied:
        raise BadInput("--vary: missing; for example --vary=scheme=sfl,psl")
    return varied, rest, workdir, _accuracies(targets), *_prediction(predicted, pilots)


def _prediction(predicted: str, pilots: str) -> tuple[float, int]:
    """The accuracy to predict and the number of pilots; 0 where they are not given."""
    if pilots and not predicted:
        raise BadInput(f"--pilots={pilots}: needs --predict")
    if pilots and not (pilots.isdecimal() and pilots.isascii() and int(pilots) > 1):
        raise BadInput(f"--pilots={pilots}: must be an integer, at least 2")
    if not predicted:
        return 0.0, 0
    try:
        accuracy = float(predicted)
    except ValueError:
        accuracy = 0.0
    if not 0 < accuracy <= 1:
        raise BadInput(f"--predict={predicted}: must be an accuracy above 0 and at most 1")
    return accuracy, int(pilots or 0)


def _accuracies(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part]
    except ValueError:
        found = [0.0]
    if not all(0 < target <= 1 for target in found):
        raise BadInput(f"--targets={text}: must be accuracies above 0 and at most 1, with commas between")
    return found


def _case(values: dict[str, str], rest: Sequence[str], workdir: str) -> Case:
    directory = Path(workdir) / _name(values).replace("/", "_")
    named = [flag for name, value in values.items() for flag in _flags_of(name, value)]
    return Case(values, [*rest, *named, f"--workdir={directory}"], directory)


def _flags_of(name, value):
    names = ("min_cut", "max_cut") if name == "cut" else (name,)
    return [f"--{one}={value}" for one in names]


def _name(values):
    return ",".join(f"{name}={value}" for name, value in values.items())


def _can_be_trained(case: Case) -> bool:
    """Whether the flags of a case are good. A line says why they are not, before anything is trained."""
    try:
        flags.parse(case.flags, "train")
    except BadInput as error:
        print(f"left out: {_name(case.values)}: {error}", file=sys.stderr)
        return False
    return True


def _train(case: Case) -> int:
    """The exit code of one training, SAVED if a signal ended it. A file beside its directory has its output.

    A signal is passed on, and the training saves its round.
    """
    log = case.directory.with_name(case.directory.name + ".log")
    command = [sys.executable, "-m", "sfl_jax.commands.train", *case.flags]
    with interruption() as stop, log.open("wb") as file:
        stop.must_end_well("the round, which is saved")
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        was_told = False
        while (code := child.poll()) is None:
            if stop.asked and not was_told:
                child.terminate()  # on a terminal it has heard Ctrl-C too, and this changes nothing
                was_told = True
            time.sleep(POLL_S)
    if stop.asked or code in (INTERRUPTED, SAVED):
        return SAVED
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        print(f"failed with exit code {code}: {''.join(last)} ({log})", file=sys.stderr)
    return code


def _usage() -> str:
    about = " ".join(str(__doc__).split())
    return USAGE.format(
        name=program("study"), about=about, targets=TARGETS, table=TABLE, picture=PICTURE, workdir=WORKDIR,
        train=program("train"),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
