"""Flags for fast compilation: tests run programs for milliseconds, and most of their time is compiling."""

import jax

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    # Saves two fifths of compiling. Later releases lack this flag, and XLA exits on unknown flags.
    FAST["xla_cpu_use_fusion_emitters"] = False
FAST_FLAGS = " ".join(f"--{name}={value}" for name, value in FAST.items())
