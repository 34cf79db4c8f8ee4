"""Less training latency at the same accuracy, measured: python -m benchmarks.claim train|tables [NAME ...]

`train` trains the runs of docs/claim.md into runs/claim, through launch.study; it goes on where it was
interrupted. NAME is one of the settings below; without one, all are trained, for many hours on two cores.
Other flags are passed on, for example --data_dir for CIFAR-10.
`tables` reads the runs that are there, prints the tables of the page, and writes runs/claim/clocks.csv for
its picture. The tables of the method by itself are those of benchmarks.paper_method.
"""

import argparse
import csv
import dataclasses
import functools
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.paper_method import table
from sfl_jax.commands import parts, report, study_table, totals, words, workdir
from sfl_jax.run import recording

ROOT = Path("runs/claim")
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
    "b0_100_iid_fl": Setting("B0, 100 clients, IID, fl", f"{ONE} --scheme=fl {B0} {HUNDRED} {LONG}"),
    "b0_20_dir_fl": Setting(
        "B0, 20 clients, Dirichlet(0.3), fl", f"{ONE} --scheme=fl {B0} {TWENTY} {SHORT} {DIRICHLET}"
    ),
    "s_100_iid": Setting("S, 100 clients, IID", f"{SEEDS} {S} {HUNDRED} {LONGEST}"),
    "s_100_dir": Setting("S, 100 clients, Dirichlet(0.3)", f"{SEEDS} {S} {HUNDRED} {LONG} {DIRICHLET}"),
    "s_20_iid": Setting("S, 20 clients, IID", f"{SEEDS} {S} {TWENTY} {SHORT}"),
    "s_20_dir": Setting("S, 20 clients, Dirichlet(0.3)", f"{SEEDS} {S} {TWENTY} {SHORT} {DIRICHLET}"),
    "s_20_iid_fl": Setting("S, 20 clients, IID, fl", f"{ONE} --scheme=fl {S} {TWENTY} {SHORT}"),
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
    """One training. accuracies: by round, None where nothing was tested. seconds: by method and round."""

    accuracies: list[float | None]
    seconds: dict[str, np.ndarray]


def train(names, more):
    for name in names:
        setting = SETTINGS[name]
        targets = f"--targets={','.join(map(str, setting.targets))}"
        flags = [*setting.flags.split(), targets, f"--workdir={ROOT / name}", *more]
        print(f"{name}: python -m launch.study {' '.join(flags)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "launch.study", *flags], check=False).returncode
        if code:
            sys.exit(code)


@functools.cache
def run_of(directory: Path) -> Run:
    """A training with the clock of every method. The plans are made anew, without training."""
    config, _ = workdir.described(str(directory))
    built = parts.build(dataclasses.replace(config, devices=0, init_from=""), lambda text: None)
    lines = recording.logged(str(directory))
    made = report.clocks(str(directory), built.parts, lines, list(METHODS))
    own = next(iter(made))
    clocks = {name: made[own if name == built.parts.planner.method else name] for name in METHODS}
    return Run(
        [line.test_accuracy for line in lines],
        {name: clock.seconds for name, clock in clocks.items()},
    )


def runs_of(name: str) -> dict[str, Path]:
    """The directories of a setting whose training is done, by seed or scheme."""
    found = [path.parent for path in sorted((ROOT / name).glob("*=*/metrics.jsonl"))]
    done = [
        path for path in found if len(recording.logged(str(path))) == workdir.described(str(path))[0].rounds
    ]
    return {path.name.partition("=")[2]: path for path in done}


def spread(values: list[float], digits: int = 1) -> str:
    """A mean, with the standard deviation where there are several values."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def accuracy_tables(names):
    """How accurate each setting became, and the simulated seconds of each method to its targets."""
    rows = []
    for name in names:
        runs = [run_of(path) for path in runs_of(name).values()]
        last = [100 * run.accuracies[-1] for run in runs]
        total = [run.seconds["exact"][-1] for run in runs]
        means = {method: statistics.fmean(run.seconds[method][-1] for run in runs) for method in METHODS}
        rest = [f"{mean / means['exact']:.2f}" for mean in means.values()]
        rows.append([SETTINGS[name].title, str(len(runs)), spread(last, 2), spread(total), *rest])
    header = ["setting", "seeds", "test accuracy, %", "simulated, s", *METHODS.values()]
    print("All rounds. The columns of methods: their time over that of the exact plans.\n")
    table(header, rows)
    for name in names:
        runs = [run_of(path) for path in runs_of(name).values()]
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


def equality_table(names):
    """Whether `sfl` under the exact plans has the numbers of `fl`, line by line."""
    rows = []
    for name in names:
        if not name.endswith("_fl"):
            continue
        for seed, directory in runs_of(name).items():
            twin = runs_of(name.removesuffix("_fl")).get(seed)
            if twin is None:
                continue
            pairs = list(zip(recording.logged(str(directory)), recording.logged(str(twin)), strict=True))
            tested = [(a.test_accuracy, b.test_accuracy) for a, b in pairs if a.test_accuracy is not None]
            loss = max(abs(a.train_loss - b.train_loss) / b.train_loss for a, b in pairs)
            same = sum(a == b for a, b in tested)
            apart = max(abs(a - b) for a, b in tested)
            title = SETTINGS[name].title.removesuffix(", fl")
            rows.append([title, seed, f"{same} of {len(tested)}", f"{100 * apart:.2f}", f"{loss:.1e}"])
    table(["setting", "seed", "equal test accuracies", "most apart, points", "loss apart, relative"], rows)


def scheme_table():
    """Rounds, simulated seconds and bytes of each scheme to the targets, on its own clock."""
    targets = SETTINGS[SCHEMES].targets
    directories = {"sfl": runs_of(SFL)["0"], **runs_of(SCHEMES)}
    runs = [({"scheme": name}, recording.logged(str(path))) for name, path in directories.items()]
    header, *rows = study_table.cells(study_table.summarised(runs, targets), targets)
    table(header, rows)


def write_clocks(names):
    """A file for the picture: test accuracy and each method's seconds, of seed 0 of each setting."""
    with (ROOT / "clocks.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", "round", "test_accuracy", *METHODS])
        for name in names:
            run = run_of(runs_of(name)["0"])
            for place, accuracy in enumerate(run.accuracies):
                if accuracy is not None:
                    seconds = (f"{run.seconds[method][place]:.6g}" for method in METHODS)
                    writer.writerow([name, place + 1, accuracy, *seconds])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "tables"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SETTINGS))
    options, more = parser.parse_known_args()
    if wrong := [name for name in options.names if name not in SETTINGS]:
        parser.error(f"{wrong[0]}: must be one of {', '.join(SETTINGS)}")
    names = options.names or list(SETTINGS)
    if options.what == "train":
        train(names, more)
        return
    if more:
        parser.error(f"{more[0]}: only with train")
    there = [name for name in names if runs_of(name)]
    plans = [name for name in there if name != SCHEMES and not name.endswith("_fl")]
    accuracy_tables(plans)
    equality_table(there)
    if SCHEMES in there and runs_of(SFL):
        scheme_table()
    write_clocks(plans)


if __name__ == "__main__":
    main()
