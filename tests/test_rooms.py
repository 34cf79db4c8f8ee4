"""The rooms of the package: imports run downwards, and only the commands know settings."""

import ast
from pathlib import Path

import sfl_jax

PACKAGE = Path(sfl_jax.__file__).parent
FLOORS = (  # a room imports only from the floors listed before its own
    {"errors", "digests"},
    {"registry", "files", "paths", "plan_rules"},
    {"optim", "models", "datasets", "fleet", "codecs"},
    {"federated"},
    {"schemes"},
    {"planning"},
    {"run"},
    {"commands"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(path):
    """The rooms that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "sfl_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sfl_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sfl_jax."))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_run_downwards():
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert {room_of(path) for path in files} == FLOOR.keys()
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {room}"
        for path in files
        for room in imported(path)
        if room != "__version__" and room != room_of(path) and FLOOR[room] >= FLOOR[room_of(path)]
    ]
    assert upwards == []
