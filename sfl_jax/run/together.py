"""Runs that differ in numbers alone, such as their seeds: one compiled program computes a round of each."""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax.errors import BadInput
from sfl_jax.federated import devices as federated_devices
from sfl_jax.federated import tuning
from sfl_jax.federated.execution import Execution
from sfl_jax.run.metrics import Stopwatch
from sfl_jax.run.parts import Parts, Say, silent
from sfl_jax.run.run import Line, Run
from sfl_jax.run.saving import fingerprints

# Parts that only the host reads in each round, and what they draw. All others are compiled.
_MAY_DIFFER = {
    "partition", "fleet", "rate", "planner", "sampling", "availability", "faults", "rivals", "seed",
}  # fmt: skip


class Together:
    """Trains several runs at the same time. Each has its own state, and gives the lines that it gives alone.

    The data and the compiled programs are those of the first run. Where the devices compute several clients
    at once, they also compute the runs at once, if the memory allows it; elsewhere one after the other.

    before, notes, say: see `Run.compile`. errors: by place, what ended a run before its last round, for
    example `loop.Diverged`. The others go on.

    Raises:
      BadInput: the runs differ in a part that is compiled, or there are several processes, or the samples do
        not fit on the devices.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        before: Execution | None = None,
        notes: Path | None = None,
        say: Say = silent,
    ):
        if not runs:
            raise BadInput("runs: must be one or more")
        first = runs[0]
        _check_alike([run.parts for run in runs])
        if jax.process_count() > 1:
            raise BadInput(f"num_processes={jax.process_count()}: must be 1 for several runs in one program")
        self.runs, self.errors = tuple(runs), {}
        for run in runs:
            run.state  # noqa: B018 draws the first weights
        first.compile(first.round, before, notes, say)  # its own round is never compiled
        engine, training = first.engine, first.parts.training
        assert engine is not None
        if not isinstance(engine.samples.labels, jax.Array):
            raise BadInput("dataset: must fit on each device for several runs in one program")
        self._joint = _Joint(first.parts, engine, [run.parts for run in runs])
        for place, run in enumerate(runs):
            run.parts = dataclasses.replace(run.parts, execution=first.parts.execution, training=training)
            run.engine = engine._replace(run_round=self._joint.of_run(place))

    def rounds(
        self, rounds: int | Sequence[int], clocks: Sequence[Stopwatch] | None = None
    ) -> Iterator[tuple[Line | None, ...]]:
        """Trains `rounds` more rounds of each run, or of each its own number.

        Yields, round by round, a line of each run. That of a run that has ended is None.
        """
        numbers = [rounds] * len(self.runs) if isinstance(rounds, int) else [*rounds]
        going = {
            place: run.rounds(number, clocks[place] if clocks else None, progress=False)
            for place, (run, number) in enumerate(zip(self.runs, numbers, strict=True))
            if number
        }
        self._joint.begin(going)
        try:
            with ThreadPoolExecutor(len(self.runs), "runs") as pool:
                while going:
                    sent = {place: pool.submit(self._next, place, lines) for place, lines in going.items()}
                    lines = [sent[i].result() if i in sent else None for i in range(len(self.runs))]
                    going = {place: going[place] for place in going if lines[place] is not None}
                    if going:
                        yield tuple(lines)
        finally:
            for lines in going.values():
                lines.close()

    def _next(self, place, lines) -> Line | None:
        try:
            line = next(lines, None)
        except Exception as error:
            self.errors[place], line = error, None
        if line is None:
            self._joint.leave(place)
        return line


class _Joint:
    """One program for the rounds of several runs.

    Each run calls its own function, in a thread of its own, and waits there until all have called.
    """

    def __init__(self, parts: Parts, engine: Any, all_parts: Sequence[Parts]):
        self._parts, self._rounds = parts, engine.run_round
        self._runs, self._steps = len(all_parts), max(one.steps_max for one in all_parts)
        self._program: Any = None
        self._changed = threading.Condition()
        self._going: set[int] = set()
        self._asked: dict[int, tuple[Any, ...]] = {}
        self._answers: dict[int, Any] = {}

    def of_run(self, place: int) -> Any:
        """`Rounds` for the run at this place."""
        return lambda *arguments: self._answer(place, arguments)

    def begin(self, places: Any) -> None:
        """The runs at these places are under way; no round waits for the others."""
        self._going, self._asked, self._answers = set(places), {}, {}

    def leave(self, place: int) -> None:
        """No round waits for this run any more."""
        with self._changed:
            self._going.discard(place)
            self._compute_if_complete()

    def _answer(self, place, arguments):
        with self._changed:
            self._asked[place] = arguments
            self._compute_if_complete()
            self._changed.wait_for(lambda: place in self._answers)
            answer = self._answers.pop(place)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _compute_if_complete(self):
        if not self._asked or len(self._asked) < len(self._going):
            return
        asked, self._asked = self._asked, {}
        try:
            self._answers |= self._computed(asked)
        except BaseException as error:  # every run gets it
            self._answers |= dict.fromkeys(asked, error)
        self._changed.notify_all()

    def _computed(self, asked):
        placed, size = {}, 1
        for place, (model, samples, work, *rest) in asked.items():
            placed[place], size = self._rounds.placed(model, samples, self._padded(work), *rest)
        one = next(iter(placed.values()))
        given = [placed[place] if place in placed else _idle(one) for place in range(self._runs)]
        models, samples, *others = zip(*given, strict=True)
        arguments = models, samples[0], *others
        if self._program is None:
            self._program = self._compiled(arguments, size)
        results = self._program(*arguments)
        return {place: results[place] for place in asked}

    def _padded(self, work):
        """The assignments with room for the longest session of all runs."""
        missing = self._steps - work.batches.shape[1]
        return work._replace(batches=np.pad(work.batches, ((0, 0), (0, missing), (0, 0))))

    def _compiled(self, arguments, size):
        """The program, with the runs at once where clients are, and where it fits into the memory."""
        parts, training = self._parts, self._parts.training
        if size > 1:
            program = federated_devices.map_rounds(training, parts.devices, size, at_once=True)
            compiled = program.lower(*arguments).compile()
            placed = federated_devices.bytes_placed(arguments)
            free = tuning.budget_bytes(parts.execution, parts.devices, placed)
            if federated_devices.program_bytes(compiled) <= free:
                return compiled  # the jitted program would be compiled again
        return federated_devices.map_rounds(training, parts.devices, size, at_once=False)


def _idle(placed):
    """Arguments of a round in which nobody works, for a run that has ended."""
    model, samples, work, *rest = placed
    steps = jax.tree.map(jnp.zeros_like, work.steps)
    return jax.tree.map(jnp.copy, model), samples, work._replace(steps=steps), *rest


def _check_alike(all_parts: Sequence[Parts]) -> None:
    """BadInput for a part that one program cannot have twice."""
    first, *others = (
        fingerprints(parts, 0)
        | {"skip_diverged": str(parts.training.skip_diverged), "devices": str(parts.devices)}
        for parts in all_parts
    )
    for place, other in enumerate(others, 1):
        names = [name for name in first if name not in _MAY_DIFFER and first[name] != other[name]]
        if names:
            raise BadInput(
                f"runs: {' and '.join(names)} of run {place}: must be that of run 0; in one program these "
                f"may differ: {', '.join(sorted(_MAY_DIFFER))}"
            )
