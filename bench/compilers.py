"""Compiles programs with XLA for accelerators that this machine does not have.

The compilers read environment variables while JAX is imported, and a CUDA or TPU plugin changes the devices that JAX
finds. So use this module in a separate process, with the variables of `environment()`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable

import jax
from jax.experimental import topologies

PACKAGES = {  # by a module that each installs
    "libtpu": "jax[tpu]",
    "jax_plugins.xla_cuda12": "jax-cuda12-plugin and jax-cuda12-pjrt",
    "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12",
}
TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# An H100 SXM as XLA's GpuTargetConfigProto: the limits of compute capability 9.0, cores, clock and memory.
H100 = """
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3352000000000
  device_memory_size: 84942979072
}
"""


def missing() -> list[str]:
    """The required packages that aren't installed."""
    return [package for module, package in PACKAGES.items() if not _found(module)]


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # raised if its parent is missing
        return False


def environment() -> dict[str, str]:
    """The environment variables of a process that compiles. It does not look for devices here, and it finds ptxas."""
    (nvcc,) = importlib.util.find_spec("nvidia.cuda_nvcc").submodule_search_locations
    return os.environ | {
        "PATH": f"{pathlib.Path(nvcc) / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


@functools.cache
def devices(name: str, count: int = 1) -> list:
    """At least `count` devices on one host: up to four TPUs, or eight of the v5e."""
    if name == "h100":
        there = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology=f"1x1x{count}", target_config=H100
        )
    else:
        there = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4" if count == 8 else TPUS[name])
    return there.devices


def compiled(f: Callable, name: str, shapes: list[tuple]):
    """The compiled program of a function for one such device, with arguments of these shapes and dtypes."""
    place = jax.sharding.SingleDeviceSharding(devices(name)[0])
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes)).compile()
