"""Split federated training: every round plans cuts and shares, trains a cohort, and keeps its simulated
time.
"""

import contextlib
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from sfl_jax.commands import flags, software, words
from sfl_jax.commands.interruption import interruption
from sfl_jax.commands.program import program
from sfl_jax.commands.progress import with_progress
from sfl_jax.commands.screen import first_line, is_perhaps_first, screen
from sfl_jax.config import Config
from sfl_jax.errors import BadInput
from sfl_jax.files import NotWritten, ensure_writable, locked

DIVERGED, INTERRUPTED = 3, 75
AGAIN = "run the same command again to go on"
REMEDY = "try a lower --learning_rate, more --warmup_rounds, or --on_divergence=skip_client"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return flags.run(train, "train", str(__doc__), argv)


def train(config: Config) -> int:
    """Train, or go on with the run in the workdir, which gets config.json, metrics.jsonl and checkpoints; end
    with a table. Of several processes the first alone writes.
    """
    ensure_writable(config.workdir, "workdir", config.workdir)
    with contextlib.ExitStack() as stack:
        say = stack.enter_context(screen(first_line(config), is_perhaps_first(config)))
        stop = stack.enter_context(interruption())
        stop.may_end("starting JAX")
        from sfl_jax import accelerators

        accelerators.start()
        from jax.errors import JaxRuntimeError

        from sfl_jax.federated import processes

        accelerators.switch(config)
        processes.join(config)
        accelerators.find()
        if not processes.is_alone():
            stop.wait_for_others()
        writes = say.speaks = processes.is_first()
        if writes:
            stack.enter_context(locked(config.workdir, "workdir", config.workdir))
        stack.enter_context(processes.together())
        try:
            return _train(config, stop, writes, say)
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise BadInput(_too_large(config)) from error
        except NotWritten as error:
            print(f"error: --workdir={config.workdir}: {error}; {AGAIN} once that is mended", file=sys.stderr)
            return INTERRUPTED


def _too_large(config) -> str:
    if not config.clients_per_chunk:
        return "--clients_per_chunk=0: as many as were chosen do not fit into the memory; try 1"
    flag = "clients_per_chunk" if config.clients_per_chunk > 1 else "batch_size"
    value = getattr(config, flag)
    way_out = f"try {value // 2}" if value > 1 else "choose a smaller --image_size or --model"
    return f"--{flag}={value}: does not fit into the memory; {way_out}"


def _train(config, stop, writes, say) -> int:
    from sfl_jax import compilation_cache, division, experiment, metrics, recording
    from sfl_jax.checkpoints import Checkpoints
    from sfl_jax.federated import processes

    logging.set_verbosity(logging.FATAL)  # absl's: orbax logs tracebacks of errors that it raises as well
    workdir = Path(config.workdir)
    config, _ = division.settle(config)  # whether it is the run in the workdir depends on it
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep)
    progress = recording.reached(config, checkpoints)
    # Also keeps the first from writing while another still looks for what there is.
    processes.agree(
        progress.round if progress else -1,
        f"--workdir={config.workdir}: must be one place for all processes, but they find other rounds in it",
    )
    if progress is not None and progress.round >= config.rounds:
        say.result(f"--workdir={config.workdir}: done, all {progress.round} rounds; nothing was trained")
        return 0
    if progress is not None:
        stop.keep(f"round {progress.round} of {config.rounds} is saved; {AGAIN}")
    stop.may_end("reading the data and planning")
    if config.compilation_cache:
        compilation_cache.enable()
    before_s, compiled_s = (progress.wall_s, progress.compile_s) if progress else (0.0, 0.0)
    clock = metrics.Stopwatch(before_s)
    with metrics.CompileClock(compiled_s) as compiling:
        if config.warmup_rounds > config.rounds:
            say(f"the learning rate rises to the last round: --warmup_rounds={config.warmup_rounds}")
        built = experiment.build(config, say, progress)
        for note in built.notes:
            say.result(note)
        inputs = experiment.inputs(built)
        if progress is None:
            say("drawing the first weights" if not config.init_from else f"reading {config.init_from}")
            state = experiment.start(built)
        else:
            recording.check_inputs(config, progress, inputs)
            state = experiment.resume(built, checkpoints, progress)
            say.result(f"--workdir={config.workdir}: going on after round {state.round} of {config.rounds}")
        before = progress.settings if progress else None
        notes = compilation_cache.notes() if config.compilation_cache else None
        stop.may_end("measuring and compiling")
        built, engine = experiment.compile(built, state, before, notes, say)
        say.result(_how(built))
        recorder = (
            recording.Recorder(built.config, checkpoints, progress, clock, compiling)
            if writes
            else recording.Silent(clock, compiling)
        )
        with contextlib.closing(recorder):
            stop.must_end_well("this round, which is saved")
            recorder.begin(state, inputs, experiment.network(built), environment(built, engine))
            return _rounds(experiment, built, engine, state, recorder, stop, say)


def _rounds(experiment, built, engine, start, recorder, stop, say) -> int:
    """Run the rounds that are left, under the eyes of `recorder`; the exit code."""
    from sfl_jax.commands import report
    from sfl_jax.federated import processes

    config, state, last = built.config, start, None

    def is_asked_to_stop():
        return processes.any_of(stop.asked)

    def pauses(round):
        return not processes.is_alone() or is_asked_to_stop() or recorder.is_due(round)

    try:
        rounds = experiment.run(built, start, engine, recorder.clock, pauses)
        rounds = with_progress(rounds, start.round, config.rounds, say)
        while not (is_asked_to_stop() and experiment.is_held(state)) and (done := next(rounds, None)):
            state, last = done
            recorder.add(state, last)
        say.settle()
        recorder.save(state, wait=True)
    except experiment.Diverged as error:
        if experiment.is_held(error.state):
            recorder.save(error.state, wait=True)
        kept = "is" if recorder.saved_round == error.state.round else "is not"
        say.aside(f"error: {error}; round {error.state.round} {kept} saved; {REMEDY}")
        return DIVERGED
    except NotWritten:
        raise
    except Exception:
        if recorder.rescue(state):
            say.aside(f"round {state.round} of {config.rounds} is saved; {AGAIN} once that is mended")
        raise
    if recorder.saved_round != state.round:
        say.aside(f"error: --workdir={config.workdir}: round {state.round} is not saved; {AGAIN}")
        return INTERRUPTED
    if state.round < config.rounds:
        say.aside(f"interrupted, round {state.round} of {config.rounds} is saved; {AGAIN}")
        return INTERRUPTED
    stop.keep(f"all {config.rounds} rounds are saved")
    stop.may_end("writing the report")
    clock_s, compile_s = recorder.clock.seconds, recorder.compiling.seconds
    run = recorder.came(), recorder.mean_cuts(), len(built.training.chain)
    say.result(summary(config, state.simulated_s, last, clock_s, compile_s, *run))
    if processes.is_first():
        say(f"drawing {report.NAME}")
        say.result(_report(built, experiment.RIVALS))
    return 0


def _report(built, rivals) -> str:
    """Where the page of a run that is done is, or why it is not there; all else has been saved."""
    from sfl_jax.commands import report

    path = Path(built.config.workdir) / report.NAME
    try:
        note = report.write(built, rivals)
        return f"  report: {path}" + (f"; {note}" if note else "")
    except Exception as error:  # the run is done and saved, whatever a picture or a font does
        reason = " ".join(f"{error}".split()) or type(error).__name__
        return f"{path}: cannot be written ({reason}); {program('report')} writes it later"


def _how(built) -> str:
    """How the devices compute this run, in a line."""
    config, devices, size = built.config, len(built.devices), built.config.clients_per_chunk
    number = "one client after the other" if size == 1 else f"{size} clients at once"
    where = f" on each of {devices} devices" if devices > 1 else ""
    return f"layers in {config.layer_form} form, {number}{where}"


def environment(built: Any, engine: Any) -> dict[str, Any]:
    """What the numbers of a run may depend on besides its settings."""
    return {
        "python": platform.python_version(),
        "packages": software.packages(),
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in built.devices],
        "input_scaling": built.scaling._asdict(),
        "seconds_per_client_step": {str(one): seconds for one, seconds in engine.tried.items()},
        "git_commit": software.git_commit(),
    }


def summary(
    config: Config,
    simulated_s: dict[str, float],
    last: Any,
    wall_s: float,
    compile_s: float,
    came: Sequence[int],
    mean_cuts: Sequence[float] = (),
    units: int = 0,
) -> str:
    """The closing table: accuracy, every scheme's simulated time against this plan's, and this machine's.

    came, mean_cuts: of each round, how many clients' work went into it, and their mean cut. units: of the
    network, so that plans that cut nothing are told.
    """
    from sfl_jax.metrics import attendance

    cohort = attendance(config.cohort_size, config.clients, came)
    failed = sum(number == 0 for number in came)
    own, own_s = config.method, simulated_s[config.method]
    rows: list[tuple[str, ...]] = [("test accuracy", words.percent(last.test_accuracy))]
    if failed:
        rows.append(("failed rounds, without a client", str(failed)))
    for name, seconds in simulated_s.items():
        label = f"simulated time, {name}" + (" (this plan)" if name == own else "")
        rows.append((label, words.clock(seconds), "" if name == own else words.beside(seconds, own_s)))
    rows.append(("wall time", f"{wall_s:.1f} s", f"of which compiling {compile_s:.1f} s"))
    lines = [f"{config.model} on {config.dataset}, {last.round} rounds of {cohort}", words.columns(rows)]
    if mean_cuts and min(mean_cuts) == units:
        lines.append("  all clients keep the whole network: nothing to gain by a split")
    lines.append("  simulated times: FLOP = 2 x multiply-accumulates, backward work counted from the trace")
    if config.deadline_factor:
        lines.append(f"  {words.whose_accuracy(config.deadline_factor)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
