"""Presets: flag files in the package, chosen with --preset=NAME."""

from collections.abc import Sequence
from pathlib import Path

from sfl_jax.errors import BadInput, did_you_mean

COMMANDS = ("train", "compare")  # the commands that take all flags of a preset
DIRECTORY = Path(__file__).parent / "presets"


def names() -> list[str]:
    """The names of the presets."""
    return sorted(path.stem for path in DIRECTORY.glob("*.flags"))


def about(name: str) -> str:
    """What a preset is: the first line of its file."""
    return (DIRECTORY / f"{name}.flags").read_text().partition("\n")[0].removeprefix("# ")


def expand(arguments: Sequence[str]) -> list[str]:
    """Replaces each --preset by its flag file, placed before all other arguments, so that those win.

    Raises BadInput for an unknown name, and for two presets, whose flags would mix.
    """
    chosen, others, given = [], [], iter(arguments)
    for argument in given:
        name, is_value, value = argument.partition("=")
        if name in ("--preset", "-preset"):
            chosen.append(value if is_value else next(given, ""))
        elif argument == "--":
            others += [argument, *given]
        else:
            others.append(argument)
    for name in chosen:
        if name not in names():
            raise BadInput(
                f"--preset={name}: must be one of {', '.join(names())}{did_you_mean(name, names())}"
            )
    if len(set(chosen)) > 1:
        raise BadInput(f"--preset={chosen[1]}: --preset={chosen[0]} is given too; choose one")
    return [*(f"--flagfile={DIRECTORY / name}.flags" for name in chosen), *others]
