"""Split federated training: each round plans cuts and shares, trains a cohort and simulates its time."""

import contextlib
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from sfl_jax.commands import flags, software, tensorboard, words
from sfl_jax.commands.config import Config, as_flags, settings
from sfl_jax.commands.interruption import interruption
from sfl_jax.commands.program import program
from sfl_jax.commands.progress import with_progress
from sfl_jax.commands.screen import Screen, first_line, is_perhaps_first, screen
from sfl_jax.errors import BadInput
from sfl_jax.files import NotWritten, ensure_writable, locked

DIVERGED, INTERRUPTED = 3, 75
AGAIN = "run the same command again to go on"
REMEDY = "try a lower --learning_rate, more --warmup_rounds, or --on_divergence=skip_client"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return flags.run(train, "train", str(__doc__), argv)


def train(config: Config) -> int:
    """Trains, or goes on with the run in the workdir, and ends with a table.

    Writes config.json, metrics.jsonl and checkpoints into the workdir. With several processes, only the first
    writes.
    """
    tensorboard.check(config.tensorboard)
    ensure_writable(config.workdir, "workdir", config.workdir)
    with contextlib.ExitStack() as stack:
        say = stack.enter_context(screen(first_line(config), is_perhaps_first(config)))
        stop = stack.enter_context(interruption())
        stop.may_end("starting JAX")
        from sfl_jax.commands import accelerators

        accelerators.start()
        from jax.errors import JaxRuntimeError

        from sfl_jax.federated import cores, processes

        accelerators.switch(config.deterministic, config.matmul_precision)
        processes.join(
            config.coordinator_address or None,
            config.num_processes or None,
            None if config.process_id < 0 else config.process_id,
            config.join_timeout_s,
            config.heartbeat_timeout_seconds,
            words=as_flags,
        )
        if config.devices != 1:
            cores.cores_as_devices(config.cohort_size)
        accelerators.find()
        if not processes.is_alone():
            stop.wait_for_others()
        writes = say.speaks = processes.is_first()
        if writes:
            stack.enter_context(locked(config.workdir, "workdir", config.workdir))
        stack.enter_context(processes.together())
        try:
            if config.seeds or config.learning_rates:
                from sfl_jax.commands import train_together

                return train_together.train(config, stop, say)
            return _train(config, stop, writes, say)
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise BadInput(_too_large(config)) from error
        except NotWritten as error:
            print(f"error: --workdir={config.workdir}: {error}; solve this, then {AGAIN}", file=sys.stderr)
            return INTERRUPTED


def _too_large(config) -> str:
    if not config.clients_per_chunk:
        return "--clients_per_chunk=0: the chosen number does not fit into the memory; try 1"
    flag = "clients_per_chunk" if config.clients_per_chunk > 1 else "batch_size"
    value = getattr(config, flag)
    way_out = f"try {value // 2}" if value > 1 else "choose a smaller --image_size or --model"
    return f"--{flag}={value}: does not fit into the memory; {way_out}"


def _train(config, stop, writes, say) -> int:
    from sfl_jax.commands import compilation_cache, parts
    from sfl_jax.federated import processes
    from sfl_jax.run import metrics, recording

    config, checkpoints, progress = found(config)
    # This also keeps the first process from writing while another still reads.
    processes.agree(
        progress.round if progress else -1,
        f"--workdir={config.workdir}: must be one place for all processes, but they find different rounds",
    )
    if progress is not None and progress.round >= config.rounds:
        from sfl_jax.commands import report

        say.result(
            f"--workdir={config.workdir}: all {progress.round} rounds are done; nothing was trained\n"
            "  to begin again, give another --workdir"
        )
        if (page := Path(config.workdir) / report.NAME).exists():
            say.result(f"  report: {page}")
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
            say(f"the learning rate rises until the last round: --warmup_rounds={config.warmup_rounds}")
        notes = compilation_cache.notes() if config.compilation_cache else None
        built, run = begun(config, checkpoints, progress, notes, say)
        before = parts.settled(progress.settings) if progress else None
        stop.may_end("measuring and compiling")
        run.compile(config.rounds, before, notes, say)
        config = parts.with_execution(config, run.parts.execution)
        say.result(how(run.parts))
        recorder = (
            recording.Recorder(
                config.workdir, saving(config), settings(config, "train"), checkpoints, progress, clock,
                compiling,
            )
            if writes
            else recording.Silent(clock, compiling)
        )  # fmt: skip
        with contextlib.closing(recorder), contextlib.ExitStack() as stack:
            stop.must_end_well("this round, which is saved")
            recorder.begin(
                run.state, parts.inputs(built), parts.network(built), environment(built, run.tried)
            )
            events = stack.enter_context(events_of(config, run)) if writes else None
            return _rounds(config, run, recorder, events, stop, say)


def found(config: Config) -> tuple[Config, Any, Any]:
    """(the settled settings, the checkpoints in the workdir, how far its run has come or None)."""
    from sfl_jax.commands import division, workdir
    from sfl_jax.run.checkpoints import Checkpoints

    logging.set_verbosity(logging.FATAL)  # absl's; orbax also logs the tracebacks of errors that it raises
    config, _ = division.settle(config)  # the comparison with the workdir's run needs this
    checkpoints = Checkpoints(Path(config.workdir) / "checkpoints", config.keep)
    return config, checkpoints, workdir.reached(config, checkpoints)


def begun(config: Config, checkpoints: Any, progress: Any, notes: Any, say: Screen) -> tuple[Any, Any]:
    """(what was built, the run with its state: drawn, or read from its checkpoint)."""
    from sfl_jax.commands import parts, workdir
    from sfl_jax.run import Run

    built = parts.build(config, say, progress)
    for note in built.notes:
        say.result(note)
    run = Run.of(built.parts)
    run.load(notes)
    if progress is None:
        say("drawing the first weights" if not config.init_from else f"reading {config.init_from}")
        run.start()
    else:
        workdir.check_inputs(config, progress, parts.inputs(built))
        run.resume(checkpoints, progress)
        say.result(f"--workdir={config.workdir}: going on after round {run.round} of {config.rounds}")
    return built, run


def saving(config: Config) -> Any:
    """When and how strictly a run saves."""
    from sfl_jax.run import recording

    return recording.Saving(
        config.checkpoint_every_rounds, config.checkpoint_every_s, config.on_write_error == "stop"
    )


def events_of(config: Config, run: Any) -> Any:
    """A context with the event file of the run for TensorBoard, or with None if no flag asks for it."""
    if not config.tensorboard:
        return contextlib.nullcontext()
    from sfl_jax.run import recording

    done = recording.logged(config.workdir) if run.round else ()
    return contextlib.closing(tensorboard.Events(config.workdir, done))


def _rounds(config, run, recorder, events, stop, say) -> int:
    """Runs the rounds that are left. events: for TensorBoard, or None. Returns the exit code."""
    from sfl_jax.commands import report
    from sfl_jax.federated import processes
    from sfl_jax.run.loop import Diverged

    last = None

    def is_asked_to_stop():
        return processes.any_of(stop.asked)

    def pauses(round):
        return not processes.is_alone() or is_asked_to_stop() or recorder.is_due(round)

    try:
        rounds = run.rounds(config.rounds - run.round, recorder.clock, pauses)
        rounds = with_progress(rounds, run.round, config.rounds, say)
        while not (is_asked_to_stop() and run.is_held) and (done := next(rounds, None)):
            last = done
            written = recorder.add(run.state, last)
            if events:
                events.add(written)
        say.settle()
        recorder.save(run.state, wait=True)
    except Diverged as error:
        if run.is_held:
            recorder.save(run.state, wait=True)
        kept = "is" if recorder.saved_round == run.round else "is not"
        say.aside(f"error: {error}; round {run.round} {kept} saved; {REMEDY}")
        return DIVERGED
    except NotWritten:
        raise
    except Exception:
        if recorder.rescue(run.state):
            say.aside(f"round {run.round} of {config.rounds} is saved; solve the error, then {AGAIN}")
        raise
    if recorder.saved_round != run.round:
        say.aside(f"error: --workdir={config.workdir}: round {run.round} is not saved; {AGAIN}")
        return INTERRUPTED
    if run.round < config.rounds:
        say.aside(f"interrupted, round {run.round} of {config.rounds} is saved; {AGAIN}")
        return INTERRUPTED
    stop.keep(f"all {config.rounds} rounds are saved")
    stop.may_end("writing the report")
    clock_s, compile_s = recorder.clock.seconds, recorder.compiling.seconds
    lines = recorder.came(), recorder.mean_cuts(), len(run.parts.training.chain)
    say.result(summary(config, run.state.simulated_s, last, clock_s, compile_s, *lines))
    if processes.is_first():
        say(f"drawing {report.NAME}")
        say.result(report_of(config, run.parts))
    return 0


def report_of(config: Config, parts: Any) -> str:
    """Where the page of the finished run is, or why there is none. Everything else is saved already."""
    from sfl_jax.commands import report

    path = Path(config.workdir) / report.NAME
    try:
        note = report.write(config.workdir, parts)
        return f"  report: {path}" + (f"; {note}" if note else "")
    except Exception as error:  # the run is saved; an error of a picture or a font must not end it
        reason = " ".join(as_flags(f"{error}").split()) or type(error).__name__
        return f"{path}: cannot be written ({reason}); {program('report')} writes it later"


def how(parts: Any) -> str:
    """A line that says how the devices compute this run."""
    devices, size = len(parts.devices), parts.execution.clients_per_chunk
    number = "one client after the other" if size == 1 else f"{size} clients at once"
    where = f" on each of {devices} devices" if devices > 1 else ""
    return f"layers in {parts.execution.layer_form} form, {number}{where}"


def environment(built: Any, tried: Any) -> dict[str, Any]:
    """What the numbers of a run may depend on beside its settings."""
    return {
        "python": platform.python_version(),
        "packages": software.packages(),
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in built.parts.devices],
        "input_scaling": built.scaling._asdict(),
        "seconds_per_client_step": {str(one): seconds for one, seconds in tried.items()},
        "git_commit": software.git_commit(),
        "begun": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
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
    """The closing table: accuracy, every method's simulated time beside this plan's, and wall time.

    came, mean_cuts: for each round, how many clients contributed, and their mean cut. units: of the network,
    to notice plans that cut nothing.
    """
    from sfl_jax.run.metrics import attendance

    cohort = attendance(config.cohort_size, config.clients, came)
    failed = sum(number == 0 for number in came)
    own, own_s = next(iter(simulated_s.items()))  # the scheme may have chosen the method
    rows: list[tuple[str, ...]] = [("test accuracy", words.percent(last.test_accuracy))]
    if failed:
        rows.append(("failed rounds, without a client", str(failed)))
    for name, seconds in simulated_s.items():
        label = f"simulated time, {name}" + (" (this plan)" if name == own else "")
        rows.append((label, words.clock(seconds), "" if name == own else words.beside(seconds, own_s)))
    compiling = f"of which compiling {compile_s:.1f} s"
    if compile_s > wall_s:
        compiling = f"compiling {compile_s:.1f} s in several threads at once"
    rows.append(("wall time", f"{wall_s:.1f} s", compiling))
    lines = [f"{config.model} on {config.dataset}, {last.round} rounds of {cohort}", words.columns(rows)]
    if mean_cuts and min(mean_cuts) == units:
        lines.append("  all clients keep the whole network: a split gains nothing")
    lines.append("  simulated times: FLOP = 2 x multiply-accumulates, backward work counted from the trace")
    if config.deadline_factor:
        lines.append(f"  {words.whose_accuracy(config.deadline_factor)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
