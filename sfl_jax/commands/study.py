"""Trains one run for each combination of some settings, and compares accuracy, simulated time and bytes.

A run that is done is not trained again, so that a study that was interrupted goes on. Runs that differ in
--seed alone become one row, with mean and standard deviation. They are computed in one program, as are runs
that differ in --learning_rate.
"""

import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sfl_jax import __version__
from sfl_jax.commands import flags, helping
from sfl_jax.commands.following import Following
from sfl_jax.commands.interruption import INTERRUPTED, SAVED, interruption
from sfl_jax.commands.program import program
from sfl_jax.errors import BadInput
from sfl_jax.files import HTML_MARK, PNG_MARK, ensure_ours, ensure_writable, locked, whole_file

WORKDIR, TARGETS = "runs/study", "auto"
TABLE, PICTURE, REPORT = "study.json", "study.png", "study.html"
POLL_S = 0.1  # between two looks at a training
# Runs that differ in these alone are one program.
LISTS = {"seed": "seeds", "learning_rate": "learning_rates"}
FLAGS = {
    "--vary=NAME=V1,V2": "a setting of training and its values; cut=1,3 gives every client this cut; several "
    "--vary make all combinations",
    "--predict=ACCURACY": "with psl and sfl_v2: also predict the rounds and seconds to this accuracy, each "
    "training from the others",
    "--pilots=N": "with --predict: train only N of the runs, and the one that is predicted to be quickest",
    f"--targets={TARGETS}": "accuracies whose rounds, seconds and bytes the table tells, such as 0.9,0.98; "
    "auto: three round numbers, the highest that a run reached",
    f"--workdir={WORKDIR}": f"directory of the study: a directory for each run, {TABLE}, {PICTURE} "
    f"and {REPORT}",
}
# Examples of values, for messages.
_VALUES = {
    "--vary": "scheme=sfl,psl", "--workdir": WORKDIR, "--targets": "0.9,0.98", "--predict": "0.9",
    "--pilots": "4",
}  # fmt: skip


class Case(NamedTuple):
    """One run. values: the settings that vary. flags: of training. directory: of the run."""

    values: dict[str, str]
    flags: list[str]
    directory: Path

    @property
    def group(self) -> dict[str, str]:
        """The settings that vary, without those in which runs of one program may differ."""
        return {name: value for name, value in self.values.items() if name not in LISTS}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if (helping.SHORT | helping.FULL) & set(arguments):
        print(helping.study_text(str(__doc__), FLAGS))
        return 0
    if "--version" in arguments:
        print("sfl_jax", __version__)
        return 0
    return flags.coded(lambda: study(*_split(arguments)))


def study(
    varied: Mapping[str, Sequence[str]],
    rest: Sequence[str],
    workdir: str,
    targets: Sequence[float] | None,
    predicted: float = 0.0,
    pilots: int = 0,
) -> int:
    """Trains all cases, then writes the table, the picture and the page. Returns the exit code.

    predicted: an accuracy whose rounds are predicted too; 0 for none. pilots: how many cases are trained
    before the best of the others; 0 trains all.
    """
    ahead: Any = None
    if predicted:
        from sfl_jax.commands import study_prediction as ahead

        ahead.check(varied)
    check(workdir)
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
        command = [*program("study").split(), *_joined(varied, rest, workdir, targets, predicted, pilots)]
        write(varied, done, command, workdir, targets)
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
    done, failed, number = [], 0, 0
    for together in _programs(cases):
        names = "; ".join(named(case.values) for case in together)
        print(f"{number + 1} of {len(cases)}: {names}", file=sys.stderr, flush=True)
        number += len(together)
        code = _train(together)
        if code == SAVED:
            print("interrupted; the same command goes on", file=sys.stderr)
            return done, SAVED
        failed = failed or code
        done += [] if code else together
    return done, failed


def check(workdir: str) -> None:
    """BadInput if the table, the picture and the page cannot be written, or would replace other files."""
    ensure_writable(workdir, "workdir", workdir)
    ensure_ours(Path(workdir, TABLE), b'{"varied"', "workdir", workdir)
    ensure_ours(Path(workdir, PICTURE), PNG_MARK, "workdir", workdir)
    ensure_ours(Path(workdir, REPORT), HTML_MARK, "workdir", workdir)


def write(
    varied: Mapping[str, Sequence[str]],
    cases: Sequence[Case],
    command: Sequence[str],
    workdir: str,
    targets: Sequence[float] | None = None,
) -> None:
    """Prints the table of the cases, and writes it, the picture and the page into the workdir.

    command: the command line that does this, for the page. targets: accuracies; None means that the runs say.
    """
    from sfl_jax.commands import study_page, study_plot, study_table, totals
    from sfl_jax.run import recording

    runs = [(case.values, recording.logged(str(case.directory))) for case in cases]
    if targets is None:
        targets = totals.targets(line.test_accuracy for _, lines in runs for line in lines)
    rows = study_table.summarised(runs, targets)
    with whole_file(Path(workdir, TABLE)) as file:
        text = json.dumps({"varied": {name: list(values) for name, values in varied.items()}, "rows": rows})
        file.write(text.encode())
    study_plot.write(Path(workdir, PICTURE), runs)
    with whole_file(Path(workdir, REPORT)) as file:
        page = study_page.study_page(runs, rows, targets, command)
        file.write(page.encode(errors="xmlcharrefreplace"))
    print(study_table.table(rows, targets))
    print(f"written: {', '.join(str(Path(workdir, name)) for name in (TABLE, PICTURE, REPORT))}")


def _split(arguments):
    """(settings that vary, flags of all runs, workdir, targets, accuracy to predict, pilots)."""
    varied: dict[str, list[str]] = {}
    rest, workdir, targets, predicted, pilots = [], WORKDIR, TARGETS, "", ""
    given = iter(arguments)
    for argument in given:
        name, has_value, value = argument.partition("=")
        if name in _VALUES and not has_value:
            value = next(given, "")
            if not value or value.startswith("--"):
                raise BadInput(f"{name}: needs a value, for example {name}={_VALUES[name]}")
        if name == "--vary":
            setting, _, values = value.partition("=")
            if not setting or not all(values.split(",")) or setting in varied:
                raise BadInput(f"--vary: {value!r}: must be NAME=VALUE,VALUE, each name once")
            if setting in LISTS.values():
                raise BadInput(f"--vary={setting}: must be --vary={setting[:-1]}")
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
    return varied, rest, workdir, accuracies(targets), *_prediction(predicted, pilots)


def _joined(varied, rest, workdir, targets, predicted, pilots) -> list[str]:
    """The arguments that `_split` reads so."""
    arguments = [*(f"--vary={name}={','.join(values)}" for name, values in varied.items()), *rest]
    arguments.append(f"--workdir={workdir}")
    if targets is not None:
        arguments.append(f"--targets={','.join(map(str, targets))}")
    if predicted:
        arguments.append(f"--predict={predicted}")
    if pilots:
        arguments.append(f"--pilots={pilots}")
    return arguments


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


def accuracies(text: str) -> list[float] | None:
    """The targets in a text; None for auto. BadInput if one is not an accuracy."""
    if text == TARGETS:
        return None
    try:
        found = [float(part) for part in text.split(",") if part]
    except ValueError:
        found = [0.0]
    if not all(0 < target <= 1 for target in found):
        raise BadInput(
            f"--targets={text}: must be auto, or accuracies above 0 and at most 1 with commas between"
        )
    return found


def _case(values: dict[str, str], rest: Sequence[str], workdir: str) -> Case:
    own = [flag for name, value in values.items() for flag in _flags_of(name, value)]
    case = Case(values, [], Path())
    inner = {name: value for name, value in values.items() if name in LISTS}
    names = [named(part).replace("/", "_") for part in (case.group, inner) if part]
    directory = Path(workdir, *names)
    return Case(values, [*rest, *own, f"--workdir={directory}"], directory)


def _programs(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases that one program computes: a group if it has all combinations of its lists, else one case."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(named(case.group), []).append(case)
    found = []
    for group in groups.values():
        lists = [{case.values[name] for case in group} for name in LISTS if name in group[0].values]
        is_whole = math.prod(map(len, lists)) == len(group)
        found += [group] if is_whole else [[case] for case in group]
    return found


def _flags_of(name, value):
    names = ("min_cut", "max_cut") if name == "cut" else (name,)
    return [f"--{one}={value}" for one in names]


def named(values: Mapping[str, str]) -> str:
    """The name of a combination of settings, and of its directory."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def _can_be_trained(case: Case) -> bool:
    """Whether the flags of a case are good. A line says why they are not, before anything is trained."""
    try:
        flags.parse(case.flags, "train")
    except BadInput as error:
        print(f"left out: {named(case.values)}: {error}", file=sys.stderr)
        return False
    return True


def _train(cases: Sequence[Case]) -> int:
    """The exit code of one training of a group, SAVED if a signal ended it. A .log file has its output.

    A signal is passed on, and the training saves its round. Raises BadInput if another process trains there.
    It may be that of a study that was killed: it goes on, and its .log file is not touched.
    """
    directory = cases[0].directory
    place = directory if len(cases) == 1 else directory.parent
    if place.is_dir():
        with locked(place, "workdir", str(place)):
            pass
    log = directory.with_name(f"{directory.name if len(cases) == 1 else 'runs'}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sfl_jax.commands.train", *_flags_for(cases)]
    with interruption() as stop, log.open("wb") as file:
        stop.must_end_well("the round, which is saved")
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        was_told, following = False, Following(log)
        while (code := child.poll()) is None:
            if stop.asked and not was_told:
                child.terminate()  # on a terminal it has heard Ctrl-C too, and this changes nothing
                was_told = True
            following.look()
            time.sleep(POLL_S)
        following.clear()
    if stop.asked or code in (INTERRUPTED, SAVED):
        return SAVED
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        print(f"failed with exit code {code}: {''.join(last)} ({log})", file=sys.stderr)
    return code


def _flags_for(cases: Sequence[Case]) -> list[str]:
    """The flags that train a group in one program, each case in its own directory."""
    first = cases[0]
    if len(cases) == 1:
        return first.flags
    lists = {
        name: dict.fromkeys(case.values[name] for case in cases) for name in LISTS if name in first.values
    }
    same = [flag for flag in first.flags[:-1] if flag.partition("=")[0].removeprefix("--") not in lists]
    own = [f"--{LISTS[name]}={','.join(values)}" for name, values in lists.items()]
    return [*same, *own, f"--workdir={first.directory.parent}"]


if __name__ == "__main__":
    sys.exit(main())
