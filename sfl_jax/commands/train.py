"""Split federated training: every round plans cuts and shares, trains a cohort, and keeps its simulated
time.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sfl_jax import __version__
from sfl_jax.commands import flags
from sfl_jax.config import Config, fields_of
from sfl_jax.files import ensure_writable, whole_file

DIVERGED = 3
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "tensorflow-datasets")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return flags.run(train, "train", str(__doc__), argv)


def train(config: Config) -> int:
    """Train, write config.json and metrics.jsonl into the workdir, and end with a table.

    Those of an earlier run in the same place stay, as previous-config.json and previous-metrics.jsonl. Of
    several processes the first alone writes.
    """
    workdir = Path(config.workdir)
    ensure_writable(workdir, "workdir", config.workdir)
    from sfl_jax.federated import processes

    processes.join(config)
    with processes.together():
        return _train(config, workdir, processes.is_first())


def _train(config, workdir, is_first):
    from sfl_jax import experiment, metrics

    compiling, wall = metrics.CompileClock(), metrics.Stopwatch()
    built = experiment.build(config)
    if is_first:
        _begin_files(workdir, settings(config) | {"environment": environment(built)})
    log = metrics.Log(workdir / "metrics.jsonl" if is_first else Path(os.devnull))
    start = state = experiment.start(built)
    last = None
    try:
        for state, last in _with_progress(experiment.run(built, start), config.rounds):  # noqa: B007
            log.write(last)
    except experiment.Diverged as error:
        print(f"error: {error}; try a lower --learning_rate or more --warmup_rounds", file=sys.stderr)
        return DIVERGED
    finally:
        log.close()
    print(summary(config, state.simulated_s, last, wall.seconds, compiling.seconds))
    return 0


def _begin_files(workdir, written):
    for name in ("config.json", "metrics.jsonl"):
        if (workdir / name).exists():
            (workdir / name).replace(workdir / f"previous-{name}")
    with whole_file(workdir / "config.json") as file:
        file.write(json.dumps(written, indent=2).encode())


def settings(config: Config) -> dict[str, Any]:
    """The flags of a training run, by name."""
    return {field.name: getattr(config, field.name) for field in fields_of("train")}


def environment(built: Any) -> dict[str, Any]:
    """What the numbers of a run may depend on besides its settings."""
    return {
        "python": platform.python_version(),
        "packages": {"sfl_jax": __version__} | {name: version(name) for name in PACKAGES},
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in built.devices],
        "input_scaling": built.scaling._asdict(),
        "git_commit": _git_commit(),
    }


def summary(config: Config, simulated_s: dict[str, float], last: Any, wall_s: float, compile_s: float) -> str:
    """The closing table: accuracy, every scheme's simulated time against this plan's, and this machine's."""
    cohort = f"{last.clients} of {config.clients} clients"
    lines = [f"{config.model} on {config.dataset}, {last.round} rounds of {cohort}"]
    lines.append(f"  {'test accuracy':<34}{100 * last.test_accuracy:>9.2f} %")
    own_s = simulated_s[config.method]
    for name, seconds in simulated_s.items():
        label = f"simulated time, {name}" + (" (this plan)" if name == config.method else "")
        text = "not possible" if seconds == float("inf") else f"{seconds:>9.1f} s"
        lines.append(f"  {label:<34}{text}" + (f"   {seconds / own_s:.2f}x" if name != config.method else ""))
    lines.append(f"  {'wall time':<34}{wall_s:>9.1f} s   of which compiling {compile_s:.1f} s")
    lines.append("  simulated times: FLOP = 2 x multiply-accumulates, backward work counted from the trace")
    return "\n".join(lines)


def _with_progress(rounds, total):
    """The rounds with a bar on a terminal, or with a line for each evaluation elsewhere."""
    from tqdm import tqdm

    bar = tqdm(total=total, unit="round", disable=None, dynamic_ncols=True)
    for state, last in rounds:
        bar.update(last.round - bar.n)
        if last.test_accuracy is not None:
            note = f"loss {last.train_loss:.3f}, test accuracy {100 * last.test_accuracy:.2f} %"
            bar.set_postfix_str(note)
            if bar.disable:
                print(f"round {last.round}/{total}: {note}, {last.wall_s:.0f} s", flush=True)
        yield state, last
    bar.close()


def _git_commit():
    where = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None
