"""Pages in a real browser, where there is one: nothing is cut off, nothing overlaps, values can be found."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands.histories import told

from sfl_jax.commands import report_page
from sfl_jax.commands.config import Config
from sfl_jax.run.clocks import Clock
from sfl_jax.run.ledger import columns
from sfl_jax.run.metrics import Round

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROUNDS = 30
# The page is in a frame, because a browser without a screen may have no window as narrow as a phone.
FRAME = (
    '<!doctype html><iframe style="width: {}px; height: 900px; border: 0" srcdoc="{}"></iframe>'
    "<script>{}</script>"
)
LOOK = Path(__file__).with_name("look.js")


@pytest.fixture(scope="module")
def report():
    """The page of a made-up run with every picture."""
    wall = {"train_wall_s": 1.0, "test_wall_s": 0.5, "compile_wall_s": 20.0}
    sent = dict.fromkeys(columns([]), 1000)
    lines = [
        Round(n, 2 / n, 2 / n, 1 - 1 / n, 2.0, 1.9, 2.0 * n, 30 + 2.0 * n, 9.0, 4, 3.5,
              1 - 1 / n, 1 - 1.5 / n, **wall, **sent)
        for n in range(2, ROUNDS + 2)
    ]  # fmt: skip
    lines = [line._replace(round=n) for n, line in enumerate(lines, 1)]
    seconds, fields = np.arange(1.0, ROUNDS + 1), columns(lines)
    clocks = {
        name: Clock(f * seconds, fields) for name, f in {"exact": 2, "no_split": 50, "common_cut": 3}.items()
    }
    packages = {"packages": {"jax": "1.2.3"}, "devices": ["cpu:0 cpu"], "git_commit": "0" * 40}
    return report_page.report(Config(clients=40), packages, lines, clocks, told(ROUNDS, 40, 24))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_report_can_be_read_in_a_browser(report, width, scheme, tmp_path):
    (tmp_path / "frame.html").write_text(FRAME.format(width, html.escape(report), LOOK.read_text()))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,1000", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        "--enable-logging=stderr", "--dump-dom", (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))
    assert found["bad"] == []
    assert found["width"] <= width
    assert found["dark"] == (scheme == "dark")
    assert len(found["tips"]) == 10
    assert all(found["tips"])
