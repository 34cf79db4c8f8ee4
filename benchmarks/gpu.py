"""All that a GPU is to reach, in one run of about ten minutes: python -m benchmarks.gpu

Prints a line for each figure: what was measured, and what is wanted. --json saves them.
- Local training of B0 (32x32, batch 32): microseconds for each sample of a client, and PyTorch's time over
  ours, in its best arrangement (CUDA graphs on streams).
- The preset `mnist`, started twice with an empty cache of its own: seconds until the first round is under
  way, the steady rate, the accuracy, and whether both starts gave the same numbers.
Needs the extras `benchmark` and `cuda`. `--rounds` and `--clients` make it smaller, to try it on a CPU.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

UNDER_WAY = "computing round 1 "


def of_training(clients, options):
    """The row of `benchmarks.training_speed` for so many clients."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "rows.json")
        command = [
            sys.executable,
            "-m",
            "benchmarks.training_speed",
            f"--clients={clients}",
            f"--json={path}",
        ]
        subprocess.run([*command, f"--pairs={options.pairs}"], check=True)
        return json.loads(path.read_text())[0]


def of_start(workdir, cache, options):
    """(seconds until round 1 is under way, rounds of metrics.jsonl) of one start of the preset."""
    command = [sys.executable, "-u", "-m", "launch.train", "--preset=mnist", "--layer_form=auto"]
    command += [f"--rounds={options.rounds}", f"--workdir={workdir}"]
    begun, under_way = time.monotonic(), None
    child = subprocess.Popen(
        command, env=os.environ | {"XDG_CACHE_HOME": str(cache)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    for line in child.stdout:
        print("   ", line, end="", flush=True)
        if under_way is None and line.startswith(UNDER_WAY):
            under_way = time.monotonic() - begun
    if child.wait():
        raise SystemExit(f"the preset ended with exit code {child.returncode}")
    lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
    return under_way, [json.loads(line) for line in lines]


def figures(options):
    """(what, measured, wanted), one by one."""
    for clients, most in zip(map(int, options.clients.split(",")), (6, 4), strict=False):
        row = of_training(clients, options)
        yield (
            f"us a client-sample, {clients} clients",
            1e3 * row["round_ms"] / clients / row["batch"],
            f"<= {most}",
        )
        best = min(value for name, value in row.items() if name.endswith("_ratio"))
        yield f"best PyTorch over ours, {clients} clients", best, ">= 8"
    with tempfile.TemporaryDirectory() as directory:
        cache = pathlib.Path(directory, "cache")
        first_s, lines = of_start(pathlib.Path(directory, "first"), cache, options)
        second_s, again = of_start(pathlib.Path(directory, "second"), cache, options)
    steady = lines[len(lines) // 2 :]
    yield "s until round 1, first start", first_s, "<= 60"
    yield "s until round 1, second start", second_s, "<= 6"
    yield (
        "client-samples/s, steady",
        statistics.median(line["client_samples_per_s"] for line in steady),
        ">= 100000",
    )
    yield "test accuracy", lines[-1]["test_accuracy"], ">= 0.99"
    same = all(a["train_loss"] == b["train_loss"] for a, b in zip(lines, again, strict=True))
    yield "both starts gave the same losses", same, "True"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="16,64", help="of local training")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=46, help="of the preset")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    rows = []
    for what, measured, wanted in figures(options):
        print(f"{what:<40} {measured!s:>12.12}  wanted {wanted}", flush=True)
        rows.append({"what": what, "measured": measured, "wanted": wanted})
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
