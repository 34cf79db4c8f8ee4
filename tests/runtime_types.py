"""Checks shapes and types of every call into the package in tests; `--jaxtyping-packages` uses it."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

# An int is accepted as a float, as by static type checkers.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    try:
        return _checked(function)
    except BeartypeDecorHintPep3119Exception:
        return function  # takes a Protocol that only a static type checker can check
