import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sfl_jax
from sfl_jax.commands import flags, helping, study
from sfl_jax.commands import preset as presets
from sfl_jax.commands.config import Config, fields_of, validate
from sfl_jax.commands.program import program
from sfl_jax.errors import BadInput

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
BAD = [
    (["--batch_size=0"], "--batch_size=0: must be an integer, at least 1"),
    (["--batch_size=many"], "--batch_size=many: must be an integer, at least 1"),
    (["--batch_size="], "--batch_size=: must be an integer, at least 1"),
    (["--batch_size", "1.5"], "--batch_size=1.5: must be"),
    (["--batch_size"], "Missing value for flag --batch_size"),
    (["--server_flops=nan"], "--server_flops=nan: must be a finite number, above 0"),
    (["--server_flops=1e400"], "--server_flops=inf: must be a finite number, above 0"),
    (["--method=best"], "--method=best: must be one of exact, "),
    (["--bathc_size=3"], "Did you mean: batch_size"),
    (["stray"], "'stray' is not a flag; write each setting as --name=value, such as --model=cnn"),
    (["quick"], "such as --preset=quick"),
    (["mine.csv"], "such as --fleet=mine.csv"),
    (["--cut=2"], "--cut: is not a flag; --min_cut=2 --max_cut=2 gives every client the cut 2"),
    (["--model=resnet-18"], "vit-tiny, cnn, mlp; did you mean resnet18?"),
    (["--scheme=SFL"], "did you mean sfl?"),
    (["--scheme=splitfed"], "sl, fl; SplitFed V1 is sfl, V2 is sfl_v2"),
    (["--server_flops=10GFLOPS"], "must be a finite number, above 0, such as 2e10 or 20G"),
    (["--preset=Quick"], "did you mean quick?"),
    (["--preset=quick", "--preset=mnist"], "--preset=mnist: --preset=quick is given too; choose one"),
    (["--rounds=3", "--", "--rounds=4"], "'--rounds=4' is not a flag"),
    (["-"], "'-' is not a flag"),
    (["--flagfile"], "--flagfile"),
    (["--flagfile=/no/such/file"], "--flagfile=/no/such/file: cannot be read (No such file or directory)"),
    ([f"--flagfile={sys.executable}"], "--flagfile: must be a text file"),
    (["--output=x"], "output"),  # belongs to another command
    (["--lr=1"], "--lr: is not a flag; the name here is --learning_rate"),
    (["--num-rounds=3"], "--num-rounds: is not a flag; the name here is --rounds"),
    (["--codec=int2"], "--codec=int2: must be of float32, bfloat16, "),
    (["--codec=int8,float32"], "several with + between"),
    (["--resume"], "--resume: is not a flag; the same command goes on with its run"),
    (["--gpu=0"], "--gpu: is not a flag; the name here is --devices"),
    (["--epochs", "3"], "--epochs: is not a flag; the name here is --local_epochs, or --rounds"),
    (["--optimizer=adamw"], "must be one of sgd, adam; adam with --weight_decay is AdamW"),
    (["--server_flops=20X"], "--server_flops=20X: must be a finite number, above 0"),
    (["--server_flops=G"], "--server_flops=G: must be a finite number"),
    (["--learning_rate=2k"], "--learning_rate=2k: must be"),  # only FLOP/s are that large
    (["--preset=best"], "--preset=best: must be one of "),
    (["--preset"], "--preset=: must be one of "),
    (["--rounds=3", "--warmup_rounds=5"], "--warmup_rounds=5: must be at most --rounds=3"),
]


def run(argv, command="train", main=lambda config: None):
    return flags.run(main, command, "About.", argv)


@pytest.mark.parametrize(("argv", "words"), BAD)
def test_bad_input_is_one_line_and_2(argv, words, capsys):
    assert run(argv, main=lambda config: pytest.fail("ran")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_values_reach_main(tmp_path):
    seen = []
    flagfile = tmp_path / "x.flags"
    flagfile.write_text("# a comment\n\n--rounds=7\n--learning_rate=1\n--data_dir=a b\n")
    assert run([f"--flagfile={flagfile}", "--rounds=8", "--seed", "3"], main=seen.append) == 0
    assert seen == [Config(rounds=8, learning_rate=1.0, data_dir="a b", seed=3)]
    assert run(["--rounds=8", f"--flagfile={flagfile}"], main=seen.append) == 0
    assert seen[-1].rounds == 7


@pytest.mark.parametrize(
    ("argv", "plot"), [([], False), (["--plot"], True), (["--plot=1"], True), (["--noplot"], False)]
)
def test_switches(argv, plot):
    assert flags.parse(argv, "plan").plot is plot


def test_a_stray_line_in_a_flagfile_is_refused(tmp_path, capsys):
    flagfile = tmp_path / "x.flags"
    flagfile.write_text("  # a comment\n")
    assert run([f"--flagfile={flagfile}"]) == 2
    assert "'# a comment' is not a flag; a comment needs its own line, without" in capsys.readouterr().err
    flagfile.write_text("rounds=7\n")
    assert run([f"--flagfile={flagfile}"]) == 2
    assert "rounds=7" in capsys.readouterr().err


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3), (75, 75)])
def test_the_code_of_main_is_the_exit_code(returned, code):
    assert run([], main=lambda config: returned) == code


def test_what_main_raises(capsys):
    def refuse(config):
        raise BadInput("fleet.csv, line 3:\nno number")

    def interrupt(config):
        raise KeyboardInterrupt

    def fail(config):
        raise ValueError("a defect of ours")

    assert run([], main=refuse) == 2
    assert capsys.readouterr().err == "error: fleet.csv, line 3: no number\n"
    assert run([], main=interrupt) == 130
    with pytest.raises(ValueError, match="a defect"):
        run([], main=fail)


def helped(capsys, command, *argv):
    """The lines of a help text."""
    assert run([*argv], command, main=lambda config: pytest.fail("ran")) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out.splitlines()


def listed(lines):
    return [line[4:].partition("=")[0] for line in lines if re.match(r"  --\w+=", line)]


@pytest.mark.parametrize("command", ["train", "plan", "report"])
@pytest.mark.parametrize("columns", [50, 80, 300])
def test_full_help_names_every_flag_once_with_its_default(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = helped(capsys, command, "--rounds=bad", "--helpfull")
    assert listed(lines) == [field.name for field in fields_of(command)]
    assert lines[0] == "About."
    assert max(map(len, lines)) <= min(max(columns, 60), 100)
    assert columns < 300 or command == "report" or max(map(len, lines)) > 80
    headings = [line for line in lines[3:] if line and not line.startswith(" ")]
    assert len(headings) == len(set(headings))
    assert any(re.match(r"  --workdir=runs/demo +directory", line) for line in lines) or command == "plan"


@pytest.mark.parametrize("command", ["train", "plan", "compare", "report"])
def test_help_begins_with_examples_and_the_flags_of_a_first_hour(command, capsys):
    lines = helped(capsys, command, "--help")
    assert listed(lines) == list(helping.FIRST[command])
    assert len(listed(lines)) <= 10
    rest = len(helping._that_apply(command, False)) - len(listed(lines))
    more = f"--helpfull lists {rest} more; " if rest else ""
    assert lines[-1] == f"{more}--version prints the release"
    start = next(i for i, line in enumerate(lines) if line == "examples")
    end = next(i for i, line in enumerate(lines) if line == "flags")
    examples = [line.split(f".{command} ")[1] for line in lines[start:end] if f".{command} " in line]
    for example in examples:  # they are good, but for the fleet, which is the reader's
        values = [each for each in example.split() if not each.startswith(("--fleet", "--preset=quick"))]
        assert isinstance(flags.parse(values, command), Config)


def test_help_of_compare_shows_what_applies(capsys):
    training, plans = (
        listed(helped(capsys, "compare", "--helpfull", *more)) for more in ([], ["--plan_only"])
    )
    both = {field.name for field in fields_of("compare")}
    assert {"rounds", "dataset", "learning_rate"} <= set(training) - set(plans)
    assert {"num_classes", "samples_per_client"} <= set(plans) - set(training)
    assert set(training) | set(plans) == both
    assert {"workdir", "plan_only", "model"} <= set(training) & set(plans)
    lines = helped(capsys, "compare", "--help", "--plan_only")
    assert any(re.match(r"  --workdir=runs/methods +directory", line) for line in lines)


def test_plans_that_are_compared_stay_out_of_the_directory_of_a_training(tmp_path):
    def workdir(*arguments):
        return flags.parse(arguments, "compare").workdir

    assert workdir("--plan_only") == workdir("--plan_only", "--preset=quick") == "runs/methods"
    assert workdir("--preset=quick") == "runs/quick"
    assert workdir("--plan_only", "--workdir=runs/demo") == "runs/demo"
    (tmp_path / "x.flags").write_text("--workdir=mine\n")
    assert workdir(f"--flagfile={tmp_path}/x.flags", "--plan_only") == "mine"


def test_the_version_is_said(capsys):
    assert helped(capsys, "plan", "--version") == [f"sfl_jax {sfl_jax.__version__}"]


@pytest.mark.parametrize(
    ("started", "spec", "typed", "says"),
    [
        ("/x/bin/sfl-train", None, ["/x/bin/python", "/x/bin/sfl-train"], "sfl-report"),
        (
            "/w/launch/train.py",
            "launch.train",
            [".venv/bin/python", "-m"],
            ".venv/bin/python -m launch.report",
        ),
        ("/s/train.py", "sfl_jax.commands.train", ["python3", "-m"], "python3 -m sfl_jax.commands.report"),
        ("/s/pytest", "pytest.__main__", ["python3", "-m"], "python3 -m sfl_jax.commands.report"),
        ("", None, ["python"], "python -m sfl_jax.commands.report"),
    ],
)
def test_messages_name_a_command_that_exists_where_they_are_read(started, spec, typed, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(sys, "orig_argv", typed)
    main = types.SimpleNamespace(__spec__=spec and types.SimpleNamespace(name=spec))
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert program("report") == says


@pytest.mark.parametrize(
    ("text", "flops"), [("20G", 2e10), ("1.5T", 1.5e12), ("3k", 3e3), ("2e1 M", 2e7), ("5K", 5e3), ("7", 7.0)]
)
def test_flops_may_be_written_with_a_letter(text, flops):
    assert flags.parse([f"--server_flops={text}"], "plan").server_flops == pytest.approx(flops, rel=1e-12)


def test_flags_beside_a_preset_change_its_settings(capsys):
    preset = flags.parse(["--preset=mnist"], "train")
    assert preset.workdir == "runs/mnist"
    for argv in (["--rounds=7", "--preset=mnist"], ["--preset", "mnist", "--rounds=7"]):
        assert flags.parse(argv, "train") == dataclasses.replace(preset, rounds=7)
    assert flags.parse([f"--flagfile={LAUNCH}/flags/mnist.flags"], "train") == preset
    assert sorted(path.stem for path in LAUNCH.glob("flags/*")) == presets.names()
    for command in ("train", "compare"):
        assert flags.parse(["--preset=quick"], command).server_flops == 1e10
    capsys.readouterr()
    assert run(["--preset=mnist"], "plan") == 2  # whose flags are others
    assert capsys.readouterr().err == "error: --preset: is a flag of train, compare and study alone\n"


def test_a_warm_up_from_a_file_makes_way_for_fewer_rounds(tmp_path, capsys):
    """A user who wants a quick look types --rounds=3. Numbers that the user typed are never changed."""
    file = tmp_path / "x.flags"
    file.write_text("--rounds=40\n--warmup_rounds=6\n")
    for argv in ([f"--flagfile={file}", "--rounds=3"], ["--flagfile", str(file), "--rounds", "3"]):
        assert flags.parse(argv, "train").warmup_rounds == 3
        said = capsys.readouterr().err
        assert said == "--warmup_rounds=3, instead of 6: no more than --rounds=3\n"
    assert flags.parse([f"--flagfile={file}", "--rounds=6"], "train").warmup_rounds == 6
    assert capsys.readouterr().err == ""
    with pytest.raises(BadInput, match="--warmup_rounds=6: must be at most --rounds=3"):
        flags.parse([f"--flagfile={file}", "--rounds=3", "--warmup_rounds=6"], "train")
    file.write_text("--rounds=3\n--warmup_rounds=6\n")
    with pytest.raises(BadInput, match="--warmup_rounds=6: must be at most --rounds=3"):
        flags.parse([f"--flagfile={file}"], "train")
    assert run(["--preset=mnist", "--rounds=1"]) == 0  # as `make train ARGS=--rounds=1`


# A background job of a shell ignores Ctrl-C, and so do its children. So handle it again.
SCRIPT = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from sfl_jax.commands import flags; sys.exit(flags.run({main}, 'train', 'About.'))"
)


def python(main, *argv):
    command = [sys.executable, "-c", SCRIPT.format(main=main), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["--rounds=0"], 2), (["stray"], 2), ([], 0)])
def test_as_a_process_without_jax(argv, code):
    done = python("lambda c: print('jax' in sys.modules, 'numpy' in sys.modules)", *argv)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (code == 2)
    assert done.stdout == "False False\n" or argv


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_a_reader_that_has_gone(argv):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", SCRIPT.format(main="lambda c: print('x' * 9)"), *argv]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_letters_that_cannot_be_printed_are_spelt_out():
    command = [sys.executable, "-c", SCRIPT.format(main="lambda c: print('\\udcff é')")]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\udcff \\xe9\n", b"")


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    """Otherwise printed lines would end in that file."""
    main = "lambda c: [print('printed', flush=True), open(c.workdir, 'w').fileno()][1]"
    command = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", SCRIPT.format(main=main)]
    done = subprocess.run([*command, f"--workdir={tmp_path / 'file'}"], timeout=60, check=False)
    assert done.returncode > 2
    assert (tmp_path / "file").read_text() == ""


def test_pictures_need_no_window(monkeypatch):
    for backend in ("TkAgg", "nonsense", "module://matplotlib_inline.backend_inline"):
        seen = []
        monkeypatch.setenv("MPLBACKEND", backend)
        assert run([], main=lambda config, seen=seen: seen.append(os.environ["MPLBACKEND"])) == 0
        assert seen == [backend if backend.startswith("module:") else "agg"]
        assert os.environ["MPLBACKEND"] == backend


def test_ctrl_c_as_a_process():
    done = python(f"lambda c: __import__('os').kill(__import__('os').getpid(), {int(signal.SIGINT)})")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


NAMES = [field.name for field in fields_of("train")]
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["0", "-1", "1e999", "nan", "true", "", "1_000", "0x10", "١", "9" * 30, "a b", "\x00"]),
    st.integers().map(str),
    st.floats().map(str),
)
ARGUMENTS = st.lists(
    st.one_of(
        WORDS,
        st.builds("{}{}={}".format, st.sampled_from(["-", "--", "--no"]), st.sampled_from(NAMES), WORDS),
        st.builds("--{}".format, st.sampled_from(NAMES)),
    ),
    max_size=4,
)


@given(ARGUMENTS)
@hypothesis.settings(max_examples=300)
def test_whatever_is_given_is_a_config_or_refused(arguments):
    """There is no other exception, and no config that validation would refuse."""
    arguments = [a for a in arguments if "flagfile" not in a]
    try:
        config = flags.parse(arguments, "train")
    except BadInput:
        return
    validate(config, "train")
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_begins_with_what_it_is_its_command_its_time_and_its_accuracy(name):
    lines = (presets.DIRECTORY / f"{name}.flags").read_text().splitlines()
    assert presets.about(name) == lines[0].removeprefix("# ")
    assert len(presets.about(name)) <= 80
    marks = [rf"Command: .*\bsfl-train --preset={name}", r"Time: .*\d+ s", r"Accuracy: .*\d %.* rounds"]
    for mark in marks:
        assert any(re.match(f"# {mark}", line) for line in lines), mark
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("columns", [80, 300])
def test_help_of_a_study_fits_the_terminal_and_names_its_flags_and_the_presets(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert study.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= min(columns, 100)
    assert all(f"  {name}  " in said for name in presets.names())
    assert all(f"  {flag}" in said for flag in study.FLAGS)
    assert study.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sfl_jax {sfl_jax.__version__}\n"


def test_help_does_not_list_again_what_the_meaning_names(capsys):
    lines = "\n".join(helped(capsys, "train", "--helpfull"))
    assert "(sfl, sfl_v2" not in lines
    assert "(product, conv)" not in lines
    assert "(auto, product, conv)" in " ".join(lines.split())
    assert "at most 1,000,000" in lines
    assert "--server_flops=20G" in lines
