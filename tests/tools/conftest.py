"""Tests of tools compile as users do, because they read programs and run benchmarks."""

import jax
import pytest


@pytest.fixture(autouse=True)
def optimized(request):
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", not request.config.option.optimized)
