"""Starts JAX for a command with the settings that the code needs, on the devices that the user asks for."""

import os
import sys

from sfl_jax.errors import BadInput

# Kernels that add in a fixed order. No kernels chosen by timing, because another run may choose others.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
# Settings that the code relies on. Other values in JAX's variables would cause errors or other numbers.
RELIED_ON = {
    "jax_enable_x64": False,  # planning turns float64 on where it needs it
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_transfer_guard": None,
    "jax_transfer_guard_host_to_device": None,
    "jax_transfer_guard_device_to_device": None,
    "jax_transfer_guard_device_to_host": None,
    "jax_disable_jit": False,  # programs are compiled before they run
    "jax_no_tracing": False,
    "jax_no_execution": False,
}


def start() -> None:
    """Imports JAX and overrides its variables that conflict with the code. BadInput for invalid values."""
    try:
        import jax
    except ValueError as error:
        raise BadInput(f"JAX cannot start: {error}; correct or unset that variable") from error
    changed = [name for name, value in RELIED_ON.items() if _plain(getattr(jax.config, name)) != value]
    for name in changed:
        jax.config.update(name, RELIED_ON[name])
    if changed:
        print(
            f"without {', '.join(map(str.upper, changed))}, which this program sets itself", file=sys.stderr
        )


def find() -> None:
    """Starts the devices. BadInput if there are none of the platform that JAX's variables ask for.

    The host's CPU is always among the platforms, because planning computes there.
    """
    import jax

    asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue] set by JAX at run time
    has_host = not asked or "cpu" in asked.split(",")
    try:
        if not has_host:
            jax.config.update("jax_platforms", f"{asked},cpu")
        if jax.default_backend() == "cpu" and not has_host:  # JAX ignores missing GPUs
            raise RuntimeError
    except RuntimeError as error:
        jax.config.update("jax_platforms", asked)
        named = os.environ.get("JAX_PLATFORM_NAME")  # the older name of the same setting
        name, wish = ("JAX_PLATFORM_NAME", named) if named and has_host else ("JAX_PLATFORMS", asked)
        platform = f"{wish} here ({name}={wish}); set {name}=cpu" if wish else "device here"
        raise BadInput(f"JAX finds no {platform}" + (f" ({error})" if str(error) else "")) from error


def switch(deterministic: bool = False, matmul_precision: str = "default") -> None:
    """Sets what --deterministic and --matmul_precision ask for.

    --deterministic works only before JAX computes anything. If a flag asks for nothing, the user's
    environment stays. In XLA_FLAGS the environment wins.
    """
    import jax

    if deterministic:
        os.environ["XLA_FLAGS"] = f"{DETERMINISTIC} {os.environ.get('XLA_FLAGS', '')}"
    if matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", matmul_precision)


def _plain(value):
    """A setting of JAX as it is written in the environment."""
    return getattr(value, "value", value)
