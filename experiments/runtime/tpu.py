"""The TPU compiler on a machine that has no TPU (libtpu, from PyPI)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies


def compiler_is_installed() -> bool:
    """Whether programs can be compiled for TPUs."""
    return importlib.util.find_spec("libtpu") is not None


def devices(topology: str) -> Sequence[jax.Device]:
    """The chips of a slice that there need not be, as "v5e:16x16", to compile for."""
    # Without these libtpu asks a metadata server that only Google's cloud has.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Compiling takes no TPU, so that other processes may do it too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
