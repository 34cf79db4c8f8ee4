"""How Sphinx builds these pages: make docs"""

import importlib
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the API reference is made from this tree

project = "sfl_jax"
author = "The sfl_jax authors"
copyright = author
release = re.findall(r'__version__ = "(.*)"', (ROOT / "sfl_jax" / "__init__.py").read_text())[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

# Shapes such as Float[Array, "K C"] are strings, not names.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_use_rtype = False
default_role = "code"
napoleon_custom_sections = [("Names", "params_style")]
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"sfl_jax {release}"


FIELDS = {}  # the docstring of each attribute, which napoleon would divide at its first colon


def setup(app):
    """Connects what prepares signatures and docstrings. napoleon has priority 500."""
    app.connect("autodoc-process-docstring", prepared, priority=400)
    app.connect("autodoc-process-docstring", restored, priority=600)
    app.connect("autodoc-process-signature", shortened)


def shortened(app, what, name, thing, options, signature, returned):
    """Writes ndarray[float64] for ndarray[tuple[Any, ...], dtype[float64]]."""
    long = r"ndarray\[tuple\[~?(?:typing\.)?Any, \.\.\.\], ~?(?:numpy\.)?dtype\[(.*?)\]\]"
    return tuple(text and re.sub(long, r"ndarray[\1]", text) for text in (signature, returned))


def restored(app, what, name, thing, options, lines) -> None:
    """Undoes what napoleon did to an attribute."""
    if name in FIELDS:
        lines[:] = FIELDS[name]


def prepared(app, what, name, thing, options, lines) -> None:
    """Makes reStructuredText of a docstring: arguments get their section, fields their comment."""
    if lines and lines[0].startswith("Alias for field number"):
        lines[:] = [_comment(name)]
    taken = set(_parameters(thing)) if callable(thing) else set()
    ready = []
    for block in "\n".join(lines).split("\n\n"):
        rows = block.splitlines()
        if rows and _names(rows[0]) and _names(rows[0]) <= taken:
            rows = ["Args:", *(f"    {row}" if _names(row) & taken else f"        {row}" for row in rows)]
        if rows and rows[0].startswith("    ") and what == "class" and "Args:" not in ready:
            ready += ["::", ""]  # a block of code
        ready += [*rows, ""]
    lines[:] = [re.sub(r"\|(?=\w)", r"\\|", row) for row in ready]
    if what in ("attribute", "property"):
        FIELDS[name] = list(lines)


def _names(row: str) -> set[str]:
    """The names before the colon of "name, name: text"."""
    found = re.match(r"(\w+(?:, \w+)*): ", row)
    return set(found[1].split(", ")) if found else set()


def _parameters(thing):
    try:
        return inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return ()


def _comment(name: str) -> str:
    """The comment behind a field of a NamedTuple, or nothing."""
    module, kind, field = name.rsplit(".", 2)
    source = inspect.getsource(getattr(importlib.import_module(module), kind))
    found = re.search(rf"^    {field}: .*?  # (.*)$", source, re.MULTILINE)
    return found[1] if found else ""
