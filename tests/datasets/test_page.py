"""Every block of the page on data runs unchanged, in order, and prints what the page says."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_code_of_the_page_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    names, printed = {}, []
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        said = re.findall(r"^print\(.*\) +# (.*)$", block, re.MULTILINE)
        assert printed[: len(said)] == said
    assert not printed  # by the last block
    assert [len(split) for split in names["run"].parts.division] == [100] * 5
