"""Keeps decoded arrays in the user's cache directory, so that images are decompressed once, not in every run.

The cache is optional. If anything is wrong with it (no home, read-only, full, truncated, changed), reading
returns None, writing keeps nothing, and the run goes on.
"""

import contextlib
import hashlib
import os
import struct
import zipfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sfl_jax.files import whole_file

_FORMAT = 3  # increase it when the meaning of the arrays changes


def contents(directory: Path) -> str:
    """A digest of the names and bytes of the files in `directory`. OSError if one cannot be read.

    Times and sizes are not enough: some packagers give all files one time, and other labels can have the same
    size.
    """
    files = sorted(file for file in directory.iterdir() if file.is_file())
    with ThreadPoolExecutor() as pool:  # reading and hashing release Python's lock
        sums = list(pool.map(_sum, files))
    lines = [f"{digest} {file.name}" for file, digest in zip(files, sums, strict=True)]
    return _digest("\n".join(lines))


def read_cache(
    directory: Path, key: str, mapped: Collection[str] = (), variant: str = ""
) -> dict[str, np.ndarray] | None:
    """The cached arrays of the dataset in `directory`, or None if there are none or anything is wrong.

    key: the `contents` that they were decoded from.
    mapped: names of arrays that stay in the file as `np.memmap`. They are neither read nor checked here. The
      CRC-32 of the others in the archive is checked.
    variant: the way in which the dataset was read; each way has its own file.
    """
    try:
        with _file(directory, variant).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays: dict[str, np.ndarray] = {
                name: _map(file.name, archive.zip, name) if name in mapped else archive[name]
                for name in archive.files
            }
        return arrays if arrays.pop("fingerprint").item() == _fingerprint(key, arrays) else None
    except Exception:  # a damaged archive can raise any error
        return None


def write_cache(directory: Path, key: str, arrays: Mapping[str, np.ndarray], variant: str = "") -> None:
    """Keeps `arrays` for `read_cache` with the same arguments. A reader sees the whole file or none."""
    with contextlib.suppress(OSError, RuntimeError):
        file = _file(directory, variant)
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as archive:
            kept: dict[str, Any] = {**arrays, "fingerprint": np.array(_fingerprint(key, arrays))}
            np.savez(archive, **kept)


def _map(path: str, archive: zipfile.ZipFile, name: str) -> np.memmap:
    """Maps an uncompressed array in the archive. It is after the header of its zip member, whose two variable
    lengths are in the header, and after its own .npy header.
    """
    member = archive.getinfo(f"{name}.npy")
    with Path(path).open("rb") as file:
        file.seek(member.header_offset)
        file.seek(sum(struct.unpack("<26x2H", file.read(30))), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    if member.compress_type != zipfile.ZIP_STORED or version != (1, 0) or fortran_order:
        raise ValueError("not in the form that write_cache writes")
    return np.memmap(path, dtype, "r", start, shape)


def _file(directory: Path, variant: str) -> Path:
    """One file per dataset directory and variant, so that outdated files are replaced and do not pile up."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    where = hashlib.sha256(os.fsencode(directory.resolve()) + variant.encode()).hexdigest()[:16]
    return base / "sfl_jax" / "datasets" / f"{directory.parent.name}-{directory.name}-{where}.npz"


def _fingerprint(key: str, names: Iterable[str]) -> str:
    """Changes if the dataset's files, the list of arrays or their meaning change."""
    return _digest("\n".join([str(_FORMAT), key, *sorted(names)]))


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
