"""Experts first in Mosaic: interpreted here, and compiled for TPUs that need not be there."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding
from test_experts_first import assert_agree, draw, messages

from drconv_jax.region_conv import experts_first, experts_first_tpu
from drconv_jax.region_conv.mixture import Mixture
from drconv_jax.region_conv.sharding import varying_like


def run(spec, x, mixture, guide, dy, *, module=experts_first_tpu, **kw):
    """y, dx, the gradient of the mixture, and the scores."""
    y = module.forward(spec, x, mixture, guide, **kw)
    return y, *module.backward(spec, x, mixture, guide, y, dy, **kw)


def assert_agrees_with_xla(arguments, tolerance):
    spec, *arrays = arguments
    experts_first_tpu.supports(spec, *arrays[:3])
    ours = jax.jit(functools.partial(run, spec, interpret=True))(*arrays)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
    xla = jax.jit(functools.partial(run, spec, module=experts_first))(*exact)
    assert_agree(ours, xla, tolerance)
    y, dx, dmixture, scores = ours
    x = arrays[0]
    assert all(a.dtype == x.dtype for a in (y, dx, *jax.tree.leaves(dmixture)))
    assert scores.dtype == np.float32


@pytest.mark.parametrize(
    "case",
    [
        # 25 positions in tiles of 4, so that of the last one only the first exists.
        dict(size=5, batch=256, channels=33, features=17, regions=3, experts=4),
        dict(size=3, batch=128, channels=8, features=16, regions=2, experts=2, bias_regions=1),
        dict(size=7, batch=128, kernel=(1,), channels=2, features=1, regions=1, experts=5),
    ],
    ids=["odd", "bias", "one region"],
)
@pytest.mark.parametrize("dtype,tolerance", [(np.float32, 2e-6), (jnp.bfloat16, 2**-6)])
def test_agrees_with_xla(case, dtype, tolerance, monkeypatch, compiled_quickly):
    itemsize = jnp.dtype(dtype).itemsize
    monkeypatch.setattr(experts_first_tpu, "_TILE_BYTES", 4 * 33 * 128 * itemsize)
    spec, *arguments = draw(1, **case, dtype=dtype)
    experts_first_tpu.supports(spec, *arguments[:3])
    ours = jax.jit(functools.partial(run, spec, interpret=True))(*arguments)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), arguments)
    xla = jax.jit(functools.partial(run, spec, module=experts_first))(*exact)
    assert_agree(ours, xla, tolerance)
    y, dx, dmixture, scores = ours
    assert all(a.dtype == dtype for a in (y, dx, *jax.tree.leaves(dmixture)))
    assert scores.dtype == np.float32


def test_ties_and_what_is_no_number_choose_as_everywhere(compiled_quickly):
    spec, x, mixture, _, dy = draw(2, batch=128, size=3, regions=3, experts=2)
    values = np.array([-np.inf, -1.0, 0.0, np.inf, np.nan], np.float32)
    guide = np.random.default_rng(3).choice(values, (128, 3, 3, 3))
    chosen = jax.nn.one_hot(np.argmax(guide, axis=-1), 3)  # argmax takes a NaN for the largest
    interpreted = jax.jit(functools.partial(run, spec, interpret=True))
    assert_agree(
        interpreted(x, mixture, jnp.asarray(guide), dy), interpreted(x, mixture, chosen, dy), 0
    )


def test_a_weight_that_is_not_finite_stays_in_its_region(compiled_quickly):
    spec, x, mixture, guide, dy = draw(3, batch=128, size=3, regions=3, experts=2)
    guide = guide.at[..., 1].set(-100.0)
    spoiled = mixture._replace(weights=mixture.weights.at[:, 1].set(jnp.nan))
    interpreted = jax.jit(functools.partial(run, spec, interpret=True))
    y, dx, dmixture, _ = interpreted(x, spoiled, guide, dy)
    assert_agree((y, dx, dmixture), interpreted(x, mixture, guide, dy)[:3], 0)


@pytest.mark.parametrize(
    "refused,reason",
    [
        (dict(batch=64), "multiple of 128, not 64"),
        (dict(kernel=(3, 3)), "pointwise windows without groups"),
        (dict(strides=2), "pointwise windows without groups"),
        (dict(groups=2), "pointwise windows without groups"),
        (dict(bank_regions=3), "bank and a bias that all regions share"),
        (dict(dtype=np.float16), "float16"),
        (dict(channels=1024, features=1024), "VMEM: they take .* MiB"),
    ],
    ids=str,
)
def test_what_is_not_done_is_declined(refused, reason):
    spec, *arguments, _ = draw(4, **{"batch": 128, "size": 3, **refused})
    with pytest.raises(NotImplementedError, match=reason):
        experts_first_tpu.supports(spec, *arguments)


@pytest.fixture(scope="module")
def tpus():
    """The devices of eight TPUs v5e, to compile for."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        # Compiling takes no TPU, so that other processes, such as another worker, may do it too.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    return topology.devices


def shapes_of(arguments, sharding=None):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        dict(size=5, batch=128, channels=33, features=17, regions=8, experts=8),
        dict(size=1, batch=256, channels=256, features=232, regions=3, experts=5, bias_regions=1),
    ],
    ids=["odd", "wide"],
)
def test_compiles_for_tpu(tpus, case, dtype):
    spec, *arguments = draw(5, **case, dtype=dtype)
    structs = shapes_of(arguments, SingleDeviceSharding(tpus[0]))
    text = jax.jit(functools.partial(run, spec)).lower(*structs).compile().as_text()
    assert text.count('"tpu_custom_call"') == 2


def test_images_are_not_copied(tpus):
    """Those of large batches lie in memory as the kernels want them."""
    case = dict(size=7, batch=128, channels=116, features=58, regions=8, experts=8)
    spec, *arguments = draw(6, **case, dtype=jnp.bfloat16)
    structs = shapes_of(arguments, SingleDeviceSharding(tpus[0]))
    program = jax.jit(functools.partial(run, spec)).lower(*structs).compile()
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* (?:copy|transpose)\(", program.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in copied]
    assert max(sizes, default=0) <= arguments[1].bank.size


def test_the_banks_gradient_is_the_only_message_under_shard_map(tpus):
    case = dict(size=2, batch=8 * 128, channels=8, features=8, regions=2, experts=2)
    spec, *arguments = draw(7, **case, dtype=jnp.bfloat16)
    by_batch, whole = PartitionSpec("data"), PartitionSpec()
    shardings = (by_batch, Mixture(by_batch, whole), by_batch, by_batch)

    def of_device(x, mixture, guide, dy):
        mixture = varying_like(mixture, x)
        y, dx, dmixture, scores = run(spec, x, mixture, guide, dy)
        dbank = jax.lax.psum(dmixture.bank, "data")
        return y, dx, dmixture._replace(bank=dbank), scores

    mesh = Mesh(np.array(tpus), ("data",))
    results = (by_batch, by_batch, Mixture(by_batch, whole), by_batch)
    over_devices = jax.shard_map(of_device, mesh=mesh, in_specs=shardings, out_specs=results)
    program = jax.jit(over_devices).lower(*shapes_of(arguments)).compile()
    assert program.as_text().count('"tpu_custom_call"') == 2
    assert messages(program) == [("all-reduce", 1)]
