"""Checks shapes and types of every call into the package while tests run, as `--jaxtyping-packages` asks."""

from beartype import BeartypeConf, beartype

# An int may stand for a float, as for every static type checker.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
