"""The pages of the documentation: their blocks of Python, their commands and their flags."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
# The log says what was done on some day, with the flags of that day.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *ROOT.glob("docs/api/*.md"),
]
COMMAND = re.compile(
    r"(?:^|\s)(?:\S*python3? -m launch\.|sfl-)(train|plan|compare|report|study|profile[_-]device)(?=\s|$)(.*)"
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[str]:
    """The blocks of a page, or the cells of a notebook, that are Python."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def snippets(page: Path) -> list[str]:
    """What a reader may type: indented lines, and code within the text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (.+)$", text, re.MULTILINE)
    return [re.sub(r"\s+# .*", "", line) for line in indented] + spans(page)


def spans(page: Path) -> list[str]:
    """Code within the text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^    .+$", "", text, flags=re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> list[tuple[str, str]]:
    """(command, its arguments) of each command line of the page."""
    found = (COMMAND.search(snippet) for snippet in snippets(page))
    return [(match[1].replace("-", "_"), match[2]) for match in found if match]
