"""How programs are compiled that run for milliseconds: most of what tests cost is compiling."""

# The fusion emitters alone are two fifths of it.
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
FAST_FLAGS = " ".join(f"--{name}={value}" for name, value in FAST.items())
