"""The package as users install it: built, installed elsewhere, and run from another directory."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import compiling
import pytest

from sfl_jax.commands import preset

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(directory of the scripts, their environment) of an installed wheel, built from the sdist."""
    place = tmp_path_factory.mktemp("wheel")
    pack = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", place]
    subprocess.run(pack, check=True, cwd=ROOT, capture_output=True)
    [sdist] = place.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        shipped = {name.partition("/")[2] for name in packed.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "docs/tutorial.md", "docs/conf.py"} <= shipped
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", place, sdist]
    subprocess.run([*PIP, *build], check=True, cwd=place)
    [wheel] = place.glob("*.whl")
    site = place / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return site / "bin", plain | {
        "PYTHONPATH": str(site),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiling.FAST_FLAGS,
    }


@pytest.fixture
def run(installed, tmp_path):
    """run(program, argument, ...) -> the ended process, run in a separate directory."""
    scripts, environment = installed

    def run(*command):
        program, *arguments = command
        whole = [program if program == sys.executable else scripts / program, *arguments]
        return subprocess.run(
            whole, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return run


COMMANDS = ("train", "plan", "compare", "report", "study", "profile-device", "certify")
DIRECTORY = "study/seed=0"  # where a study expects this run, so that one training serves all commands
SMALL = ["--preset=quick", "--model=mlp", "--image_size=28", "--rounds=1", "--cohort_size=2", "--seed=0"]


@pytest.mark.slow
def test_an_installed_package_has_its_commands_presets_types_and_data(run, tmp_path):
    where = "import sfl_jax; from sfl_jax.commands import preset; print(sfl_jax.__file__, *preset.names())"
    place, *names = run(sys.executable, "-c", where).stdout.split()
    assert not Path(place).is_relative_to(ROOT)
    assert names == preset.names()
    assert Path(place).with_name("py.typed").is_file()
    for name in COMMANDS:
        done = run(f"sfl-{name}", "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"usage: sfl-{name} " in done.stdout
        assert "launch." not in done.stdout
    module = run(sys.executable, "-m", "sfl_jax.commands.report", "--help").stdout
    assert f"usage: {sys.executable} -m sfl_jax.commands.report " in " ".join(module.split())


@pytest.mark.slow
def test_an_installed_package_trains_compares_reports_studies_and_plans(run, tmp_path):
    def succeeds(*command):
        done = run(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    trained = tmp_path / DIRECTORY
    assert "test accuracy" in succeeds("sfl-train", *SMALL, f"--workdir={DIRECTORY}")
    assert (trained / "report.html").is_file()
    (trained / "report.html").unlink()
    succeeds("sfl-report", f"--workdir={DIRECTORY}")
    assert (trained / "report.html").is_file()
    succeeds("sfl-compare", *SMALL, f"--workdir={DIRECTORY}")
    assert (trained / "clocks.csv").is_file()
    succeeds("sfl-study", *SMALL, "--vary=seed=0", "--workdir=study")
    assert (tmp_path / "study" / "study.json").is_file()
    network = ["--model=mlp", "--image_size=28", "--clients=3", "--cohort_size=2"]
    assert "proven" in succeeds("sfl-plan", *network, "--output=plan.json")
    assert (tmp_path / "plan.json").is_file()
    done = run("sfl-report", "--workdir=nowhere")
    assert done.returncode == 2
    assert "--workdir=nowhere: has no run" in done.stderr
