"""What README and docs show runs: every block of Python, every command line, every flag, every link."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest

from sfl_jax import registry
from sfl_jax.commands import flags, preset, study
from sfl_jax.commands.config import Config, fields_of
from sfl_jax.commands.fields import is_within
from sfl_jax.errors import BadInput

QUICK = {"docs/codecs.md", "docs/data.md"}  # the others train or trace for longer
OTHER_FLAGS = {"preset", "flagfile", "help", "helpfull", "version"}
OTHER_FLAGS |= {flag.removeprefix("--").partition("=")[0] for flag in study.FLAGS}
FOREIGN = ("--xla_", "--no-deps", "--file_format", "--jobs", "--json")  # of other programs


def marked(page):
    return pytest.param(
        page, marks=[] if pages.name(page) in QUICK else pytest.mark.slow, id=pages.name(page)
    )


WITH_PYTHON = [page for page in (*pages.PAGES, pages.NOTEBOOK) if pages.python_blocks(page)]


def run(page):
    """Runs the blocks of a page in order and returns their names.

    A line "print(…)  # text" must print this text.
    """
    names = {"__name__": "__main__"}
    for block in pages.python_blocks(page):
        said = re.findall(r"^print\(.*\) +# (.*)$", block, re.MULTILINE)
        printed = []
        names["print"] = lambda *given, printed=printed: printed.append(" ".join(map(str, given)))
        exec(compile(block, str(page), "exec"), names)
        assert [line for line in printed if line in said] == said, printed
    return names


@pytest.fixture
def in_a_directory(tmp_path, monkeypatch):
    """An empty directory to run in. What a page registers is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    for kind in vars(registry).values():
        if isinstance(kind, registry.Registry):
            monkeypatch.setattr(kind, "_members", dict(kind._members))
    return tmp_path


def weights_and_a_run():
    """Makes the files that docs/weights.md begins with: Keras weights, and a run in runs/demo."""
    from models import keras_models

    from sfl_jax.commands import train

    keras_models.make("b0", classes=1000).save_weights("b0.weights.h5")
    short = ["--preset=quick", "--rounds=1", "--image_size=8", "--cohort_size=2", "--devices=1"]
    assert train.main([*short, "--workdir=runs/demo"]) == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
@pytest.mark.parametrize("page", list(map(marked, WITH_PYTHON)))
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, in_a_directory):
    if pages.name(page) == "docs/weights.md":
        weights_and_a_run()
    names = run(page)
    if pages.name(page) == "docs/data.md":
        assert [len(split) for split in names["run"].parts.division] == [100] * 5


def test_a_page_that_says_something_else_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\n```\n\nText.\n\n```python\nprint(x + 1)   # 4\n```\n")
    with pytest.raises(AssertionError, match="3"):
        run(page)
    page.write_text(page.read_text().replace("# 4", "# 3"))
    assert run(page)["x"] == 2


def check_command(command, text):
    arguments = [each for each in shlex.split(text) if each != "..."]
    if not arguments or set(arguments) & {"--help", "--helpfull", "--version"}:
        return
    if command != "study":
        assert isinstance(flags.parse(arguments, command), Config)
        return
    varied, rest, workdir = study._split(arguments)[:3]
    for values in zip(*varied.values(), strict=False):
        flags.parse(study._case(dict(zip(varied, values, strict=True)), rest, workdir).flags, "train")


def test_every_command_line_is_one_that_is_taken(in_a_directory):
    found = [(pages.name(page), *each) for page in pages.PAGES for each in pages.commands(page)]
    assert len(found) > 25
    for page, command, text in found:
        for file in map(Path, re.findall(r"=([\w/.-]+\.(?:csv|json))", text)):  # the reader's
            file.parent.mkdir(exist_ok=True)
            shutil.copy(pages.ROOT / "sfl_jax" / "fleet" / "example.csv", file)
        try:
            check_command(command, text)
        except (BadInput, ValueError) as error:
            pytest.fail(f"{page}: {command}{text}: {error}")


def test_a_command_line_that_is_none_is_noticed(in_a_directory):
    for text in (" --roundz=3", " --method=best", " --fleet=nowhere.csv", " stray"):
        with pytest.raises(BadInput):
            check_command("train", text)
    with pytest.raises(BadInput):
        check_command("study", " --vary=schema=sfl")


def test_every_flag_in_the_text_exists_and_has_a_value_that_is_allowed():
    known = {
        field.name: field
        for command in ("train", "plan", "compare", "profile_device", "certify")
        for field in fields_of(command)
    }
    seen = set()
    for page in pages.PAGES:
        for span in pages.spans(page):
            if not span.startswith("--") or span.startswith(FOREIGN):
                continue
            for word in span.split(" "):
                name, has_value, value = word.removeprefix("--").partition("=")
                assert not word.startswith("--") or name in known or name in OTHER_FLAGS, f"{page}: {span}"
                if name in known and has_value and not value.isupper() and value not in ("", "n", "c"):
                    value = flags._Parser(known[name]).parse(value)
                    assert is_within(value, known[name].metadata), f"{page}: {span}"
                    seen.add(name)
    assert len(seen) > 30


def test_every_target_module_and_preset_in_the_text_exists():
    makefile = (pages.ROOT / "Makefile").read_text()
    for page in pages.PAGES:
        for snippet in pages.snippets(page):
            for target in re.findall(r"^make ([a-z-]+)", snippet):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: {snippet}"
            for module in re.findall(r"(?:BENCH=|-m benchmarks\.)(\w+)", snippet):
                assert (pages.ROOT / "benchmarks" / f"{module}.py").is_file(), f"{page}: {snippet}"
            for given in re.findall(r'^make (?:train|quick) ARGS="?([^"]*)"?', snippet):
                assert flags.parse(["--preset=mnist", *given.split()], "train")
            for name in re.findall(r"--preset=(\w+)", snippet):
                assert name == "NAME" or name in preset.names(), f"{page}: {snippet}"


def test_every_test_and_file_that_a_page_names_exists():
    for page in pages.PAGES:
        for span in pages.spans(page):
            path, _, test = span.partition("::")
            if re.fullmatch(r"(tests|benchmarks|sfl_jax|docs(?!/_build)|launch)/[\w./-]+", path):
                assert (pages.ROOT / path).exists(), f"{page}: {span}"
                assert f"def {test}" in (pages.ROOT / path).read_text() if test else True, f"{page}: {span}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_of_docs_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)", (pages.ROOT / name).read_text()):
        assert link.startswith("https://") or (pages.ROOT / link).exists(), link


def test_the_commands_for_contributors_are_those_of_ci():
    ci = pages.ROOT / ".ci" / "run"
    if not ci.is_file():
        pytest.skip("an sdist has no .ci")
    for line in re.findall(r"^make .*$", ci.read_text(), re.MULTILINE):
        assert line in [snippet.strip() for snippet in pages.snippets(pages.ROOT / "CONTRIBUTING.md")]


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "docs", tmp_path / "html"]
    built = subprocess.run(command, cwd=pages.ROOT, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    assert "proven lower bound" in (tmp_path / "html" / "api" / "optim.html").read_text()
