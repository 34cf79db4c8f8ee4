"""Files that are whole or absent, and directories that are fit to write to, by one process at a time."""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sfl_jax.errors import BadInput

PNG_METADATA = {"Software": "sfl_jax"}
PNG_MARK = b"Software\0sfl_jax"

_OWN_LOCK = re.compile(rb"(?:sfl_jax (\d+)\n)?")  # a number alone may be another program's

_unfinished: set[Path] = set()  # what this process removes when it ends well


class NotWritten(Exception):
    """What the disk refused of a run that is under way."""


def ensure_writable(directory: str | os.PathLike[str], flag: str, value: str) -> None:
    """Make `directory` and try a file in it; BadInput, naming flag=value, where that fails."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{flag}={value}: cannot be written ({reason}); choose another place") from error


def ensure_ours(path: str | os.PathLike[str], mark: bytes, flag: str, value: str) -> None:
    """BadInput, naming flag=value, where a file is there that lacks `mark`, which is near the beginning of
    every one of this name that this package writes. An empty one is nobody's.
    """
    with (
        contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError),
        open(path, "rb") as file,
    ):
        head = file.read(2**16)
        if head and mark not in head:
            raise _not_ours(flag, value, path)


def _not_ours(flag, value, path):
    return BadInput(
        f"{flag}={value}: {path} is not of sfl_jax and would be replaced; move it, or choose another place"
    )


def ensure_room(directory: str | os.PathLike[str], flag: str, value: str, needed_bytes: int) -> None:
    """BadInput, naming flag=value, where the disk of `directory` has less room than that."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise BadInput(
            f"{flag}={value}: {free_bytes / 1e6:.1f} MB free, {needed_bytes / 1e6:.1f} MB needed; "
            "make room, or choose another place"
        )


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str], flag: str, value: str) -> Iterator[None]:
    """Hold the lock of `directory`; BadInput where another process does.

    The lock ends with its process, however that ends: a .lock file left behind locks nothing. One of another
    program is locked and keeps what is in it.
    """
    path = Path(directory, ".lock")
    with contextlib.ExitStack() as stack:
        try:
            # Without a buffer, which would be written, and fail, once more when the file is closed.
            file = stack.enter_context(path.open("a+b", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note = _OWN_LOCK.fullmatch(path.read_bytes())
            who = f"run {note[1].decode()}" if note and note[1] else "another process"
            raise BadInput(f"{flag}={value}: {who} is at work in it; wait, or choose another place") from None
        except OSError as error:
            raise BadInput(f"{flag}={value}: cannot be locked ({error}); choose another place") from error
        with contextlib.suppress(OSError):  # only a note; a full disk is found by what needs room
            file.seek(0)
            if _OWN_LOCK.fullmatch(file.read(64)):  # else somebody else's
                file.truncate(0)
                file.write(f"sfl_jax {os.getpid()}\n".encode())
        yield


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A path for what the block makes and renames; whatever has this name after the block is removed."""
    _unfinished.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove what blocks of other threads are at work on, when the process ends without them."""
    for path in [*_unfinished]:
        _remove(path)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to fill, which takes its name when the block ends well and leaves nothing when it does not.

    An OSError of the block, as of a full disk, names the file if it names none.
    """
    path = Path(path)
    try:
        with unfinished(path.with_name(f".{path.name}.{os.getpid()}.part")) as part:
            with part.open("wb") as file:
                yield file
            part.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # what cannot be there need not be removed
            path.unlink()
