"""Decoded arrays kept in the user's cache directory: images are decompressed once, not in every run.

A cache is a convenience: whatever is wrong with it (no home, read-only, full, truncated, tampered with) the
caller gets None, or nothing is kept, and the run goes on.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_FORMAT = 1  # raise when the meaning of the kept arrays changes


def read_cache(directory: Path) -> dict[str, np.ndarray] | None:
    """The arrays kept for the dataset in `directory`, or None if there are none or any doubt about them.

    The archive carries a CRC-32 of every array, checked while reading, and the fingerprint of the files that
    the arrays were decoded from.
    """
    try:
        with np.load(_file(directory), allow_pickle=False) as archive:
            if archive["fingerprint"].item() != _fingerprint(directory):
                return None
            return {name: archive[name] for name in archive.files if name != "fingerprint"}
    except Exception:  # a damaged archive can fail in any way, and none of them matters
        return None


def write_cache(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep `arrays` for the dataset in `directory`; a reader sees the whole file or none."""
    with contextlib.suppress(OSError, RuntimeError):
        file = _file(directory)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            try:
                np.savez(part, allow_pickle=False, fingerprint=np.array(_fingerprint(directory)), **arrays)
                part.close()
                os.replace(part.name, file)
            finally:
                Path(part.name).unlink(missing_ok=True)


def _file(directory: Path) -> Path:
    """One file per dataset directory, so that an outdated one is replaced and none pile up."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    where = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]
    return base / "sfl_jax" / "datasets" / f"{directory.parent.name}-{directory.name}-{where}.npz"


def _fingerprint(directory: Path) -> str:
    """Changes when a file of the dataset is added, removed, resized or rewritten."""
    digest = hashlib.sha256(f"{_FORMAT} {directory.resolve()}".encode(errors="surrogateescape"))
    for file in sorted(directory.iterdir()):
        status = file.stat()
        digest.update(f"\n{file.name} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()
