"""XLA's GPU compiler on a machine that has no GPU (`pip install "jax[cuda13]"`)."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    SingleDeviceSharding,
    use_abstract_mesh,
)

# What the compiler asks a device: an H100 of the SXM5 kind, as XLA's protocol buffer
# stream_executor.GpuTargetConfigProto in text.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
}
"""


class Program(NamedTuple):
    """What is known of a program that no GPU has run.

    Attributes:
      temporary_bytes: of memory beside arguments and results. Workspaces that cuDNN may ask for at
        run time are not in it.
      kernels: what the GPU is told to start, in that order; of loops once.
    """

    temporary_bytes: int
    kernels: tuple[str, ...]


def compiler_is_installed() -> bool:
    """Whether programs can be compiled for NVIDIA GPUs."""
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


@functools.cache
def device() -> jax.Device:
    """An H100 that there need not be, to compile for."""
    topology = topologies.get_topology_desc(
        topology_name="h100", platform="cuda", target_config=_H100, topology="1x1x1"
    )
    return topology.devices[0]


def compile_for_gpu(function: Callable[..., Any], *args: Any) -> Program:
    """Compiles a function for an H100, without measuring which algorithms are fastest there.

    Args:
      function: of arrays.
      args: its arguments, of which only shapes and dtypes matter.
    """
    on_gpu = SingleDeviceSharding(device())
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on_gpu), args)
    kind = AbstractDevice(device().device_kind, num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=kind)):
        program = jax.jit(function).lower(*structs).compile()
    memory: Any = program.memory_analysis()
    return Program(memory.temp_size_in_bytes, tuple(_kernels(program.as_text() or "")))


_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%(?P<name>[\w.-]+) = .*? (?P<kind>[a-z][\w-]*)\(")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|true_computation|false_computation|branch_computations)="
    r"({[^}]*}|%[\w.-]+)"
)
_COMPUTES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_CONTROL = {"while", "conditional", "call"}


def _kernels(text: str) -> Iterator[str]:
    """The kernels of a scheduled program, from its text."""
    computations = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) .*?\{\n(.*?)^\}", text, re.M | re.S))
    entry = re.search(r"^ENTRY %([\w.-]+)", text, re.M)

    def kernels_of(name: str) -> Iterator[str]:
        for line in computations[name].splitlines():
            instruction = _INSTRUCTION.match(line)
            if instruction is None or instruction["kind"] in _COMPUTES_NOTHING:
                continue
            if instruction["kind"] in _CONTROL:
                for called in _CALLED.findall(line):
                    for computation in re.findall(r"%([\w.-]+)", called):
                        yield from kernels_of(computation)
            elif not instruction["kind"].endswith("-done"):  # whose start is named
                yield _name(instruction, line)

    return kernels_of(entry[1]) if entry else iter(())


def _name(instruction: re.Match[str], line: str) -> str:
    """A kernel's name: its own where Pallas made it, its library's, or its instruction's."""
    target = re.search(r'custom_call_target="([^"]+)"', line)
    if target is None:
        return re.sub(r"\.\d+", "", instruction["name"])
    if "triton" in target[1] or "mosaic" in target[1]:
        own = re.search(r'\bname = "(\w+)"', line)
        return own[1] if own else target[1]
    return target[1]
