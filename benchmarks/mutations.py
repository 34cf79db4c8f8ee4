"""Counts the deliberate faults that the tests notice: python -m benchmarks.mutations [--jobs=2] [NAME ...]

benchmarks/mutations/*.toml list changes of one place each, like mistakes of a colleague. NAME is the stem of
such a file or a part of a source file's name; without it all are tried. Each change is made in a copy of the
tree. There the tests that should notice it run first. If they pass, all tests of `make test` run. A fault
that no test notices is a gap in the tests.
"""

import argparse
import contextlib
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "benchmarks" / "mutations"
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__", "runs"
)
PYTEST = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider")
ALL = ("-n", "2", "--dist", "worksteal")
HINTED_S, ALL_S = 600, 1800  # longer runs count as hanging, which is noticed too
PASSED, UNKNOWN, NOTHING = 0, 4, 5  # exit codes of pytest; unknown: it cannot find the tests to run


class Mutation(NamedTuple):
    """A change of one place. old: text that occurs exactly once in the file. tests: arguments of pytest."""

    list: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def line(self) -> int:
        """The line where the old text begins, from 1; 0 if the text does not occur exactly once."""
        text = (ROOT / self.file).read_text() if (ROOT / self.file).is_file() else ""
        return text[: text.index(self.old)].count("\n") + 1 if text.count(self.old) == 1 else 0

    def __str__(self) -> str:
        return f"{self.list:<10} {self.file}:{self.line}  {_short(self.old)}  ->  {_short(self.new)}"


def mutations(names: Sequence[str]) -> list[Mutation]:
    """The mutations of all lists, or of the named lists and source files."""
    read = [
        Mutation(path.stem, entry["file"], entry["old"], entry["new"], entry.get("tests", ""))
        for path in sorted(LISTS.glob("*.toml"))
        for entry in tomllib.loads(path.read_text())["mutation"]
    ]
    return [each for each in read if not names or each.list in names or any(n in each.file for n in names)]


def judge(mutation: Mutation, tree: Path, hinted_only: bool) -> str:
    """Tries a fault in this copy of the tree and returns the verdict. Restores the copy."""
    if not mutation.line:
        return "stale"
    path = tree / mutation.file
    whole = path.read_text()
    path.write_text(whole.replace(mutation.old, mutation.new))
    try:
        if mutation.tests:
            code = _run(shlex.split(mutation.tests), tree, HINTED_S)
            if code == UNKNOWN:
                return "no test"
            if code not in (PASSED, NOTHING):
                return "noticed"
        if hinted_only:
            return "passed"
        return "noticed late" if _run(ALL, tree, ALL_S) != PASSED else "SURVIVED"
    finally:
        path.write_text(whole)


def _run(arguments: Sequence[str], tree: Path, limit_s: float) -> int:
    """Pytest's exit code. Imports the package of the tree, not an installed one."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [*PYTEST, *arguments], cwd=tree, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return -9
    finally:
        with contextlib.suppress(ProcessLookupError):  # ends processes that pytest started
            os.killpg(process.pid, 9)
        process.wait()


def _fail_anyway(chosen: Sequence[Mutation], tree: Path) -> bool:
    """Whether hinted tests fail without any fault; then their failures prove nothing."""
    words = {word for each in chosen if each.line for word in shlex.split(each.tests)}
    files = sorted(word for word in words if ".py" in word)
    return bool(files) and _run((*files, *ALL), tree, ALL_S) not in (PASSED, NOTHING)


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 60 else f"{words[:57]}..."


def main() -> int:
    """Prints a line for each mutation and the fraction noticed. Returns 1 if one survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--hinted_only", action="store_true", help="do not run all tests afterwards")
    parser.add_argument("--list", action="store_true", help="run nothing: list them, stale ones first")
    given = parser.parse_args()
    chosen = mutations(given.names)
    if given.list:
        for each in sorted(chosen, key=lambda each: each.line > 0):
            print("     " if each.line else "stale", each)
        return 0
    counts: dict[str, int] = {}
    trees: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(given.jobs) as pool:
        for job in range(given.jobs):
            trees.put(Path(shutil.copytree(ROOT, Path(place) / str(job), ignore=NOT_COPIED)))
        if _fail_anyway(chosen, trees.queue[0]):
            print("without any fault some hinted tests fail or do not exist", file=sys.stderr)
            return 2

        def in_a_tree(mutation):
            tree = trees.get()
            try:
                return judge(mutation, tree, given.hinted_only)
            finally:
                trees.put(tree)

        for mutation, verdict in zip(chosen, pool.map(in_a_tree, chosen), strict=True):
            counts[verdict] = counts.get(verdict, 0) + 1
            print(f"{verdict:<12} {mutation}", flush=True)
    noticed = counts.get("noticed", 0) + counts.get("noticed late", 0)
    tried = noticed + counts.get("SURVIVED", 0) + counts.get("passed", 0)
    print(", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items())))
    print(f"{noticed} of {tried} faults noticed ({100 * noticed / max(tried, 1):.0f} %)")
    return int(noticed < tried)


if __name__ == "__main__":
    sys.exit(main())
