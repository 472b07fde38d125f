"""Eight simulated devices, strict dtypes and ranks, shapes checked at every call."""

import jax
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_hook = jaxtyping.install_import_hook(["drconv_jax"], "beartype.beartype")
_hook.__enter__()


@pytest.fixture
def no_shape_checks():
    """Lets bad arguments reach the code whose own message is tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compiled_quickly():
    """For networks: programs that are large and run a few times at most."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name.lower())
def axis_type(request):
    """Of a mesh: sharding is left to XLA, or is part of every array's type."""
    return request.param


@pytest.fixture
def mesh(axis_type):
    """The eight devices in a row."""
    return Mesh(np.array(jax.devices()), ("data",), axis_types=(axis_type,))


@pytest.fixture(scope="session")
def common(tmp_path_factory, worker_id):
    """A folder that the processes which run the tests have in common."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def env(common):
    """The environment of processes that all compile the same programs."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(common / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
