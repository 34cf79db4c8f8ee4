"""`launch.train --seeds=0,1,2`: several runs in one program, each in its own directory, and their table."""

import contextlib
import dataclasses
import itertools
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from sfl_jax.commands import compilation_cache, parts, study
from sfl_jax.commands.config import Config, settings
from sfl_jax.commands.interruption import SAVED, Stop
from sfl_jax.commands.program import program
from sfl_jax.commands.progress import with_progress
from sfl_jax.commands.rules import several
from sfl_jax.commands.screen import Screen
from sfl_jax.commands.train import (
    AGAIN,
    DIVERGED,
    REMEDY,
    begun,
    environment,
    events_of,
    found,
    how,
    report_of,
    saving,
)
from sfl_jax.errors import BadInput
from sfl_jax.federated import processes
from sfl_jax.files import ensure_writable
from sfl_jax.run import Together, metrics
from sfl_jax.run.loop import Diverged
from sfl_jax.run.recording import Recorder


class Member(NamedTuple):
    """One of the runs.

    case: its settings that vary, and its directory. progress: how far it has come; None if it has not begun.
    """

    case: study.Case
    config: Config
    checkpoints: Any
    progress: Any
    clock: metrics.Stopwatch
    compiling: metrics.CompileClock


def train(config: Config, stop: Stop, say: Screen) -> int:
    """Trains a run for each seed and learning rate. Returns the exit code."""
    if not processes.is_alone():
        raise BadInput("num_processes: must be 1 with --seeds or --learning_rates")
    study.check(config.workdir)
    cases = _cases(config)
    members = [_member(case, config) for case in cases]
    left = [one for one in members if one.progress is None or one.progress.round < config.rounds]
    code, diverged = _train(config, left, stop, say) if left else (0, [])
    cases = [case for case in cases if case not in diverged]
    if code == SAVED or not cases:
        return code
    varied = {name: list(dict.fromkeys(case.values[name] for case in cases)) for name in cases[0].values}
    say.settle()
    chosen = settings(config, "train").items()
    own = [f"--{name}={value}" for name, value in chosen if value != getattr(Config, name)]
    study.write(varied, cases, [*program("train").split(), *own], config.workdir)
    return code


def _cases(config) -> list[study.Case]:
    lists = {"seed": several(config, "seeds", int)} if config.seeds else {}
    lists |= {"learning_rate": several(config, "learning_rates", float)} if config.learning_rates else {}
    combinations = [
        dict(zip(lists, map(str, values), strict=True)) for values in itertools.product(*lists.values())
    ]
    return [study.Case(values, [], Path(config.workdir) / study.named(values)) for values in combinations]


def _member(case, config) -> Member:
    values = {name: type(getattr(Config, name))(value) for name, value in case.values.items()}
    own = dataclasses.replace(config, seeds="", learning_rates="", workdir=str(case.directory), **values)
    ensure_writable(own.workdir, "workdir", own.workdir)
    own, checkpoints, progress = found(own)
    wall_s, compile_s = (progress.wall_s, progress.compile_s) if progress else (0.0, 0.0)
    return Member(
        case, own, checkpoints, progress, metrics.Stopwatch(wall_s), metrics.CompileClock(compile_s)
    )


def _train(config, members, stop, say) -> tuple[int, list[study.Case]]:
    """The exit code, and the cases whose numbers diverged."""
    if saved := [f"{one.case.directory.name} {one.progress.round}" for one in members if one.progress]:
        stop.keep(f"of {config.rounds} rounds are saved: {', '.join(saved)}; {AGAIN}")
    stop.may_end("reading the data and planning")
    if config.compilation_cache:
        compilation_cache.enable()
    notes = compilation_cache.notes() if config.compilation_cache else None
    with contextlib.ExitStack() as stack:
        for one in members:
            stack.enter_context(one.compiling)
        all_begun = [begun(one.config, one.checkpoints, one.progress, None, say) for one in members]
        runs = [run for _, run in all_begun]
        before = next((parts.settled(one.progress.settings) for one in members if one.progress), None)
        stop.may_end("measuring and compiling")
        together = Together(runs, before, notes, say)
        say.result(f"{len(runs)} runs in one program; {how(runs[0].parts)}")
        stop.must_end_well("this round, which is saved")
        recorders, events = [], []
        for one, (built, run) in zip(members, all_begun, strict=True):
            own = settings(parts.with_execution(one.config, run.parts.execution), "train")
            recorder = Recorder(
                one.config.workdir, saving(one.config), own, one.checkpoints, one.progress, one.clock,
                one.compiling,
            )  # fmt: skip
            recorders.append(stack.enter_context(contextlib.closing(recorder)))
            recorder.begin(
                run.state, parts.inputs(built), parts.network(built), environment(built, run.tried)
            )
            events.append(stack.enter_context(events_of(one.config, run)))
        return _rounds(config, members, runs, together, [*zip(recorders, events, strict=True)], stop, say)


def _rounds(config, members, runs, together, records, stop, say) -> tuple[int, list[study.Case]]:
    """Trains the rounds that are left, and records them. Returns what `_train` does."""
    lines = together.rounds([config.rounds - run.round for run in runs], [one.clock for one in members])
    done = min(run.round for run in runs)

    def recorded():
        for of_round in lines:
            for run, (recorder, events), line in zip(runs, records, of_round, strict=True):
                if line is not None:
                    written = recorder.add(run.state, line)
                    if events:
                        events.add(written)
            yield _mean([line for line in of_round if line is not None])
            if stop.asked:
                return

    try:
        beside = f", and compiling for {len(runs)} runs if that is not kept"
        for _ in with_progress(recorded(), done, config.rounds, say, beside):
            pass
        say.settle()
        for run, (recorder, _) in zip(runs, records, strict=True):
            if run.is_held:
                recorder.save(run.state, wait=True)
    except BaseException:
        for run, (recorder, _) in zip(runs, records, strict=True):
            recorder.rescue(run.state)
        raise
    finally:
        lines.close()
    for place, error in together.errors.items():
        if not isinstance(error, Diverged):
            raise error
        say.aside(f"error: {members[place].case.directory.name}: {error}; {REMEDY}")
    diverged = [members[place].case for place in together.errors]
    if any(run.round < config.rounds for place, run in enumerate(runs) if place not in together.errors):
        say.aside(f"interrupted; the rounds are saved; {AGAIN}")
        return SAVED, diverged
    stop.keep(f"all {config.rounds} rounds are saved")
    stop.may_end("writing the reports")
    for one, run in zip(members, runs, strict=True):
        if one.case not in diverged:
            say.result(report_of(one.config, run.parts))
    return DIVERGED if diverged else 0, diverged


def _mean(lines) -> metrics.Round:
    """The means over the runs of what a person sees of a round."""
    names = ("train_loss", "simulated_s", "mean_cut")
    tested = [line.test_accuracy for line in lines]
    means = {name: statistics.fmean(getattr(line, name) for line in lines) for name in names}
    accuracy = None if None in tested else statistics.fmean(tested)
    return lines[0]._replace(round=min(line.round for line in lines), test_accuracy=accuracy, **means)
