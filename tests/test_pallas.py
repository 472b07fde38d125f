"""Pallas kernels for given filters: interpreted here, compiled for TPUs, lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from test_region_conv import assert_agree, draw, outputs_and_gradients

from drconv_jax import region_conv
from drconv_jax.region_conv import pallas_tpu, triton_blocks

op = functools.partial(region_conv, implementation="pallas_tpu")


def with_gradients(x, filters, guide, dy, **kw):
    y, vjp = jax.vjp(functools.partial(op, **kw), x, filters, guide)
    return y, *vjp(dy)


def agrees_with_the_definition(implementation="pallas_tpu", **case):
    arguments, kw, dy = draw(**case)
    expected = outputs_and_gradients("reference", arguments, kw, dy)
    assert_agree(outputs_and_gradients(implementation, arguments, kw, dy), expected, 2e-6)


def test_gpu_kernels_over_several_blocks():
    case = dict(seed=30, kernel=1, channels=70, features=33, size=9, regions=4)
    agrees_with_the_definition("pallas_gpu", **case)


def test_tiles_of_positions_with_a_ragged_last_one(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "_TILE", 16)
    agrees_with_the_definition(seed=31, kernel=1, size=7, regions=4)
    agrees_with_the_definition(seed=32, groups=2, size=7, regions=4)


def test_what_is_not_done_is_passed_on():
    (x, filters, guide), kw, _ = draw(33, kernel=1)
    half = [a.astype(jnp.float16) for a in (x, filters)]
    with pytest.raises(NotImplementedError, match="does not compute in float16"):
        op(*half, guide, **kw)
    wide = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 4, 4096), (1, 8, 1, 4096, 4096))]
    with pytest.raises(NotImplementedError, match='"pallas_tpu" holds all filters .* MiB'):
        jax.eval_shape(op, *wide, jax.ShapeDtypeStruct((1, 4, 8), jnp.float32))


def over_devices(run, devices, axis_type, **options):
    data = PartitionSpec("data")
    mesh = Mesh(np.array(devices).reshape(4, 2), ("data", "other"), axis_types=(axis_type,) * 2)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=data, out_specs=data, **options)
    return jax.jit(sharded), NamedSharding(mesh, data)


def test_shard_map(axis_type):
    arguments, kw, dy = draw(34, batch=8, kernel=1, size=3)
    # Pallas' interpreter cannot check the varying axes of a kernel that loops; compilers can.
    run = functools.partial(with_gradients, **kw)
    run, sharding = over_devices(run, jax.devices(), axis_type, check_vma=False)
    ours = run(*jax.device_put((*arguments, dy), sharding))
    assert_agree(ours, outputs_and_gradients("reference", arguments, kw, dy), 1e-5)


@pytest.mark.skipif(triton_blocks.triton is None, reason="this JAX has no way to Triton")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", [dict(kernel=1, channels=33, size=11), dict(groups=2, strides=2)])
def test_lowers_for_cuda(case, dtype):
    arguments, kw, dy = draw(35, **case, dtype=dtype)
    run = jax.jit(lambda *a: outputs_and_gradients("pallas_gpu", a[:3], kw, a[3]))
    text = run.trace(*arguments, dy).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3


@pytest.fixture(scope="module")
def tpus():
    """The devices of eight TPUs v5e, to compile for."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        # Compiling takes no TPU, so that other processes, such as another worker, may do it too.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    return topology.devices


@pytest.fixture
def tpu(tpus):
    return SingleDeviceSharding(tpus[0])


def test_shard_map_on_tpu_needs_no_collective(tpus, axis_type):
    arguments, kw, dy = draw(34, batch=8, kernel=1, size=3)
    run = functools.partial(with_gradients, **kw)
    run, sharding = over_devices(run, tpus, axis_type)
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in (*arguments, dy)]
    text = run.trace(*structs).lower().compile().as_text()
    assert text.count('"tpu_custom_call"') == 2
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))


def test_shard_map_over_some_axes_leaves_a_choice_to_xla(tpus, axis_type):
    arguments, kw, _ = draw(34, batch=8, kernel=1, size=3)
    for implementation in ("pallas_tpu", ("pallas_tpu", "blocked")):
        run = functools.partial(region_conv, implementation=implementation, **kw)
        run, sharding = over_devices(run, tpus, axis_type, axis_names={"data"})
        structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
        if implementation == "pallas_tpu":
            with pytest.raises(NotImplementedError, match="use jax.shard_map over all axes"):
                run.trace(*structs).lower()
        else:
            assert "tpu_custom_call" not in run.trace(*structs).lower().as_text()


def compiled(function, sharding, *shapes, dtype=jnp.bfloat16, row_major_filters=False):
    """`function` compiled for arguments where the compiler puts them, or filters row by row.

    The compiler lays the filters (6 axes) out with the batch innermost, which a product per sample
    cannot read: they are copied first. Row by row they are read where they are.
    """

    def place(shape):
        row_major = row_major_filters and len(shape) == 6
        return Format(Layout(tuple(range(6))), sharding) if row_major else sharding

    run = jax.jit(function, in_shardings=tuple(place(shape) for shape in shapes))
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return run.trace(*structs).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "size,channels,features,kernel,groups", [(13, 58, 30, 1, 1), (7, 20, 6, 3, 2), (37, 5, 3, 1, 1)]
)
def test_compiles_for_tpu(tpu, dtype, size, channels, features, kernel, groups):
    run = functools.partial(with_gradients, feature_group_count=groups)
    image = (4, size, size)
    filters = (4, 33, kernel, kernel, channels // groups, features)
    shapes = ((*image, channels), filters, (*image, 33), (*image, features))
    assert compiled(run, tpu, *shapes, dtype=dtype).as_text().count('"tpu_custom_call"') == 2


@pytest.mark.parametrize("size,channels", [(28, 58), (14, 116), (7, 232)])
def test_bytes_and_memory_on_tpu(tpu, size, channels):
    """Bytes of the fused forward over those of a 1x1 convolution, the filters and the guide.

    The mark is 2. It holds where the filters need no copy; what is reached where they do is
    printed.
    """

    def plain(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    image, pair = (128, size, size), (1, 1, channels, channels)
    x, filters, guide = (*image, channels), (128, 8, *pair), (*image, 8)
    bytes_of = lambda c: c.cost_analysis()["bytes accessed"]  # noqa: E731
    allowed = bytes_of(compiled(plain, tpu, x, pair)) + 2 * (np.prod(filters) + np.prod(guide))
    forward = compiled(op, tpu, x, filters, guide)
    in_place = compiled(op, tpu, x, filters, guide, row_major_filters=True)
    ratios = [bytes_of(program) / allowed for program in (forward, in_place)]
    print(f"{size}x{size}x{channels}: {ratios[0]:.3f}, filters in place {ratios[1]:.3f}")
    assert ratios[1] <= 2

    all_regions = 8 * 2 * np.prod(x)
    both = compiled(with_gradients, tpu, x, filters, guide, x)
    assert temporary_bytes(in_place) < all_regions
    # Of the filters, which have a factor m themselves, a copy of each with its gradient may exist.
    copies = 3 * 2 * np.prod(filters)
    assert temporary_bytes(both) < all_regions + copies


def temporary_bytes(program):
    """At the peak, beside arguments and results, in the fast memory too."""
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return memory.peak_memory_in_bytes - held


@pytest.mark.parametrize("implementation", ["blocked", None])
def test_a_pod_of_256_needs_no_collective(implementation, axis_type):
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    arguments, kw, dy = draw(36, batch=256, size=4, regions=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        pod = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16").devices
    mesh = Mesh(np.array(pod), ("data",), axis_types=(axis_type,))
    by_batch = NamedSharding(mesh, PartitionSpec("data"))

    def run(x, filters, guide, dy):
        conv = functools.partial(region_conv, implementation=implementation, **kw)
        y, vjp = jax.vjp(conv, x, filters, guide)
        return y, *vjp(dy)

    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=by_batch) for a in (*arguments, dy)]
    compiled = jax.jit(run).trace(*structs).lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    assert all(a.is_equivalent_to(by_batch, 4) for a in compiled.output_shardings[:1])
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
