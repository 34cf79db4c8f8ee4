"""Times each unit of a network on this machine, and writes the seconds to a file that a fleet can name."""

import platform
import sys
from collections.abc import Sequence

from sfl_jax import __version__
from sfl_jax.commands import alone, flags
from sfl_jax.commands.config import Config
from sfl_jax.commands.screen import screen

MARK = b'"format": "sfl_jax device'


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return flags.run(profile_device, "profile_device", str(__doc__), argv)


def profile_device(config: Config) -> None:
    """Times all units, prints them in a table, and writes the device file."""
    path = alone.ensure_file("device_file", config.device_file, ".json", MARK)
    side, size = config.image_size, config.batch_size
    first = f"{config.model} at {side}x{side}, batches of {size}, {config.repetitions} times each"
    with screen(first) as say:
        chain = alone.network(config)
        import jax
        import numpy as np

        from sfl_jax import fleet, models
        from sfl_jax.commands.parts import network_name

        shape = (side, side, config.image_channels)
        timed = models.unit_seconds(chain, shape, size, config.repetitions, say)
        names, forward_s, backward_s = zip(*timed, strict=True)
        where = jax.devices()[0]
        about = {
            "machine": platform.machine(), "system": platform.system(), "jax_device": where.device_kind,
            "jax": jax.__version__, "sfl_jax": __version__, "repetitions": config.repetitions,
        }  # fmt: skip
        network = network_name(config, config.image_channels, config.num_classes)
        device = fleet.Device(
            network, size, names, np.array(forward_s), np.array(backward_s), str(path), tuple(about.items())
        )
        fleet.write_device(path, device)
        say.result(table(device))
    print(f"written     {path}; name it in the column device of a fleet.csv, instead of flops")


def table(device) -> str:
    """A row for each unit, with its seconds and those of the client that keeps all units up to it."""
    width = max(4, *map(len, device.units))
    rows = [f"{'unit':<{width}}  {'forward, s':>11}{'backward, s':>13}{'all so far, s':>15}"]
    total = 0.0
    for unit, forward, backward in zip(device.units, device.forward_s, device.backward_s, strict=True):
        total += forward + backward
        rows.append(f"{unit:<{width}}  {forward:>11.4g}{backward:>13.4g}{total:>15.4g}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
