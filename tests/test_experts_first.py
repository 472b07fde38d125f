import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from drconv_jax import DRConv, guide_mask
from drconv_jax.geometry import Window, window_of
from drconv_jax.region_conv import experts_first
from drconv_jax.region_conv.mixture import Mixture, mix
from drconv_jax.region_conv.spec import ConvSpec


def draw(
    seed,
    *,
    kernel=(1, 1),
    size=5,
    batch=2,
    channels=4,
    features=6,
    regions=3,
    experts=5,
    groups=1,
    bank_regions=1,
    bias_regions=None,
    dtype=np.float32,
    **window_arguments,
):
    """What `forward` takes, and a cotangent."""
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    x, window = window_of(
        array(batch, *(size,) * len(kernel), channels), kernel, **window_arguments
    )
    filter = (*kernel, channels // groups, features)
    mixture = Mixture(
        weights=array(batch, regions, *(1,) * len(kernel), experts),
        bank=array(bank_regions, experts, *filter),
        bias=array(bias_regions, *filter) if bias_regions else None,
    )
    out = window.output_shape(x.shape[1:-1])
    guide = array(batch, *out, regions).astype(jnp.float32)
    return ConvSpec(window, groups, None), x, mixture, guide, array(batch, *out, features)


def run(spec, x, mixture, guide, dy):
    """y, dx, the gradient of the mixture, and the scores."""
    y = experts_first.forward(spec, x, mixture, guide)
    return y, *experts_first.backward(spec, x, mixture, guide, y, dy)


def definition(spec, x, mixture, guide, dy):
    """As `run`, of every sample's filters and by JAX's own gradients."""
    spatial = "DHW"[: x.ndim - 2]

    def convolve(sample, filter):
        return jax.lax.conv_general_dilated(
            sample[None],
            filter,
            spec.window.strides,
            spec.window.padding,
            rhs_dilation=spec.window.dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=spec.groups,
        )[0]

    def everywhere(x, mixture):
        return jax.vmap(jax.vmap(convolve, (None, 0), -2))(x, mix(mixture))

    def chosen(x, mixture):
        mask = guide_mask(guide).astype(x.dtype)
        return (everywhere(x, mixture) * mask[..., None]).sum(-2)

    y, pull = jax.vjp(chosen, x, mixture)
    return y, *pull(dy), (everywhere(x, mixture) * dy[..., None, :]).sum(-1)


def assert_agree(ours, expected, tolerance):
    """To the largest entry of each array."""
    for (path, a), b in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        atol = tolerance * np.abs(b).max(initial=1e-30)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@st.composite
def cases(choose):
    """Keywords of `draw`: any convolution of 1 to 3 dimensions."""
    rank, groups = choose(st.integers(1, 3)), choose(st.sampled_from([1, 1, 2, 3]))
    regions = choose(st.sampled_from([1, 2, 8]))
    return dict(
        seed=choose(st.integers(0, 2**20)),
        kernel=tuple(choose(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))),
        batch=choose(st.integers(1, 3)),
        regions=regions,
        experts=choose(st.sampled_from([1, 3, 8])),
        groups=groups,
        channels=groups * choose(st.integers(1, 3)),
        features=groups * choose(st.integers(1, 8)),
        bank_regions=choose(st.sampled_from([1, regions])),
        bias_regions=choose(st.sampled_from([None, 1, regions])),
        strides=choose(st.integers(1, 2)),
        kernel_dilation=choose(st.integers(1, 2)),
        padding=choose(st.sampled_from(["SAME", "VALID", "CIRCULAR", ((0, 2),) * rank])),
    )


@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=cases())
def test_agrees_with_the_definition(case):
    with jax.enable_x64(True):
        arguments = draw(**case, dtype=np.float64)
        ours, expected = (
            jax.jit(functools.partial(f, arguments[0]))(*arguments[1:]) for f in (run, definition)
        )
        assert_agree(ours, expected, 1e-13)


@pytest.mark.parametrize(
    "case",
    [
        dict(channels=58, features=30, size=9, regions=8, experts=8),
        dict(channels=33, features=17, size=4, regions=33, experts=33),
        dict(kernel=(3, 3), channels=20, features=12, size=6, bias_regions=1),
    ],
    ids=["odd", "many", "3x3"],
)
@pytest.mark.parametrize("dtype,tolerance", [(np.float32, 2e-6), (jnp.bfloat16, 2**-6)])
def test_wide_layers_agree(case, dtype, tolerance):
    spec, *arguments = draw(1, **case, dtype=dtype)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), arguments)
    ours = jax.jit(functools.partial(run, spec))(*arguments)
    assert_agree(ours, jax.jit(functools.partial(definition, spec))(*exact), tolerance)
    y, dx, dmixture, scores = ours
    assert all(a.dtype == dtype for a in (y, dx, *jax.tree.leaves(dmixture)))
    assert scores.dtype == np.float32


def test_bfloat16_sums_in_float32():
    """384 halves are 192; summed in bfloat16 they are 128, where a half more is lost."""
    spec = ConvSpec(Window((1,), (1,), ((0, 0),), (1,)), 1, None)
    low = functools.partial(jnp.full, dtype=jnp.bfloat16)
    mixture = Mixture(low((1, 1, 1, 1), 1.0), low((1, 1, 1, 384, 384), 1.0))
    x = low((1, 384, 384), 0.5)
    y, dx, dmixture, scores = run(spec, x, mixture, jnp.zeros((1, 384, 1)), x)
    np.testing.assert_array_equal(y, low(y.shape, 192.0))
    np.testing.assert_array_equal(dx, low(dx.shape, 192.0))
    np.testing.assert_array_equal(dmixture.bank, low(mixture.bank.shape, 96.0))
    np.testing.assert_array_equal(scores, jnp.full(scores.shape, 384 * 96.0))


@pytest.mark.parametrize("kernel", [(3, 2), (2,)])
def test_experts_along_an_axis_are_experts_as_features(kernel):
    """What is compiled for TPUs, and what elsewhere."""
    spec, x, mixture, _, _ = draw(
        2, kernel=kernel, groups=2, strides=2, kernel_dilation=2, padding=((0, 1),) * len(kernel)
    )

    def outputs_and_gradients(outputs):
        y, pull = jax.vjp(functools.partial(outputs, spec), x, mixture.bank[0])
        return y, pull(jnp.cos(y))

    along_an_axis = outputs_and_gradients(experts_first._outputs_along_an_axis)
    as_features = outputs_and_gradients(experts_first._outputs_as_features)
    assert_agree(along_an_axis, as_features, 1e-6)


def test_a_weight_that_is_not_finite_stays_in_its_region():
    spec, x, mixture, guide, dy = draw(3)
    guide = guide.at[..., 1].set(-100.0)
    spoiled = mixture._replace(weights=mixture.weights.at[:, 1].set(jnp.nan))
    y, dx, dmixture, _ = run(spec, x, spoiled, guide, dy)
    expected = run(spec, x, mixture, guide, dy)
    assert_agree((y, dx, dmixture), expected[:3], 1e-6)


def test_weights_of_taps_are_declined():
    spec, x, mixture, guide, _ = draw(4)
    experts_first.supports(spec, x, mixture, guide)
    of_taps = mixture._replace(weights=jnp.ones((2, 3, 3, 3, 5)))
    with pytest.raises(NotImplementedError, match="all taps share"):
        experts_first.supports(spec, x, of_taps, guide)


def messages(compiled):
    """The collectives of a program, and how many arrays each is about."""
    found = re.findall(
        r"= (.*) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    return [(kind, len(re.findall(r"\w\[", results))) for results, kind in found]


def over(mesh, arguments):
    """`run`'s arguments but the first, the batch parted among the devices and the bank on all."""
    x, mixture, guide, dy = arguments
    by_batch, whole = (
        NamedSharding(mesh, PartitionSpec("data")),
        NamedSharding(mesh, PartitionSpec()),
    )
    place = lambda array, sharding: jax.ShapeDtypeStruct(  # noqa: E731
        array.shape, array.dtype, sharding=sharding
    )
    mixture = Mixture(place(mixture.weights, by_batch), place(mixture.bank, whole))
    return (place(x, by_batch), mixture, *(place(a, by_batch) for a in (guide, dy)))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["pointwise", "3x3"])
def test_the_sum_of_the_banks_gradient_is_the_only_message(kernel):
    """Under `jit` on a mesh, which learns of the mesh from its arguments alone."""
    spec, *arguments = draw(5, kernel=kernel, batch=8)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    program = jax.jit(functools.partial(run, spec)).lower(*over(mesh, arguments)).compile()
    assert messages(program) == [("all-reduce", 1)]
    placed = jax.device_put(tuple(arguments), program.input_shardings[0])
    assert_agree(program(*placed), run(spec, *arguments), 2e-6)


@pytest.fixture(scope="module")
def tpus():
    """The devices of eight TPUs v5e, to compile for."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        # Compiling takes no TPU, so that other processes, such as another worker, may do it too.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    return topology.devices


def test_the_same_on_tpus(tpus):
    spec, *arguments = draw(6, batch=8, size=7, channels=58, features=58, dtype=jnp.bfloat16)
    mesh = Mesh(np.array(tpus), ("data",))
    lowered = jax.jit(functools.partial(run, spec)).lower(*over(mesh, arguments))
    assert messages(lowered.compile()) == [("all-reduce", 1)]


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_layer_on_a_mesh_of_tpus(tpus, axis_type, kernel):
    """Under plain `jit`, experts first is what runs, and parameters' gradients are all it sends."""
    mesh = Mesh(np.array(tpus), ("data",), axis_types=(axis_type,))
    layer = DRConv(6, (kernel, kernel), regions=3, use_bias=False)
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    x = jax.ShapeDtypeStruct((16, 5, 5, 4), jnp.float32, sharding=by_batch)
    variables = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros(x.shape)),
    )

    def gradients(variables, x):
        dvariables, dx = jax.grad(lambda *a: jnp.square(layer.apply(*a)).sum(), (0, 1))(
            variables, x
        )
        return jax.lax.with_sharding_constraint(dvariables, whole), dx

    lowered = jax.jit(gradients, out_shardings=(whole, by_batch)).trace(variables, x).lower()
    assert "tpu_custom_call" not in lowered.as_text() and "while" not in lowered.as_text()
    sent = messages(lowered.compile())
    assert {kind for kind, _ in sent} == {"all-reduce"}
    # What regions share and what each adds have gradients of one sum.
    assert sum(count for _, count in sent) <= len(jax.tree.leaves(variables))


def bytes_accessed(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    # What is not an argument or a result is in the fast memory, or is not stored at all.
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**20
    return compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize(
    "kernel,batch,size,channels", [((1, 1), 128, 14, 116), ((3, 3), 32, 28, 64)]
)
def test_bytes_and_memory_on_tpu(tpus, kernel, batch, size, channels):
    """Those of a convolution, and at most 0.7 times as many for all else."""
    pixels, filter = (batch, size, size), (*kernel, channels, channels)
    array = functools.partial(
        jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=SingleDeviceSharding(tpus[0])
    )
    x, guide = array((*pixels, channels)), array((*pixels, 8), dtype=jnp.float32)
    mixture = Mixture(array((batch, 8, 1, 1, 8)), array((1, 8, *filter)))
    padding = tuple(((k - 1) // 2, k // 2) for k in kernel)
    spec = ConvSpec(Window(kernel, (1, 1), padding, (1, 1)), 1, None)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def convolve_with_gradients(x, kernel, dy):
        y, pull = jax.vjp(convolve, x, kernel)
        return y, *pull(dy)

    forward = functools.partial(experts_first.forward, spec)
    assert bytes_accessed(forward, x, mixture, guide) <= 1.7 * bytes_accessed(
        convolve, x, array(filter)
    )
    if kernel == (1, 1):  # the other's takes half a minute to compile
        assert bytes_accessed(functools.partial(run, spec), x, mixture, guide, x) <= (
            1.7 * bytes_accessed(convolve_with_gradients, x, array(filter), x)
        )
