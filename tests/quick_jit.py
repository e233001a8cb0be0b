"""A `jax.jit` that compiles in a quarter of the time (with JAX 0.10), but to slower code.

It is for tests that compare results with one another or with NumPy's. Tests of accuracy, of NaNs in large arrays, of
memory and of a program's text need the optimized code that users run: they use `jax.jit`.
"""

import functools

import jax

OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):  # later versions have no other way to emit fused operations
    OPTIONS["xla_cpu_use_fusion_emitters"] = False

quick_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
