"""Writes files whole or not at all, and checks and locks directories for one process at a time."""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sfl_jax.errors import BadInput

CONFIG = "config.json"  # in the directory of a run
PNG_METADATA = {"Software": "sfl_jax"}
PNG_MARK = b"Software\0sfl_jax"
HTML_MARK = b'<meta name="generator" content="sfl_jax">'

_OWN_LOCK = re.compile(rb"(?:sfl_jax (\d+)\n)?")  # only a number may be another program's

_unfinished: set[Path] = set()  # paths that this process removes at a regular end


class NotWritten(Exception):
    """The disk refused to write in the middle of a run."""


def ensure_writable(directory: str | os.PathLike[str], flag: str, value: str) -> None:
    """Makes `directory` and tries to write a file in it. BadInput, naming flag=value, if this fails."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{flag}={value}: cannot be written ({reason}); choose another place") from error


def ensure_ours(path: str | os.PathLike[str], mark: bytes, flag: str, value: str) -> None:
    """Protects other programs' files: BadInput, naming flag=value, if the file at `path` lacks `mark`.

    `mark` is near the beginning of every file of this name that this package writes. Empty files are allowed.
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
        f"{flag}={value}: would replace {path}, which sfl_jax did not write; move it or choose another place"
    )


def ensure_room(directory: str | os.PathLike[str], flag: str, value: str, needed_bytes: int) -> None:
    """BadInput, naming flag=value, if the disk of `directory` has less than `needed_bytes` free."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise BadInput(
            f"{flag}={value}: {free_bytes / 1e6:.1f} MB free, {needed_bytes / 1e6:.1f} MB needed; "
            "free some space or choose another place"
        )


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str], flag: str, value: str) -> Iterator[None]:
    """Holds the lock of `directory` during the block. BadInput if another process holds it.

    The lock ends with its process, even after a crash: a .lock file that is left over locks nothing. A .lock
    file of another program is locked, and its content is kept.
    """
    path = Path(directory, ".lock")
    with contextlib.ExitStack() as stack:
        try:
            # Without a buffer: after a failed write, closing the file would write it again and fail again.
            file = stack.enter_context(path.open("a+b", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note = _OWN_LOCK.fullmatch(path.read_bytes())
            who = f"run {note[1].decode()}" if note and note[1] else "another process"
            raise BadInput(f"{flag}={value}: {who} is using it; wait or choose another place") from None
        except OSError as error:
            raise BadInput(f"{flag}={value}: cannot be locked ({error}); choose another place") from error
        with contextlib.suppress(OSError):  # the note is optional; later writes find a full disk
            file.seek(0)
            if _OWN_LOCK.fullmatch(file.read(64)):  # else it is another program's file
                file.truncate(0)
                file.write(f"sfl_jax {os.getpid()}\n".encode())
        yield


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A path at which the block makes something and renames it. Removes what is left there afterwards."""
    _unfinished.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Removes the unfinished paths of other threads when the process ends without waiting for them."""
    for path in [*_unfinished]:
        _remove(path)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write. It gets its name if the block succeeds; if not, nothing is left.

    An OSError in the block that names no file, as for a full disk, gets the name of this file.
    """
    path = Path(path)
    try:
        with unfinished(path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")) as part:
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
        with contextlib.suppress(OSError):  # nothing there
            path.unlink()
