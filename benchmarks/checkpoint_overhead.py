"""The cost of a checkpoint in a run: python -m benchmarks.checkpoint_overhead --rounds=8 -- FLAGS OF TRAIN

The run saves after every second round and writes the checkpoint during the next one. Rounds after a save are
compared with the others, in seconds and in CPU seconds of the process.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sfl_jax.commands import flags, parts
from sfl_jax.commands.config import settings
from sfl_jax.run import Run, metrics, recording
from sfl_jax.run.checkpoints import Checkpoints


class Timed(recording.Recorder):
    """Saves after even rounds. rows: (round, its seconds, its CPU seconds, seconds of the saving call)."""

    def start(self):
        self.rows, self.last = [], (time.perf_counter(), time.process_time())

    def is_due(self, round):
        return round % 2 == 0

    def add(self, state, line):
        now = time.perf_counter(), time.process_time()
        begin = time.perf_counter()
        super().add(state, line)
        took_s, cpu_s = (b - a for a, b in zip(self.last, now, strict=True))
        self.rows.append((line.round, took_s, cpu_s, time.perf_counter() - begin))
        self.last = now


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=8)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:split])
    with tempfile.TemporaryDirectory() as workdir:
        given = [*sys.argv[split + 1 :], f"--rounds={options.rounds}", "--eval_every=1000000"]
        config = flags.parse([*given, f"--workdir={workdir}"], "train")
        run = Run.of(parts.build(config).parts)
        run.compile()
        clock, compiling = metrics.Stopwatch(), metrics.CompileClock()
        checkpoints = Checkpoints(Path(workdir) / "checkpoints", 2)
        given = workdir, recording.Saving(), settings(config, "train"), checkpoints, None, clock, compiling
        with contextlib.closing(Timed(*given)) as recorder:
            recorder.begin(run.state, {}, {}, {})
            recorder.start()
            for line in run.rounds(options.rounds, clock, recorder.is_due):
                recorder.add(run.state, line)
    # The first round may still compile, and the last one evaluates.
    rows = recorder.rows[1:-1]
    for number, took_s, cpu_s, saving_s in rows:
        print(f"round {number}: {took_s:.3f} s, {cpu_s:.3f} CPU s, recorded in {1e3 * saving_s:.1f} ms")
    for name, column in (("seconds", 1), ("CPU seconds", 2)):
        after, others = (
            statistics.median(row[column] for row in rows if row[0] % 2 == odd) for odd in (1, 0)
        )
        print(f"{name}: {after:.3f} after a save, {others:.3f} else: {100 * (after / others - 1):+.2f} %")


if __name__ == "__main__":
    main()
