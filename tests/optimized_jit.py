"""A `jax.jit` that compiles as users do, for tests that must not compile cheaply (see `conftest.py`)."""

import functools

import jax

# XLA's defaults for the options that conftest.py changes
OPTIONS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if jax.__version_info__ < (0, 11):  # later versions have no other way to emit fused operations
    OPTIONS["xla_cpu_use_fusion_emitters"] = True

optimized_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
