import os
import signal
import subprocess
import sys

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl_jax.commands import flags
from sfl_jax.config import Config, fields_of, validate
from sfl_jax.errors import BadInput

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
    (["stray"], "'stray' is no flag"),
    (["--rounds=3", "--", "--rounds=4"], "'--rounds=4' is no flag"),
    (["-"], "'-' is no flag"),
    (["--flagfile"], "--flagfile"),
    (["--flagfile=/no/such/file"], "/no/such/file"),
    ([f"--flagfile={sys.executable}"], "--flagfile: must be a text file"),
    (["--output=x"], "output"),  # belongs to another command
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


@pytest.mark.parametrize("command", ["train", "plan", "compare", "report"])
def test_help_names_every_flag_once_with_its_default(command, capsys):
    assert run(["--rounds=bad", "--help"], command, main=lambda config: pytest.fail("ran")) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for field in fields_of(command):
        assert sum(line.startswith(f"  --{field.name}=") for line in lines) == 1, field.name
    assert text.startswith("About.")
    assert max(map(len, lines)) <= flags.WIDTH
    headings = [line for line in lines[3:] if line and not line.startswith(" ")]
    assert len(headings) == len(set(headings))


# A job in the background of a shell is deaf to Ctrl-C, and so are its children: hear it again.
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


def test_a_reader_that_has_gone():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", SCRIPT.format(main="lambda c: print('x' * 9)")]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


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
    """No other exception, and nothing that validation would not accept."""
    arguments = [a for a in arguments if "flagfile" not in a]
    try:
        config = flags.parse(arguments, "train")
    except BadInput:
        return
    validate(config, "train")
    assert Config.from_dict(config.to_dict()) == config
