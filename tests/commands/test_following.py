"""The line that shows how far another process has come."""

import io

from sfl_jax.commands.following import Following, newest_line


class Stream(io.StringIO):
    """A stream that may be a terminal."""

    def __init__(self, is_terminal=False):
        super().__init__()
        self.isatty = lambda: is_terminal


def test_the_newest_whole_line_is_found_in_a_long_log(tmp_path):
    log = tmp_path / "log"
    for text, line in (
        (b"", ""), (b"half", ""), (b"one\ntwo", "one"), (b"one\n  two\n \n\n", "two"),
        (b"x" * 9000 + b"\nend\n", "end"), (b"\xff\n", "\ufffd"),
    ):  # fmt: skip
        log.write_bytes(text)
        assert newest_line(log) == line


def test_elsewhere_than_on_a_terminal_new_lines_are_shown_every_ten_seconds(tmp_path):
    log, stream, now = tmp_path / "log", Stream(), [0.0]
    log.write_text("round 1\n")
    following = Following(log, stream, lambda: now[0])
    for second, text in ((5, "round 2\n"), (10, "round 3\n"), (15, "round 4\n"), (20, ""), (30, "")):
        now[0] = second
        with log.open("a") as file:
            file.write(text)
        following.look()
    following.clear()
    assert stream.getvalue() == "  round 3\n  round 4\n"


def test_on_a_terminal_one_line_is_written_over(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    log, stream, now = tmp_path / "log", Stream(is_terminal=True), [0.0]
    following = Following(log, stream, lambda: now[0])
    for text in ("round 1", "round 2, and more than fits"):
        log.write_text(f"{text}\n")
        now[0] += 1
        following.look()
    following.clear()
    following.clear()
    assert stream.getvalue() == "  round 1\r\033[K  round 2, and more\r\033[K"
