"""The TPU compiler on a machine that has no TPU (libtpu, from PyPI)."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies


def compiler_is_installed() -> bool:
    """Whether programs can be compiled for TPUs."""
    return importlib.util.find_spec("libtpu") is not None


def be_quiet_without_one() -> None:
    """Keeps libtpu, where JAX looks for a TPU that is not there, from printing errors about it.

    It prints them where its environment does not say which TPU the machine has. To be called before
    JAX's first use of a device. A machine that may have a TPU, and what the user has set, is left
    alone.
    """
    # JAX has set this where it finds no TPU on the PCI bus.
    without = os.environ.get("TPU_SKIP_MDS_QUERY") == "1"
    if without and not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        _describe_a_tpu()


def devices(topology: str) -> Sequence[jax.Device]:
    """The chips of a slice that there need not be, as "v5e:16x16", to compile for."""
    # Without this libtpu asks a metadata server that only Google's cloud has.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    _describe_a_tpu()
    # Compiling takes no TPU, so that other processes may do it too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def _describe_a_tpu() -> None:
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
