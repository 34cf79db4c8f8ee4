"""Less latency at the same accuracy, measured: python -m benchmarks.claim train|equality|tables [NAME ...]

`train` trains the runs of docs/claim.md into runs/claim, through launch.study; it goes on where it was
interrupted. NAME is one of the settings below; without one, all are trained, for many hours on two cores.
--seeds=0 trains one seed of three. Other flags are passed on, for example --data_dir for CIFAR-10.
`equality` trains the first rounds of a setting on MNIST with `sfl` and with `fl`, and compares each line.
`tables` adds the runs that are done to docs/claim.csv, so that settings and seeds can be trained one at a
time, on several machines too. The tables that it prints, and the picture of the page, are made from that
file. The tables of the method by itself are those of benchmarks.paper_method.
"""

import argparse
import collections
import csv
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import sfl_jax as sfl
from benchmarks.paper_method import table
from sfl_jax.commands import flags, parts, report, study_table, totals, words, workdir
from sfl_jax.federated import cores
from sfl_jax.run import recording

ROOT = Path("runs/claim")
RECORD = Path("docs/claim.csv")
METHODS = {
    "no_split": "no split", "random_cut": "random cuts", "equal_shares": "equal shares, best cuts",
    "common_cut": "best common cut", "regression": "regression and alternation",
    "alternating": "alternation on the table", "exact": "exact",
}  # fmt: skip
HUNDRED = "--clients=100 --cohort_size=10"
TWENTY = "--clients=20 --cohort_size=5"
DIRICHLET = "--partition=dirichlet --dirichlet_alpha=0.3 --min_samples=10"
SEEDS, ONE = "--vary=seed=0,1,2", "--vary=seed=0"
B0, S = "--preset=mnist", "--preset=mnist-s"
LONG, SHORT = "--rounds=64 --eval_every=4", "--rounds=24 --eval_every=2"
LONGEST = "--rounds=80 --eval_every=4"
SCHEMES = "schemes"  # the setting whose runs are those of other schemes
SFL = "b0_100_iid"  # the setting that stands beside them, with the same seed
RESNET18 = "--preset=cifar10"


class Setting(NamedTuple):
    """Trainings of one kind. title: of its tables. flags: of launch.study. targets: test accuracies."""

    title: str
    flags: str
    targets: tuple[float, ...] = (0.97, 0.98, 0.99)


SETTINGS = {
    "b0_100_iid": Setting("B0, 100 clients, IID", f"{SEEDS} {B0} {HUNDRED} {LONG}"),
    "b0_100_dir": Setting("B0, 100 clients, Dirichlet(0.3)", f"{SEEDS} {B0} {HUNDRED} {LONG} {DIRICHLET}"),
    "b0_20_iid": Setting("B0, 20 clients, IID", f"{SEEDS} {B0} {TWENTY} {SHORT}"),
    "b0_20_dir": Setting("B0, 20 clients, Dirichlet(0.3)", f"{SEEDS} {B0} {TWENTY} {SHORT} {DIRICHLET}"),
    "s_100_iid": Setting("S, 100 clients, IID", f"{SEEDS} {S} {HUNDRED} {LONGEST}"),
    "s_100_dir": Setting(
        "S, 100 clients, Dirichlet(0.3)", f"{SEEDS} {S} {HUNDRED} {LONG} {DIRICHLET}", (0.7, 0.8, 0.9)
    ),
    "s_20_iid": Setting("S, 20 clients, IID", f"{SEEDS} {S} {TWENTY} {SHORT} --learning_rate=0.001"),
    "s_20_dir": Setting(
        "S, 20 clients, Dirichlet(0.3)", f"{SEEDS} {S} {TWENTY} {SHORT} {DIRICHLET}", (0.7, 0.8, 0.9)
    ),
    SCHEMES: Setting(
        "B0, 100 clients, IID, other schemes",
        f"--vary=scheme=sfl_v2,psl,sl {B0} {HUNDRED} --rounds=32 --eval_every=2",
    ),
    "cifar_b0": Setting(
        "B0 on CIFAR-10, 100 clients, IID",
        f"{ONE} {B0} {HUNDRED} --dataset=cifar10 --augment=shift:4+flip --rounds=80 --eval_every=5",
        (0.3, 0.4, 0.5),
    ),
    "cifar_resnet18": Setting(
        "ResNet-18 on CIFAR-10, 50 clients, IID", f"{ONE} {RESNET18}", (0.3, 0.4, 0.5)
    ),
}  # fmt: skip


class Run(NamedTuple):
    """One training, by round. accuracies: None where nothing was tested. seconds: by method."""

    losses: list[float]
    accuracies: list[float | None]
    seconds: dict[str, np.ndarray]


def train(names, seeds, more):
    for name in names:
        setting = SETTINGS[name]
        targets = f"--targets={','.join(map(str, setting.targets))}"
        chosen = setting.flags.replace(SEEDS, f"--vary=seed={seeds}")
        given = [*chosen.split(), targets, f"--workdir={ROOT / name}", *more]
        print(f"{name}: python -m launch.study {' '.join(given)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "launch.study", *given], check=False).returncode
        if code:
            sys.exit(code)


def run_of(directory: Path) -> Run:
    """A training with the clock of every method. The plans are made anew, without training."""
    config, _ = workdir.described(str(directory))
    built = parts.build(dataclasses.replace(config, devices=0, init_from=""), lambda text: None)
    lines = recording.logged(str(directory))
    made = report.clocks(str(directory), built.parts, lines, list(METHODS))
    own = next(iter(made))
    clocks = {name: made[own if name == built.parts.planner.method else name] for name in METHODS}
    return Run(
        [line.train_loss for line in lines],
        [line.test_accuracy for line in lines],
        {name: clock.seconds for name, clock in clocks.items()},
    )


def kept() -> dict[str, dict[str, Run]]:
    """The runs of docs/claim.csv, by setting and seed."""
    rows = collections.defaultdict(list)
    if RECORD.exists():
        with RECORD.open(newline="") as file:
            for row in csv.DictReader(file):
                rows[row["setting"], row["seed"]].append(row)
    found: dict[str, dict[str, Run]] = {}
    for (name, seed), lines in sorted(rows.items()):
        found.setdefault(name, {})[seed] = Run(
            [float(line["train_loss"]) for line in lines],
            [float(line["test_accuracy"]) if line["test_accuracy"] else None for line in lines],
            {method: np.array([float(line[method]) for line in lines]) for method in METHODS},
        )
    return found


def keep(names: Iterable[str]) -> dict[str, dict[str, Run]]:
    """Adds the runs that are done to docs/claim.csv, or replaces them there. Returns all that it then has."""
    runs = kept()
    for name in names:
        for seed, directory in done(name).items():
            runs.setdefault(name, {})[seed] = run_of(directory)
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", "seed", "round", "train_loss", "test_accuracy", *METHODS])
        for name, seed in sorted((name, seed) for name, of in runs.items() for seed in of):
            run = runs[name][seed]
            for place, (loss, accuracy) in enumerate(zip(run.losses, run.accuracies, strict=True)):
                seconds = [f"{run.seconds[method][place]:.9g}" for method in METHODS]
                tested = "" if accuracy is None else accuracy
                writer.writerow([name, seed, place + 1, loss, tested, *seconds])
    return runs


def done(name: str) -> dict[str, Path]:
    """The directories of a setting whose training is done, by seed or scheme."""
    found = [path.parent for path in sorted((ROOT / name).glob("*=*/metrics.jsonl"))]
    return {
        path.name.partition("=")[2]: path
        for path in found
        if len(recording.logged(str(path))) == workdir.described(str(path))[0].rounds
    }


def spread(values: list[float], digits: int = 1) -> str:
    """A mean, with the standard deviation where there are several values."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def accuracy_tables(settings):
    """How accurate each setting became, and the simulated seconds of each method to its targets."""
    rows = []
    for name, runs in settings.items():
        last = [100 * run.accuracies[-1] for run in runs]
        total = [run.seconds["exact"][-1] for run in runs]
        means = {method: statistics.fmean(run.seconds[method][-1] for run in runs) for method in METHODS}
        rest = [f"{mean / means['exact']:.2f}" for mean in means.values()]
        rows.append([SETTINGS[name].title, str(len(runs)), spread(last, 2), spread(total), *rest])
    header = ["setting", "seeds", "test accuracy, %", "simulated, s", *METHODS.values()]
    print("All rounds. The columns of methods: their time over that of the exact plans.\n")
    table(header, rows)
    for name, runs in settings.items():
        targets = SETTINGS[name].targets
        print(f"{SETTINGS[name].title}: rounds and simulated seconds to a test accuracy\n")
        places = {t: [totals.first_round(run.accuracies, t) for run in runs] for t in targets}
        rows = [
            [
                "rounds",
                *(to(places[t], [np.arange(1, 1 + len(run.accuracies)) for run in runs]) for t in targets),
            ]
        ]
        for method, title in METHODS.items():
            seconds = [run.seconds[method] for run in runs]
            rows.append([title, *(to(places[t], seconds) for t in targets)])
        table(["", *(words.percent(target, 0) for target in targets)], rows)


def to(places, columns):
    """The mean over the runs of a column at the place of each; says how many have a place, if not all do."""
    reached = [
        float(column[place]) for place, column in zip(places, columns, strict=True) if place is not None
    ]
    if not reached:
        return words.NONE
    note = "" if len(reached) == len(places) else f" ({len(reached)} of {len(places)})"
    return spread(reached) + note


def equality(names, rounds):
    """Whether `sfl` under the exact plans has the numbers of `fl`, line by line: the first rounds, seed 0."""
    rows = []
    for name in names:
        pairs = list(zip(*(first_lines(name, scheme, rounds) for scheme in ("sfl", "fl")), strict=True))
        tested = [(a, b) for a, b in ((a.test_accuracy, b.test_accuracy) for a, b in pairs) if a is not None]
        same = sum(a == b for a, b in tested)
        loss = max(abs(a.train_loss - b.train_loss) / b.train_loss for a, b in pairs)
        cut = statistics.fmean(line.mean_cut for line, _ in pairs)
        title = SETTINGS[name].title
        rows.append([title, str(len(pairs)), f"{same} of {len(tested)}", f"{loss:.1e}", f"{cut:.1f}"])
        print(" | ".join(rows[-1]), flush=True)
    table(["setting", "rounds", "equal test accuracies", "loss apart, relative", "mean cut"], rows)


def first_lines(name, scheme, rounds):
    chosen = [flag for flag in SETTINGS[name].flags.split() if not flag.startswith("--vary=")]
    config = flags.parse([*chosen, f"--scheme={scheme}", "--seed=0"], "train")
    cores.cores_as_devices(config.cohort_size)
    run = sfl.Run.of(parts.build(config, lambda text: None).parts)
    return list(run.rounds(rounds, progress=False))


def scheme_table():
    """Rounds, simulated seconds and bytes of each scheme to the targets, on its own clock."""
    targets = SETTINGS[SCHEMES].targets
    directories = {"sfl": done(SFL)["0"], **done(SCHEMES)}
    runs = [({"scheme": name}, recording.logged(str(path))) for name, path in directories.items()]
    header, *rows = study_table.cells(study_table.summarised(runs, targets), targets)
    table(header, rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "equality", "tables"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", default="0,1,2", help="of the settings that have several")
    parser.add_argument("--rounds", type=int, default=4, help="of equality")
    options, more = parser.parse_known_args()
    if wrong := [name for name in options.names if name not in SETTINGS]:
        parser.error(f"{wrong[0]}: must be one of {', '.join(SETTINGS)}")
    names = options.names or list(SETTINGS)
    if options.what == "train":
        train(names, options.seeds, more)
        return
    if more:
        parser.error(f"{more[0]}: only with train")
    if options.what == "equality":
        equality([name for name in names if name.startswith(("b0_", "s_"))], options.rounds)
        return
    runs = keep(name for name in names if name != SCHEMES)
    plans = {name: list(of.values()) for name, of in sorted(runs.items()) if name in names}
    accuracy_tables(plans)
    if SCHEMES in names and done(SCHEMES) and "0" in done(SFL):
        scheme_table()


if __name__ == "__main__":
    main()
