import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from drconv_jax import guide_mask, native, region_conv
from drconv_jax.geometry import window_of
from drconv_jax.region_conv import IMPLEMENTATIONS

AVAILABLE = [  # on a CPU, with filters that are given
    name
    for name, support in IMPLEMENTATIONS.items()
    if "cpu" in support.platforms and name != "experts_first"
    if name != "cpu" or native.available()
]
ALL = [name for name in AVAILABLE if name != "select"]  # which JAX differentiates by itself
FAST = [name for name in ALL if name != "reference"]
PALLAS = ["pallas_tpu", "pallas_gpu"]  # which a CPU interprets
IN_PARTS = [name for name in ALL if IMPLEMENTATIONS[name].partitioned != "no"]
FLOAT64 = [name for name in FAST if name not in PALLAS]


needs_kernel = pytest.mark.skipif(
    not (native.available() or shutil.which("c++") or shutil.which("g++")),
    reason="there is no C++ compiler",
)


@needs_kernel
def test_the_native_kernel_was_built():
    assert native.available()


def test_a_missing_kernel_is_said_once(monkeypatch):
    arguments, kw, _ = draw(23, kernel=1)
    monkeypatch.setattr(
        native, "_library", "drconv_jax was installed without its native CPU kernels"
    )
    native.available.cache_clear()
    try:
        with pytest.warns(UserWarning, match="without its native CPU kernels.*slower") as said:
            y = region_conv(*arguments, **kw)
            region_conv(*arguments, **kw)
        assert len(said) == 1
    finally:
        native.available.cache_clear()
    expected = region_conv(*arguments, implementation="reference", **kw)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def draw(
    seed,
    *,
    rank=2,
    batch=2,
    channels=4,
    features=6,
    regions=3,
    groups=1,
    size=7,
    kernel=3,
    strides=1,
    padding="SAME",
    dilation=1,
    dtype=np.float32,
):
    """Arguments, keywords and a cotangent of a random case."""
    rng = np.random.default_rng(seed)
    kernel = (kernel,) * rank if isinstance(kernel, int) else kernel
    size = (size,) * rank if isinstance(size, int) else size
    kw = dict(
        strides=strides, padding=padding, kernel_dilation=dilation, feature_group_count=groups
    )
    x = jnp.asarray(rng.normal(size=(batch, *size, channels)), dtype)
    filters = rng.normal(size=(batch, regions, *kernel, channels // groups, features))
    padded, window = window_of(
        x, kernel, strides=strides, padding=padding, kernel_dilation=dilation
    )
    out = window.output_shape(padded.shape[1:-1])
    guide = rng.normal(size=(batch, *out, regions))
    cotangent = rng.normal(size=(batch, *out, features))
    as_jax = functools.partial(jnp.asarray, dtype=dtype)
    return (x, as_jax(filters), as_jax(guide)), kw, as_jax(cotangent)


def outputs_and_gradients(implementation, arguments, kw, cotangent):
    @jax.jit
    def run(*arguments):
        y, vjp = jax.vjp(
            lambda *a: region_conv(*a, implementation=implementation, **kw), *arguments
        )
        return y, *vjp(cotangent)

    return run(*arguments)


def assert_agree(ours, expected, tolerance):
    for name, a, b in zip(("y", "dx", "dfilters", "dguide"), ours, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = np.abs(b).max(initial=1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)


def test_the_definition_against_a_loop_over_positions():
    (x, filters, guide), kw, _ = draw(
        0, channels=4, features=6, groups=2, strides=2, dilation=2, padding=((1, 2), (0, 3))
    )
    y = np.asarray(region_conv(x, filters, guide, implementation="reference", **kw))
    padded = np.pad(np.asarray(x), ((0, 0), (1, 2), (0, 3), (0, 0)))
    index = np.asarray(guide).argmax(-1)
    for b, i, j in np.ndindex(*index.shape):
        window = padded[b, 2 * i : 2 * i + 5 : 2, 2 * j : 2 * j + 5 : 2]
        filter = np.asarray(filters)[b, index[b, i, j]]
        halves = [
            np.tensordot(window[..., 2 * g : 2 * g + 2], filter[..., 3 * g : 3 * g + 3], 3)
            for g in range(2)
        ]
        np.testing.assert_allclose(y[b, i, j], np.concatenate(halves), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *FLOAT64, None])
def test_guide_gradient_by_hand(implementation):
    """Eq. 7-8 written out with loops, in float64."""
    with jax.enable_x64(True):
        (x, filters, guide), kw, dy = draw(1, size=4, batch=1, kernel=1, dtype=np.float64)
        arrays = [np.asarray(a) for a in (x, filters, guide, dy)]
        _, dx, dfilters, dguide = outputs_and_gradients(implementation, (x, filters, guide), kw, dy)
        x, filters, guide, dy = (a[0] for a in arrays)
        expected_dx, expected_dfilters = np.zeros_like(x), np.zeros_like(filters)
        for p in np.ndindex(4, 4):
            g = np.array([dy[p] @ (x[p] @ filters[j, 0, 0]) for j in range(3)])
            s = np.exp(guide[p]) / np.exp(guide[p]).sum()
            np.testing.assert_allclose(dguide[0][p], s * (g - (s * g).sum()), rtol=1e-10)
            j = guide[p].argmax()
            expected_dx[p] = filters[j, 0, 0] @ dy[p]
            expected_dfilters[j, 0, 0] += np.outer(x[p], dy[p])
        np.testing.assert_allclose(dx[0], expected_dx, rtol=1e-10)
        np.testing.assert_allclose(dfilters[0], expected_dfilters, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", FLOAT64)
def test_gradients_of_input_and_filters_by_finite_differences(implementation, no_shape_checks):
    with jax.enable_x64(True):
        (x, filters, guide), kw, _ = draw(2, size=4, strides=2, dtype=np.float64)
        function = lambda x, w: region_conv(  # noqa: E731
            jnp.asarray(x), jnp.asarray(w), guide, implementation=implementation, **kw
        )
        check_grads(function, (x, filters), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def straight_through(x, filters, guide, kw):
    """An independent definition, all of whose derivatives are JAX's own."""

    def convolve(x, w):
        return nn.Conv(
            w.shape[-1], w.shape[:-2], use_bias=False, **{**kw, "strides": (kw["strides"],) * 2}
        ).apply({"params": {"kernel": w}}, x[None])[0]

    everywhere = jax.vmap(jax.vmap(convolve, (None, 0)))(x, filters)
    soft = jax.nn.softmax(guide)
    mask = jax.nn.one_hot(guide.argmax(-1), guide.shape[-1]) + soft - jax.lax.stop_gradient(soft)
    return jnp.einsum("bmhwf,bhwm->bhwf", everywhere, mask)


def derivatives(function, arguments, directions):
    """First and second derivatives of a function of arrays, by every pair of modes."""
    value = lambda *a: jnp.sin(function(*a)).sum()  # noqa: E731
    gradient = jax.grad(value, (0, 1, 2))
    along = lambda *a: jax.jvp(value, a, directions)[1]  # noqa: E731
    slope = lambda *a: sum((g * d).sum() for g, d in zip(gradient(*a), directions, strict=True))  # noqa: E731
    looped = lambda *a: jax.lax.scan(lambda c, _: (c + value(*a), None), 0.0, length=2)[0]  # noqa: E731
    twice = lambda a: jnp.stack([a, -2 * a])  # noqa: E731
    return {
        "forward": along(*arguments),
        "forward of reverse": jax.jvp(gradient, arguments, directions)[1],
        "reverse of reverse": jax.grad(slope, (0, 1, 2))(*arguments),
        "reverse of forward": jax.grad(along, (0, 1, 2))(*arguments),
        "forward of reverse in a loop": jax.jvp(jax.grad(looped, (0, 1, 2)), arguments, directions)[
            1
        ],
        "vmap of forward of reverse": jax.vmap(lambda *d: jax.jvp(gradient, arguments, d)[1])(
            *map(twice, directions)
        ),
        "forward of vmap": jax.jvp(
            jax.vmap(function, (0, None, 0)),
            (twice(arguments[0]), arguments[1], twice(arguments[2])),
            (twice(directions[0]), directions[1], twice(directions[2])),
        )[1],
    }


@pytest.mark.parametrize("implementation", [*AVAILABLE, None])
def test_second_derivatives_and_forward_mode(implementation):
    arguments, kw, _ = draw(24, size=4, strides=2)
    rng = np.random.default_rng(0)
    directions = tuple(jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in arguments)
    chosen = lambda *a: region_conv(*a, implementation=implementation, **kw)  # noqa: E731
    plain = lambda *a: straight_through(*a, kw)  # noqa: E731
    ours, expected = (
        jax.jit(functools.partial(derivatives, function))(arguments, directions)
        for function in (chosen, plain)
    )
    for name in expected:
        for a, b in zip(*map(jax.tree.leaves, (ours[name], expected[name])), strict=True):
            scale = float(np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("implementation", [*AVAILABLE, None])
@pytest.mark.parametrize("padding", [0, 1])
def test_an_empty_axis_gives_what_a_convolution_gives(implementation, padding):
    x, filters = jnp.ones((2, 0, 5, 4)), jnp.ones((2, 3, 1, 1, 4, 6))
    out = jax.eval_shape(nn.Conv(6, (1, 1), padding=padding).init_with_output, jax.random.key(0), x)
    guide = jnp.zeros((*out[0].shape[:-1], 3))

    def run(x, filters, guide):
        return region_conv(x, filters, guide, padding=padding, implementation=implementation)

    y, pull = jax.vjp(run, x, filters, guide)
    np.testing.assert_array_equal(y, np.zeros(out[0].shape))
    for gradient, argument in zip(pull(jnp.ones_like(y)), (x, filters, guide), strict=True):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(argument))


def test_the_definition_is_the_mask_composed_with_a_dense_select():
    (x, filters, guide), kw, dy = draw(3, kernel=1)

    def composed(x, filters, guide):
        everywhere = jnp.einsum("bhwi,bmuvio->bhwmo", x, filters)
        return (guide_mask(guide)[..., None] * everywhere).sum(-2)

    y, vjp = jax.vjp(composed, x, filters, guide)
    for implementation in [*ALL, None]:
        ours = outputs_and_gradients(implementation, (x, filters, guide), kw, dy)
        assert_agree(ours, (y, *vjp(dy)), 1e-5)


@st.composite
def cases(choose, **fixed):
    """Keywords of `draw`: any convolution of 1 to 3 dimensions."""
    rank = choose(st.integers(1, 3))
    groups = choose(st.sampled_from([1, 1, 2, 3]))
    case = dict(
        seed=choose(st.integers(0, 2**20)),
        rank=rank,
        batch=choose(st.integers(1, 3)),
        regions=choose(st.sampled_from([1, 2, 3, 8, 33] if rank < 3 else [1, 2, 8])),
        groups=groups,
        channels=groups * choose(st.integers(1, 3)),
        features=groups * choose(st.integers(1, 8)),
        size=5,
        kernel=choose(st.integers(1, 3)),
        strides=choose(st.integers(1, 2)),
        dilation=choose(st.integers(1, 2)),
        padding=choose(
            st.sampled_from(["SAME", "VALID", "CIRCULAR", "REFLECT", 1, ((0, 2),) * rank])
        ),
    )
    return case | fixed


def few(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True)


@pytest.mark.parametrize("implementation", [*FAST, "select"])
@few(10)
@given(case=cases())
def test_every_implementation_agrees_with_the_definition(implementation, case):
    arguments, kw, dy = draw(**case)
    expected = outputs_and_gradients("reference", arguments, kw, dy)
    assert_agree(outputs_and_gradients(implementation, arguments, kw, dy), expected, 2e-6)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    "channels,features,size,regions,kernel",
    [(58, 58, 9, 8, 1), (33, 17, 16, 33, 1), (60, 45, 6, 8, 3)],
)
def test_wide_layers_agree(implementation, channels, features, size, regions, kernel):
    arguments, kw, dy = draw(
        4, channels=channels, features=features, size=size, regions=regions, kernel=kernel
    )
    expected = outputs_and_gradients("reference", arguments, kw, dy)
    assert_agree(outputs_and_gradients(implementation, arguments, kw, dy), expected, 2e-6)


@pytest.mark.parametrize("implementation", FAST)
def test_bfloat16_accumulates_in_float32(implementation):
    arguments, kw, dy = draw(5, channels=64, features=16, kernel=1)
    low = [a.astype(jnp.bfloat16) for a in (*arguments[:2], dy)]
    exact = [a.astype(jnp.float32) for a in low]
    ours = outputs_and_gradients(implementation, (*low[:2], arguments[2]), kw, low[2])
    expected = outputs_and_gradients("reference", (*exact[:2], arguments[2]), kw, exact[2])
    for a, b in zip(ours[:3], expected[:3], strict=True):
        assert a.dtype == jnp.bfloat16
        scale = np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=1e-5 * scale)


@pytest.mark.parametrize("implementation", [*ALL, None])
def test_empty_regions_and_one_that_takes_all(implementation):
    (x, filters, guide), kw, dy = draw(6)
    guide = guide.at[..., 1].add(100.0)
    y, _, dfilters, _ = outputs_and_gradients(implementation, (x, filters, guide), kw, dy)
    one, *_ = outputs_and_gradients(implementation, (x, filters[:, 1:2], guide[..., 1:2]), kw, dy)
    np.testing.assert_allclose(y, one, rtol=1e-5, atol=1e-5)
    assert not dfilters[:, 0].any() and not dfilters[:, 2].any() and dfilters[:, 1].all()


@pytest.mark.parametrize("implementation", [*ALL, None])
def test_nan_in_the_guide_gives_a_region_and_shows_in_its_gradient(implementation):
    (x, filters, guide), kw, dy = draw(20)
    guide = guide.at[0, 2, 3, 1].set(jnp.nan)
    y, dx, dfilters, dguide = outputs_and_gradients(implementation, (x, filters, guide), kw, dy)
    chex.assert_tree_all_finite((y, dx, dfilters))
    assert jnp.isnan(dguide[0, 2, 3]).all() and jnp.isnan(dguide).sum() == 3
    expected = region_conv(x, filters, jnp.nan_to_num(guide, nan=jnp.inf), **kw)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@few(5)
@given(case=cases(regions=1))
def test_one_region_is_a_convolution_per_sample(case):
    (x, filters, guide), kw, _ = draw(**case)
    y = region_conv(x, filters, guide, **kw)
    plain = nn.Conv(case["features"], filters.shape[2:-2], use_bias=False, **kw)
    for b in range(case["batch"]):
        alone = plain.apply({"params": {"kernel": filters[b, 0]}}, x[b])
        np.testing.assert_allclose(y[b], alone, rtol=1e-4, atol=1e-5)


@few(5)
@given(case=cases(regions=4), order=st.permutations(range(4)))
def test_permuting_regions_changes_nothing(case, order):
    (x, filters, guide), kw, dy = draw(**case)
    order = np.array(order)
    y, dx, dfilters, dguide = outputs_and_gradients(None, (x, filters, guide), kw, dy)
    permuted = outputs_and_gradients(None, (x, filters[:, order], guide[..., order]), kw, dy)
    assert_agree(permuted, (y, dx, dfilters[:, order], dguide[..., order]), 2e-6)


@few(5)
@given(case=cases(strides=1, padding="CIRCULAR"), shift=st.integers(1, 4))
def test_translation_under_circular_padding(case, shift):
    (x, filters, guide), kw, _ = draw(**case)
    axes = tuple(range(1, 1 + case["rank"]))
    y = region_conv(x, filters, guide, **kw)
    rolled = region_conv(jnp.roll(x, shift, axes), filters, jnp.roll(guide, shift, axes), **kw)
    np.testing.assert_allclose(rolled, jnp.roll(y, shift, axes), rtol=1e-5, atol=1e-5)


@few(5)
@given(case=cases(batch=3))
def test_samples_do_not_affect_each_other(case):
    arguments, kw, dy = draw(**case)
    whole = outputs_and_gradients(None, arguments, kw, dy)
    alone = outputs_and_gradients(None, tuple(a[1:2] for a in arguments), kw, dy[1:2])
    assert_agree(alone, [a[1:2] for a in whole], 2e-6)


class VariantsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_with_and_without_jit(self):
        arguments, kw, _ = draw(11)
        y = self.variant(functools.partial(region_conv, **kw))(*arguments)
        expected = region_conv(*arguments, implementation="reference", **kw)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", [*FAST, None])
def test_vmap_with_gradients(implementation):
    arguments, kw, _ = draw(12, batch=4)
    stacked = tuple(a.reshape(2, 2, *a.shape[1:]) for a in arguments)
    op = functools.partial(region_conv, implementation=implementation, **kw)

    def loss(x, filters, guide):
        return (op(x, filters, guide) ** 2).sum()

    gradient = jax.vmap(jax.grad(loss, (0, 1, 2)))(*stacked)
    expected = jax.grad(loss, (0, 1, 2))(*arguments)
    for a, b in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-4, atol=1e-4)


def test_vmap_over_filters_only():
    (x, filters, guide), kw, _ = draw(13)
    both = jnp.stack([filters, 2 * filters])
    y = jax.vmap(lambda w: region_conv(x, w, guide, **kw))(both)
    np.testing.assert_allclose(y[1], 2 * y[0], rtol=1e-5, atol=1e-6)


def test_remat_gives_the_same_gradients():
    arguments, kw, _ = draw(14)
    op = functools.partial(region_conv, **kw)
    plain = jax.grad(lambda *a: jnp.sin(op(*a)).sum(), (0, 1, 2))(*arguments)
    remat = jax.grad(lambda *a: jnp.sin(jax.checkpoint(op)(*a)).sum(), (0, 1, 2))(*arguments)
    chex.assert_trees_all_close(plain, remat, rtol=1e-6)


@pytest.mark.parametrize("implementation", [*IN_PARTS, None])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_batch_sharded_over_eight_devices_stays_there(implementation, kernel, mesh):
    assert mesh.size == 8
    arguments, kw, dy = draw(15, batch=16, kernel=kernel)
    by_batch = NamedSharding(mesh, PartitionSpec("data"))

    def run(dy, *arguments):
        y, vjp = jax.vjp(
            lambda *a: region_conv(*a, implementation=implementation, **kw), *arguments
        )
        return y, *vjp(dy)

    sharded = jax.device_put((dy, *arguments), by_batch)
    compiled = jax.jit(run).lower(*sharded).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
    ours = compiled(*sharded)
    assert all(a.sharding.is_equivalent_to(by_batch, a.ndim) for a in ours)
    assert_agree(ours, outputs_and_gradients("reference", arguments, kw, dy), 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "pallas_gpu"])
def test_what_xla_cannot_partition_says_so(implementation, mesh):
    arguments, kw, _ = draw(15, batch=16)
    sharded = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(functools.partial(region_conv, implementation=implementation, **kw))
    with pytest.raises(NotImplementedError, match=f'"{implementation}" .*use jax.shard_map'):
        run.lower(*sharded)


@pytest.mark.parametrize("implementation", ["blocked", None])
def test_arrays_that_know_nothing_of_the_mesh_around_them(implementation, mesh):
    arguments, kw, dy = draw(23)
    with jax.set_mesh(mesh):
        ours = outputs_and_gradients(implementation, arguments, kw, dy)
    assert_agree(ours, outputs_and_gradients("reference", arguments, kw, dy), 1e-5)


# Pallas' interpreter on a CPU knows no varying types; test_pallas.py compiles that for a TPU.
@pytest.mark.parametrize("implementation", [*[name for name in ALL if name not in PALLAS], None])
@pytest.mark.parametrize("other", [1, 2])
def test_inside_shard_map_with_its_types_checked(implementation, other, axis_type):
    if other > 1 and implementation not in (*IN_PARTS, None):
        pytest.skip("XLA partitions what is not mapped")
    arguments, kw, dy = draw(22, batch=8)
    devices, spec = np.array(jax.devices()).reshape(-1, other), PartitionSpec("data")
    mesh = Mesh(devices, ("data", "other"), axis_types=(axis_type,) * 2)

    def run(dy, *arguments):
        y, vjp = jax.vjp(
            lambda *a: region_conv(*a, implementation=implementation, **kw), *arguments
        )
        return y, *vjp(dy)

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"data"}, check_vma=True
    )
    ours = jax.jit(mapped)(*jax.device_put((dy, *arguments), NamedSharding(mesh, spec)))
    assert_agree(ours, outputs_and_gradients("reference", arguments, kw, dy), 1e-5)


def test_export_for_all_platforms_with_any_batch_size():
    arguments, kw, _ = draw(16)
    (batch,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in arguments]
    op = jax.jit(functools.partial(region_conv, **kw))
    exported = jax.export.export(op, platforms=["cpu", "tpu", "cuda"])(*shapes)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(loaded.call(*arguments), op(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", [*FAST, None])
def test_zero_size_batch(implementation):
    (x, filters, guide), kw, _ = draw(17)
    y = region_conv(x[:0], filters[:0], guide[:0], implementation=implementation, **kw)
    assert y.shape == (0, 7, 7, 6)


@needs_kernel
def test_names_in_turn_fall_through(monkeypatch):
    (x, filters, guide), kw, _ = draw(18, kernel=1)
    half = [a.astype(jnp.float16) for a in (x, filters)]
    with pytest.raises(NotImplementedError, match="does not compute in float16"):
        region_conv(*half, guide, implementation="cpu", **kw)
    y = region_conv(*half, guide, implementation=("cpu", "blocked"), **kw)
    expected = region_conv(x, filters, guide, **kw)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=2e-2, atol=2e-2)


def test_all_that_decline_say_why():
    (x, filters, guide), kw, _ = draw(18, kernel=1)
    half = [a.astype(jnp.float16) for a in (x, filters)]
    names = ("experts_first", "pallas_tpu")
    both = '"experts_first" .*takes a Mixture.*; "pallas_tpu" does not compute in float16'
    with pytest.raises(NotImplementedError, match=both):
        region_conv(*half, guide, implementation=names, **kw)


def test_a_program_for_another_platform():
    arguments, kw, _ = draw(18, kernel=1)
    lower = lambda name: (  # noqa: E731
        jax.jit(functools.partial(region_conv, implementation=name, **kw))
        .trace(*arguments)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    with pytest.raises(NotImplementedError, match='"cpu" runs on cpu, and .* is for tpu'):
        lower("cpu")
    assert "tpu_custom_call" in lower(("cpu", "pallas_tpu"))
    assert "custom_call" not in lower(("cpu", "blocked"))


def test_a_default_for_every_platform_in_one_program():
    arguments, kw, _ = draw(18, kernel=1)
    run = jax.jit(functools.partial(region_conv, **kw)).trace(*arguments)
    text = run.lower(lowering_platforms=("cpu", "tpu", "cuda")).as_text()
    assert all(name in text for name in ("drconv_region_conv_forward", "tpu_custom_call", "triton"))


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(x=jnp.zeros((2, 7, 7, 5))), ValueError, "but x has 5 channels"),
        (dict(x=jnp.zeros((3, 7, 7, 4))), ValueError, "batch 3"),
        (dict(x=jnp.zeros((2, 7, 7, 4), jnp.bfloat16)), TypeError, "bfloat16 and float32"),
        (dict(x=jnp.zeros((2, 4))), ValueError, "1, 2 or 3 spatial dimensions"),
        (dict(guide=jnp.zeros((2, 7, 7, 4))), ValueError, r"\(2, 7, 7, 3\).*got \(2, 7, 7, 4\)"),
        (dict(guide=jnp.zeros((2, 7, 7, 3), jnp.int32)), TypeError, "int32"),
        (dict(strides=0), ValueError, "strides must be at least 1 everywhere, got 0"),
        (dict(strides=(1, 1, 1)), ValueError, "strides must have one entry for each of the 2"),
        (dict(strides="2"), TypeError, "strides must be an integer"),
        (dict(padding="SAMES"), ValueError, "CIRCULAR.*got 'SAMES'"),
        (dict(padding=(1, 1, 1)), ValueError, "padding must have one"),
        (dict(padding=1.5), TypeError, "got 1.5"),
        (dict(padding="CAUSAL"), ValueError, "1 spatial dimension"),
        (dict(input_dilation=2), ValueError, r"input_dilation=\(2, 2\), got 'SAME'"),
        (dict(feature_group_count=4), ValueError, "divide features=6, got 4"),
        (dict(implementation="cuda"), ValueError, "got 'cuda'"),
        (
            dict(filters=jnp.zeros((2, 0, 3, 3, 4, 6)), guide=jnp.zeros((2, 7, 7, 0))),
            ValueError,
            "at least one region",
        ),
    ],
)
def test_bad_arguments(no_shape_checks, change, error, message):
    (x, filters, guide), _, _ = draw(19)
    arguments = {"x": x, "filters": filters, "guide": guide, **change}
    positional = [arguments.pop(name) for name in ("x", "filters", "guide")]
    with pytest.raises(error, match=message):
        region_conv(*positional, **arguments)
