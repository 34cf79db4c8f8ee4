"""How programs are compiled that run for milliseconds: most of what tests cost is compiling."""

import jax

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    # Two fifths of compiling. Later releases have no such flag, and XLA ends a process that gives it one.
    FAST["xla_cpu_use_fusion_emitters"] = False
FAST_FLAGS = " ".join(f"--{name}={value}" for name, value in FAST.items())
