"""A device file: the seconds of each unit of a network, forward and backward, measured on one device."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from sfl_jax.errors import BadInput
from sfl_jax.files import whole_file

FORMAT = "sfl_jax device 1"
_MOST_S = 1e300  # JSON may have integers that no float holds


@dataclass(frozen=True, eq=False)
class Device:
    """What was measured on one device, for batches of one size.

    Attributes:
      network: the network and its input, as in "efficientnetv2-b0 at 32x32x1, 10 classes".
      batch_size: samples of a batch.
      units: the names of the units.
      forward_s, backward_s: seconds of each unit for one batch.
      path: the file; "" if there is none.
      about: anything else that is worth keeping, such as the name of the machine.
    """

    network: str
    batch_size: int
    units: tuple[str, ...]
    forward_s: Float64[np.ndarray, " L"]
    backward_s: Float64[np.ndarray, " L"]
    path: str = ""
    about: tuple[tuple[str, Any], ...] = ()


def write_device(path: str | os.PathLike[str], device: Device) -> None:
    """Writes a file that `read_device` reads; BadInput if the path cannot be written."""
    rows = zip(device.units, device.forward_s.tolist(), device.backward_s.tolist(), strict=True)
    content = {
        "format": FORMAT, "network": device.network, "batch_size": device.batch_size, **dict(device.about),
        "units": [{"unit": unit, "forward_s": forward, "backward_s": back} for unit, forward, back in rows],
    }  # fmt: skip
    try:
        with whole_file(path) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a path that can be written") from error


def read_device(path: str | os.PathLike[str]) -> Device:
    """The device of a file. BadInput: no such file, another format, or seconds missing or not above 0."""
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give the path of a device file") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: must be a device file; it is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f'{path}: must be a device file, with "format": "{FORMAT}"')
    network, batch_size, rows = (content.get(name) for name in ("network", "batch_size", "units"))
    if not isinstance(network, str):
        raise BadInput(f"{path}: network: missing; must name the network that was measured")
    if type(batch_size) is not int or batch_size < 1:
        raise BadInput(f"{path}: batch_size={batch_size}: must be an integer, at least 1")
    if not isinstance(rows, list) or not rows:
        raise BadInput(f"{path}: units: missing; must have one entry for each unit")
    units, seconds = [], []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("unit"), str):
            raise BadInput(f"{path}: unit {number}: must have a name, forward_s and backward_s")
        units.append(row["unit"])
        seconds.append([_seconds(path, row, name) for name in ("forward_s", "backward_s")])
    about = {
        name: value
        for name, value in content.items()
        if name not in ("format", "network", "batch_size", "units")
    }
    forward_s, backward_s = np.array(seconds).T
    return Device(network, batch_size, tuple(units), forward_s, backward_s, str(path), tuple(about.items()))


def check_devices(
    devices: Sequence[Device], units: Sequence[str], batch_size: int, network: str | None = None
) -> None:
    """BadInput for a device that was measured with another network or batch size.

    network: as in `Device`; None compares only the names of the units.
    """
    for device in devices:
        if network is not None and device.network != network:
            raise BadInput(
                f"{device.path}: was measured with {device.network}; must be {network}; measure that"
            )
        if device.units != tuple(units):
            raise BadInput(
                f"{device.path}: has {len(device.units)} units; must have the {len(units)} of the network"
                if len(device.units) != len(units)
                else f"{device.path}: its units have other names than those of the network"
            )
        if device.batch_size != batch_size:
            raise BadInput(
                f"{device.path}: was measured with batch_size={device.batch_size}, and"
                f" batch_size={batch_size} is asked for; measure it with that"
            )


def _seconds(path, row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    if value is None:
        raise BadInput(f"{path}: unit {row['unit']}: {name}: missing; must be a number above 0")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST_S:
        raise BadInput(f"{path}: unit {row['unit']}: {name}={value}: must be a number above 0")
    return float(value)
