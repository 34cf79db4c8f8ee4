"""Shows that a cut changes nothing but rounding. At every cut, two parties take one step of training by
exchanging messages. It is compared with the step of the whole network, in float64.
"""

import sys
from collections.abc import Sequence

from sfl_jax.commands import alone, flags
from sfl_jax.commands.config import Config
from sfl_jax.commands.screen import screen
from sfl_jax.errors import BadInput

HEADER = "cut,after_unit,loss,loss_difference,difference,messages"
FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return flags.run(certify, "certify", str(__doc__), argv)


def certify(config: Config) -> int:
    """Prints a row for each cut, and writes them. Returns 1 if a cut changes more than rounding."""
    path = alone.ensure_file("certificate", config.certificate, ".csv", HEADER.encode())
    side, channels = config.image_size, config.image_channels
    first = (
        f"{config.model} at {side}x{side}, one step of {config.batch_size} samples in float64 at every cut"
    )
    with screen(first) as say:
        chain = alone.network(config)
        from sfl_jax.commands import compare
        from sfl_jax.federated import certificate
        from sfl_jax.models import units

        if config.tail_units > len(chain) - 1:
            raise BadInput(
                f"--tail_units={config.tail_units}: must be below {len(chain)}, the units of {config.model}"
            )
        rows = list(
            certificate.certify(
                chain, (side, side, channels), config.batch_size, config.num_classes, config.seed,
                config.tail_units, say,
            )
        )  # fmt: skip
        after = ["", *(units.name(unit, index) for index, unit in enumerate(chain.units))]
        lines = [(row.cut, after[row.cut], *row[1:]) for row in rows]
        compare.write_csv(path, HEADER.split(","), lines)
        say.result(table(lines))
    failing = [row.cut for row in rows if not row.holds]
    print(f"written     {path}")
    print(verdict(failing, max(row.difference for row in rows), len(chain), certificate.LIMIT))
    return FAILED if failing else 0


def table(lines: Sequence[tuple[int, str, float, float, float, int]]) -> str:
    """A row for each cut, below a row of titles."""
    width = max(10, *(len(name) for _, name, *_ in lines))
    rows = [f"{'cut':>4}  {'after unit':<{width}}  {'loss':>18}{'loss differs':>14}{'variables differ':>18}"]
    rows += [
        f"{cut:>4}  {name:<{width}}  {loss:>18.14f}{of_loss:>14.1e}{of_variables:>18.1e}"
        for cut, name, loss, of_loss, of_variables, _ in lines
    ]
    return "\n".join(rows)


def verdict(failing: Sequence[int], largest: float, units: int, limit: float) -> str:
    """What the table shows, in one sentence."""
    if failing:
        return f"NOT EQUAL   at cut {', '.join(map(str, failing))}: more than {limit:g} of a step"
    return f"equal       at all {units + 1} cuts: variables differ by at most {largest:.1e} of a step"


if __name__ == "__main__":
    sys.exit(main())
