"""fleet.csv: one line per client, with the columns of `Fleet`."""

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from sfl_jax.errors import BadInput
from sfl_jax.files import whole_file
from sfl_jax.fleet.clients import Fleet
from sfl_jax.fleet.devices import Device, read_device

_REQUIRED = ("client", "flops", "uplink_bps", "downlink_bps", "memory_bytes")
_DEVICE = ("device", "slowdown")  # instead of flops
_COLUMNS = (
    *_REQUIRED, "samples", "cycles_per_s", "kappa", "transmit_w", "energy_j", "distance_m", "rtt_s", *_DEVICE
)  # fmt: skip
_EMPTY = {"flops": np.inf, "slowdown": 1.0}  # what an empty cell means beside a column of devices
_MAY_BE_ZERO = ("memory_bytes", "kappa", "transmit_w", "energy_j")
_NAME_LENGTH = 64
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
      BadInput: no such file, or a wrong form: `path:LINE: column NAME: 'cell': must be …`.
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
    columns = {name: values.tolist() for name, values in fleet.columns().items()}
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
    if max(map(len, names)) > _NAME_LENGTH or list(map(str.strip, names)) != names:
        return None
    columns = {name: table[name].to_numpy() for name in header if name != "client"}
    for name, values in columns.items():
        low = 0 if name in _MAY_BE_ZERO else np.nextafter(0, 1)
        if not np.all((values >= low) & (values < np.inf)):
            return None
    return Fleet(client=np.array(names), **columns)


def _read_exactly(path: Path, data: bytes) -> Fleet:
    """The fleet, read line by line; the error names the first fault."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: byte {data[error.start]:#04x}: must be UTF-8") from error
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")
    rows = csv.reader(text, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(filter(None, rows), [])]
        _check_header(f"{path}:{max(rows.line_num, 1)}", header)
        cells: dict[str, list] = {name: [] for name in header}
        line_of: dict[str, int] = {}
        for row in filter(None, rows):  # blank lines are no rows
            place = f"{path}:{rows.line_num}"
            if len(row) < len(header):
                raise BadInput(f"{place}: column {header[len(row)]}: missing; a line has {len(header)} cells")
            if len(row) > len(header):
                raise BadInput(f"{place}: cell {len(header) + 1}: {_shown(row[len(header)])}: has no column")
            stripped = dict(zip(header, map(str.strip, row), strict=True))
            _check_device(place, stripped)
            for name, cell in stripped.items():
                cells[name].append(_value(place, name, cell, "device" in stripped))
            first = line_of.setdefault(cells["client"][-1], rows.line_num)
            if first != rows.line_num:
                raise BadInput(
                    f"{place}: column client: {_shown(cells['client'][-1])}: is also on line {first}"
                )
    except csv.Error as error:
        raise BadInput(f"{path}:{rows.line_num}: not CSV ({error})") from error
    if not line_of:
        raise BadInput(f"{path}:{rows.line_num + 1}: no clients; must have one line for each")
    if "device" in cells:
        cells.setdefault("flops", [np.inf] * len(line_of))
    columns: dict[str, Any] = {name: np.array(values) for name, values in cells.items()}
    if "device" not in cells:
        return Fleet(**columns)
    devices = _read_devices(path, cells["device"], list(line_of.values()))
    return Fleet(**columns, devices=devices)


def _check_device(place: str, row: dict[str, str]) -> None:
    """A row has flops or a device; a slowdown needs a device."""
    if "device" in row:
        if bool(row["device"]) == bool(row.get("flops")):
            what = "both are given" if row["device"] else "both are empty"
            raise BadInput(f"{place}: columns flops and device: {what}; must be one of them")
        if row.get("slowdown") and not row["device"]:
            raise BadInput(
                f"{place}: column slowdown: {_shown(row['slowdown'])}: needs a device; leave it empty"
            )


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


def _check_header(place: str, header: list[str]) -> None:
    for separator, plural in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise BadInput(f"{place}: cells are separated by {plural}; use commas, and points in numbers")
    unknown = [_shown(name) for name in header if name not in _COLUMNS]
    if unknown:
        columns = f"columns {', '.join(unknown[:9])}" if len(unknown) > 1 else f"column {unknown[0]}"
        raise BadInput(f"{place}: {columns}: must be one of {', '.join(_COLUMNS)}")
    for i, name in enumerate(header):
        if name in header[:i]:
            raise BadInput(f"{place}: column {name}: must occur once")
    if "slowdown" in header and "device" not in header:
        raise BadInput(f"{place}: column slowdown: needs the column device")
    for name in _REQUIRED:
        if name not in header and not (name == "flops" and "device" in header):
            raise BadInput(f"{place}: column {name}: missing; must have {','.join(_REQUIRED)}")


def _value(place: str, column: str, cell: str, has_device: bool) -> str | float | int:
    if column == "client":
        rule = f"1 to {_NAME_LENGTH} printable characters"
        value, good = cell, 1 <= len(cell) <= _NAME_LENGTH and cell.isprintable()
    elif column == "device":
        return cell
    elif not cell and column in _EMPTY and has_device:
        return _EMPTY[column]
    else:
        integer, zero = column == "samples", column in _MAY_BE_ZERO
        rule = "a positive integer" if integer else "a number, 0 or more" if zero else "a positive number"
        try:
            value = int(cell) if integer else float(cell)
        except ValueError:
            value = -1
        # Python reads ١ and 1_0 as numbers; other programs do not.
        good = (value > 0 or (zero and value == 0)) and value < (2**63 if integer else np.inf)
        good = good and cell.isascii() and "_" not in cell
    if not good:
        raise BadInput(f"{place}: column {column}: {_shown(cell)}: must be {rule}")
    return value


def _shown(cell: str) -> str:
    return repr(cell if len(cell) <= 40 else cell[:39] + "…")
