"""Files that are whole or absent: refused early where they cannot be written, put in place in one step."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sfl_jax.errors import BadInput


def ensure_writable(directory: str | os.PathLike[str], flag: str, value: str) -> None:
    """Make `directory` and try a file in it; BadInput, naming --flag=value, where that fails."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"--{flag}={value}: cannot be written ({reason}); choose another place") from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to fill, which takes its name when the block ends well and leaves nothing when it does not."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
