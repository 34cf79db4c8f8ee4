"""fleet.csv: one line per client, with the columns of `Fleet`."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfl_jax.errors import BadInput
from sfl_jax.files import whole_file
from sfl_jax.fleet.clients import Fleet
from sfl_jax.fleet.devices import Device, read_device
from sfl_jax.fleet.rows import NAME_LENGTH, Row, integer, name_in, number, rows_of

_REQUIRED = ("client", "flops", "uplink_bps", "downlink_bps", "memory_bytes")
_DEVICE = ("device", "slowdown")  # instead of flops
_COLUMNS = (
    *_REQUIRED, "samples", "cycles_per_s", "kappa", "transmit_w", "energy_j", "distance_m", "rtt_s", *_DEVICE
)  # fmt: skip
_EMPTY = {"flops": np.inf, "slowdown": 1.0}  # what an empty cell means beside a column of devices
_MAY_BE_ZERO = ("memory_bytes", "kappa", "transmit_w", "energy_j")
LARGEST_EXACT = 2.0**53  # below it, every whole number is a float
EXAMPLE = "example"  # instead of a path: the made-up fleet of this package
_EXAMPLE_FILE = Path(__file__).with_name("example.csv")


def read_fleet(path: str | os.PathLike[str]) -> Fleet:
    """The fleet of a CSV file in UTF-8 with a header, or of the example in this package ("example").

    Columns may have any order. Blanks around cells are ignored. The columns are those of `Fleet`. Columns
    that may be None there may be missing here. `client` is a unique name of 1 to 64 printable characters,
    `samples` a positive integer. All others are positive finite numbers; memory_bytes, kappa, transmit_w and
    energy_j may also be 0.

    `device` is the path of a device file, from the directory of the fleet file. A client has either `flops`
    or `device`, and leaves the cell of the other empty; `slowdown`, 1 where empty, multiplies the seconds of
    the device.

    Raises:
      BadInput: no such file, or a wrong form: `path:LINE: client NAME: column NAME: 'cell': must be …`.
    """
    path = _EXAMPLE_FILE if path == EXAMPLE else Path(os.path.expanduser(path))
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: {reason}; give the path of a fleet.csv") from error
    # Arrow reads a million lines in a second. Only reading line by line can say what is wrong, and where.
    fleet = _read_fast(data)
    return _read_exactly(path, data) if fleet is None else fleet


def write_fleet(path: str | os.PathLike[str], fleet: Fleet) -> None:
    """Writes a file that `read_fleet` reads back without loss; writes the whole file or nothing.

    Raises:
      BadInput: the path cannot be written.
    """
    path = os.path.expanduser(path)
    columns = {name: _cells(values) for name, values in fleet.columns().items()}
    if fleet.device is not None:
        folder = os.path.dirname(os.path.abspath(path))
        paths = {name: os.path.relpath(device.path, folder) for name, device in fleet.devices.items()}
        columns["device"] = [paths.get(name, "") for name in fleet.device.tolist()]
        columns["flops"] = ["" if np.isinf(flops) else flops for flops in columns["flops"]]
        if "slowdown" in columns:
            pairs = zip(columns["device"], columns["slowdown"], strict=True)
            columns["slowdown"] = [slowdown if device else "" for device, slowdown in pairs]
    try:
        with whole_file(path) as file:
            text = io.TextIOWrapper(file, "utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
            text.detach()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a path that can be written") from error


def _cells(values: np.ndarray) -> list[Any]:
    """What is written of a column. Where all numbers are whole, they have no point."""
    if values.dtype.kind != "f":
        return values.tolist()
    whole = np.all(np.abs(values) < LARGEST_EXACT) and np.all(values == np.floor(values))
    return values.astype(np.int64).tolist() if whole else values.tolist()


def _read_fast(data: bytes) -> Fleet | None:
    """The fleet, read all at once; None if anything is wrong."""
    # Arrow accepts 0x1 as a number. Looking for one letter is free; for two it takes 0.1 s per million lines.
    if any(letter in data and b"0" + letter in data for letter in (b"x", b"X")):
        return None
    import pyarrow  # imported here: only fleet files need it
    import pyarrow.csv

    types = {"client": pyarrow.string(), "samples": pyarrow.int64()}
    types = {name: types.get(name, pyarrow.float64()) for name in _COLUMNS}
    options = pyarrow.csv.ConvertOptions(column_types=types, null_values=[])
    try:
        table = pyarrow.csv.read_csv(pyarrow.BufferReader(data), convert_options=options)
        header = table.column_names
    except (pyarrow.ArrowException, UnicodeDecodeError):
        return None
    if set(header) & set(_DEVICE):  # cells that may be empty, and more files to read
        return None
    if len(set(header)) < len(header) or not set(_REQUIRED) <= set(header) <= set(_COLUMNS) or not len(table):
        return None
    names = table["client"].to_pylist()
    if len(set(names)) < len(names) or not all(map(len, names)) or not "".join(names).isprintable():
        return None
    if max(map(len, names)) > NAME_LENGTH or list(map(str.strip, names)) != names:
        return None
    columns = {name: table[name].to_numpy() for name in header if name != "client"}
    for name, values in columns.items():
        low = 0 if name in _MAY_BE_ZERO else np.nextafter(0, 1)
        if not np.all((values >= low) & (values < np.inf)):
            return None
    return Fleet(client=np.array(names), **columns)


def _read_exactly(path: Path, data: bytes) -> Fleet:
    """The fleet, read line by line; the error names the first fault."""
    cells: dict[str, list] = {}
    line_of: dict[str, int] = {}
    for row in rows_of(path, data, _COLUMNS, _required, "no clients; must have one line for each"):
        if "slowdown" in row.cells and "device" not in row.cells:
            raise BadInput(f"{path}:1: column slowdown: needs the column device")
        _check_device(row)
        for name in row.cells:
            cells.setdefault(name, []).append(_value(row, name))
        first = line_of.setdefault(row.cells["client"], row.line)
        if first != row.line:
            raise row.error("client", f"is also on line {first}")
    if "device" in cells:
        cells.setdefault("flops", [np.inf] * len(line_of))
    columns: dict[str, Any] = {name: np.array(values) for name, values in cells.items()}
    if "device" not in cells:
        return Fleet(**columns)
    devices = _read_devices(path, cells["device"], list(line_of.values()))
    return Fleet(**columns, devices=devices)


def _required(header: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in _REQUIRED if not (name == "flops" and "device" in header))


def _check_device(row: Row) -> None:
    """A row has flops or a device; a slowdown needs a device."""
    if "device" in row.cells:
        if bool(row.cells["device"]) == bool(row.cells.get("flops")):
            what = "both are given" if row.cells["device"] else "both are empty"
            raise BadInput(f"{row.place}: columns flops and device: {what}; must be one of them")
        if row.cells.get("slowdown") and not row.cells["device"]:
            raise row.error("slowdown", "needs a device; leave it empty")


def _read_devices(path: Path, names: list[str], lines: list[int]) -> dict[str, Device]:
    """The devices by their cells; the error names the first line of one that cannot be read."""
    devices: dict[str, Device] = {}
    for name, line in zip(names, lines, strict=True):
        if name and name not in devices:
            try:
                devices[name] = read_device(path.parent / os.path.expanduser(name))
            except BadInput as error:
                raise BadInput(f"{path}:{line}: column device: {error}") from error
    return devices


def _value(row: Row, column: str) -> str | float | int:
    if column == "client":
        return name_in(row, column)
    if column == "device":
        return row.cells[column]
    if not row.cells[column] and column in _EMPTY and "device" in row.cells:
        return _EMPTY[column]
    if column == "samples":
        return integer(row, column, 1, 2**63 - 1, "a positive integer")
    return number(row, column, zero=column in _MAY_BE_ZERO)
