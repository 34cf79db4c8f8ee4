"""Numbers and sentences in a readable form."""

import math

ALIKE = 0.005  # times with a smaller relative difference are called equal
NONE = "-"  # replaces an unknown number
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def percent(part: float | None, digits: int = 2) -> str:
    """An accuracy or another part in percent; a dash for None."""
    if part is None:
        return NONE
    return f"{100 * part:.{digits}f} %" if math.isfinite(part) else "not finite"


def amount(number: float, unit: str) -> str:
    """A number of bytes or FLOP, "1.23 GB"; a dash where it is not known."""
    if not math.isfinite(number):
        return NONE
    power = 0
    while number >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {_PREFIXES[power]}{unit}"


def byte_unit(most: float) -> tuple[str, float]:
    """The unit in which a number of bytes is below a thousand, and its size in bytes."""
    power = min(max(int(math.log10(max(most, 1)) // 3), 0), 4)
    return f"{_PREFIXES[power]}B", 1000.0**power


def beside(seconds: float, own_s: float) -> str:
    """Compares this plan, which takes `own_s`, with another that takes `seconds`."""
    if own_s <= 0 or seconds <= 0 or not math.isfinite(seconds / own_s):
        return ""
    if abs(seconds / own_s - 1) < ALIKE:
        return "this plan is as fast"
    if seconds > own_s:
        return f"this plan is {seconds / own_s:.2f} times as fast"
    return f"this plan is {own_s / seconds:.2f} times as slow"


def clock(seconds: float) -> str:
    """A simulated time; "not possible" if it is infinite."""
    if not math.isfinite(seconds):
        return "not possible"
    return (
        f"{seconds:,.1f} s" if seconds >= 100 else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds:.3g} s"
    )


def whose_accuracy(deadline_factor: float, cuts_matter: bool = False) -> str:
    """Says whether the run's accuracy holds for every method whose clock is shown.

    cuts_matter: whether other cuts give other numbers.
    """
    if cuts_matter:
        return (
            "the accuracy is that of this run's plans alone: this scheme or codec makes it depend on the cuts"
        )
    if not deadline_factor:
        return "the accuracy is the same for all: a round's numbers do not depend on cuts and shares"
    return (
        "the accuracy is that of this run's plans alone: who comes before the deadline depends on the method"
    )


def columns(rows: list[tuple[str, ...]], indent: str = "  ") -> str:
    """Rows in columns as wide as their widest cell. The second column is flush right."""
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(2)]
    return "\n".join(
        f"{indent}{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {'  '.join(row[2:])}".rstrip() for row in rows
    )


def shortened(name: str, most: int) -> str:
    """A name of at most `most` letters. Its two ends stay, since long names often differ only at one."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[most // 2 + 1 - most :]}"
