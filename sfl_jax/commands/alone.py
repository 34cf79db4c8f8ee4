"""What the commands share that take a network by itself: no data, no clients, no server."""

from pathlib import Path
from typing import Any

from sfl_jax.commands.config import Config
from sfl_jax.errors import BadInput
from sfl_jax.files import ensure_ours, ensure_writable


def ensure_file(flag: str, value: str, suffix: str, mark: bytes) -> Path:
    """The path of the file that a flag names. BadInput if it must not or cannot be written."""
    path = Path(value)
    if path.suffix != suffix:
        raise BadInput(f"--{flag}={path}: must end in {suffix}")
    ensure_writable(path.parent, flag, str(path))
    ensure_ours(path, mark, flag, str(path))
    return path


def network(config: Config) -> Any:
    """The chain that the settings name. Starts JAX on the accelerators that are there."""
    from sfl_jax.commands import accelerators

    accelerators.start()
    accelerators.find()
    from sfl_jax import models
    from sfl_jax.commands import compilation_cache

    if config.compilation_cache:
        compilation_cache.enable()
    return models.create(
        config.model,
        config.num_classes,
        config.image_channels,
        drop_rate_scale=config.drop_rate_scale,
        norm=config.norm,
    )
