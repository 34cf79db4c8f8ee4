"""The package as users install it: built, installed elsewhere, and run from another directory."""

import os
import subprocess
import sys
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


@pytest.mark.slow
def test_an_installed_package_has_its_commands_presets_and_data(run, tmp_path):
    where = "import sfl_jax; from sfl_jax.commands import preset; print(sfl_jax.__file__, *preset.names())"
    place, *names = run(sys.executable, "-c", where).stdout.split()
    assert not Path(place).is_relative_to(ROOT)
    assert names == preset.names()
    for name in ("train", "plan", "compare", "report"):
        done = run(f"sfl-{name}", "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"usage: sfl-{name} " in done.stdout
        assert "launch." not in done.stdout
    module = run(sys.executable, "-m", "sfl_jax.commands.report", "--help").stdout
    assert f"usage: {sys.executable} -m sfl_jax.commands.report " in " ".join(module.split())
    small = ["--preset=quick", "--rounds=1", "--image_size=8", "--cohort_size=2", "--workdir=run"]
    done = run("sfl-train", *small)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    (tmp_path / "run" / "report.html").unlink()
    done = run("sfl-report", "--workdir=run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    done = run("sfl-report", "--workdir=nowhere")
    assert done.returncode == 2
    assert "--workdir=nowhere: has no run" in done.stderr
