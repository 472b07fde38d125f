"""The GPU's kernels for mixtures: interpreted, lowered, compiled for a GPU that is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from drconv_jax import region_conv
from drconv_jax.geometry import window_of
from drconv_jax.guide import softmax_vjp
from drconv_jax.region_conv import experts_first_gpu as kernels
from drconv_jax.region_conv.mixture import Mixture, mix
from drconv_jax.region_conv.spec import ConvSpec
from experiments.runtime import gpu


def draw(
    kernel=(1, 1),
    *,
    size=(7, 6),
    batch=3,
    channels=5,
    features=6,
    groups=1,
    regions=3,
    experts=4,
    bias=True,
    dtype=jnp.float32,
    **window,
):
    """Keywords of `region_conv` and (x, mixture, guide features, dy) of a random case."""
    rng = np.random.default_rng(17)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    filters = (*kernel, channels // groups, features)
    x = normal(batch, *size, channels)
    _, resolved = window_of(x, kernel, **window)
    out = (batch, *resolved.output_shape(size))
    weights = normal(batch, regions, *[1] * len(kernel), experts)
    mixture = Mixture(weights, normal(1, experts, *filters), normal(1, *filters) if bias else None)
    kw = dict(window, feature_group_count=groups)
    return kw, (x, mixture, normal(*out, regions), normal(*out, features))


def run(kw, x, mixture, guide, dy, **options):
    """y and the gradients of x, the mixture and the guide features."""
    window = {name: value for name, value in kw.items() if name != "feature_group_count"}
    x, window = window_of(x, mixture.kernel_size, **window)
    spec = ConvSpec(window, kw["feature_group_count"], None)
    kernels.supports(spec, x, mixture, guide)
    y = kernels.forward(spec, x, mixture, guide, **options)
    dx, dmixture, scores = kernels.backward(spec, x, mixture, guide, y, dy, **options)
    return y, dx, dmixture, softmax_vjp(guide, scores)


def by_definition(kw, x, mixture, guide, dy):
    def convolve(x, mixture, guide):
        return region_conv(x, mix(mixture), guide, implementation="reference", **kw)

    y, vjp = jax.vjp(convolve, x, mixture, guide)
    return y, *vjp(dy)


def assert_agree(kw, arguments, tolerance):
    ours = jax.jit(functools.partial(run, kw, interpret=True))(*arguments)
    expected = jax.jit(functools.partial(by_definition, kw))(*arguments)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    "case",
    [
        dict(size=(11, 13)),
        dict(batch=2, size=(9, 9), channels=70, features=133, experts=9, regions=33, bias=False),
        dict(groups=3, channels=9, features=6, strides=2),
        dict(kernel=(3, 3), groups=2, channels=6, features=10, strides=2, kernel_dilation=2),
        dict(kernel=(4,), size=(23,), padding="VALID", strides=3, experts=1, regions=1, bias=False),
        dict(kernel=(2, 3, 2), size=(5, 4, 6), groups=5, features=15, strides=(1, 2, 3)),
    ],
    ids=lambda case: "-".join(case) or "pointwise",
)
def test_agree_with_the_definition(monkeypatch, case):
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)  # so that some have several tiles of positions
    assert_agree(*draw(**case), 2e-6)


def test_bfloat16_is_summed_in_float32(monkeypatch):
    # XLA's CPU backend has no product of bfloat16 with a float32 result; this one is equal.
    product = lambda a, b, _: jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))  # noqa: E731
    monkeypatch.setattr(kernels, "dot", product)
    assert_agree(*draw(kernel=(1, 2), experts=2, dtype=jnp.bfloat16), 1e-2)


def test_the_choice_among_equals_infinities_and_nans():
    kw, (x, mixture, guide, _) = draw(size=(2, 3), batch=1, regions=4)
    inf, nan = np.inf, np.nan
    rows = [
        [1, 2, 2, 0],
        [-inf] * 4,
        [0, inf, nan, nan],
        [0, -0.0, 0, -1],
        [nan] * 4,
        [-3, -2, -1, -2],
    ]
    guide = jnp.asarray(rows, jnp.float32).reshape(guide.shape)
    _, window = window_of(x, (1, 1))
    y = kernels.forward(ConvSpec(window, 1, None), x, mixture, guide, interpret=True)
    expected = region_conv(x, mix(mixture), guide, implementation="reference", **kw)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda x, m, g: (x, m._replace(bank=jnp.repeat(m.bank, 3, 0)), g), "all regions share"),
        (lambda x, m, g: (x, m._replace(bias=jnp.repeat(m.bias, 3, 0)), g), "all regions share"),
        (
            lambda x, m, g: (x, m._replace(weights=jnp.tile(m.weights, (1, 1, 3, 3, 1))), g),
            "all taps",
        ),
    ],
)
def test_what_is_not_done_is_declined(change, reason):
    _, (x, mixture, guide, _) = draw(kernel=(3, 3))
    x, mixture, guide = change(x, mixture, guide)
    _, window = window_of(x, (3, 3))
    with pytest.raises(NotImplementedError, match=reason):
        kernels.supports(ConvSpec(window, 1, None), x, mixture, guide)


H100 = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("case,number", [(dict(channels=33), 3), (dict(kernel=(3, 3)), 4)])
def test_lowers_for_cuda_inside_shard_map(case, number):
    kw, arguments = draw(**case, batch=8, dtype=jnp.bfloat16)
    mesh = AbstractMesh((8,), ("data",), (AxisType.Auto,), abstract_device=H100)
    data = PartitionSpec("data")

    def per_device(x, mixture, guide, dy):
        """With every device's gradient of the bank its own, as the dispatcher has it."""
        bank, bias = jax.lax.pcast((mixture.bank, mixture.bias), "data", to="varying")
        return run(kw, x, Mixture(mixture.weights, bank, bias), guide, dy)

    sharded = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(data, Mixture(data, PartitionSpec(), PartitionSpec()), data, data),
        out_specs=data,
    )
    with use_abstract_mesh(mesh):
        lowered = jax.jit(sharded).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == number


PROGRAM = """HloModule jit_run, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %exponential.1 = f32[8]{0} exponential(%p)
}

%body.2 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %value = f32[8]{0} get-tuple-element(%t), index=1
  %wrapped_add.3 = s32[] fusion(%t), kind=kLoop, calls=%fused
  %loop_fusion.2 = f32[8]{0} fusion(%value), kind=kLoop, calls=%fused
  ROOT %next = (s32[], f32[8]{0}) tuple(%wrapped_add.3, %loop_fusion.2)
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  ROOT %compare.7 = pred[] fusion(%t), kind=kLoop, calls=%fused
}

%one (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %copy.4 = f32[8]{0} copy(%a)
}

%other (a: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %cublas.1 = (f32[8]{0}, s8[64]{0}) custom-call(%x), custom_call_target="__cublas$gemm"
  %pallas_call.1 = f32[8]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", backend_config={ir = "ML\\EF", name = "_a_kernel", num_warps = 4 : i32}
  %start.0 = (f32[8]{0}, f32[8]{0}) tuple(%x, %x)
  %while.1 = (s32[], f32[8]{0}) while(%start.0), condition=%condition, body=%body.2
  ROOT %choice = f32[8]{0} conditional(%x, %x, %x), branch_computations={%one, %other}
}
"""  # noqa: E501


def test_kernels_are_named_in_the_order_of_a_program():
    assert list(gpu._kernels(PROGRAM)) == [
        "__cublas$gemm",
        "_a_kernel",
        "compare",
        "wrapped_add",
        "loop_fusion",
        "copy",
    ]


@pytest.mark.skipif(not gpu.compiler_is_installed(), reason="jax[cuda13] is not installed")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    "size,channels,kernel", [(28, 58, 1), (14, 116, 1), (7, 232, 1), (28, 64, 3)]
)
def test_memory_on_an_h100_that_is_not_there(size, channels, kernel):
    """Nothing with a factor of experts, taps or regions is stored: the mark is 1, of x and dy."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    x, guide = struct(512, size, size, channels), struct(512, size, size, 8)
    bank = struct(1, 8, kernel, kernel, channels, channels)
    mixture = Mixture(struct(512, 8, 1, 1, 8), bank, None)
    kw = dict(feature_group_count=1)
    program = gpu.compile_for_gpu(functools.partial(run, kw), x, mixture, guide, x)
    ours = [
        name
        for name in program.kernels
        if name in ("_experts_multiply_kernel", "_experts_bank_gradient_kernel")
    ]
    assert len(ours) == (3 if kernel == 1 else 4)
    assert program.temporary_bytes <= 2 * x.size * x.dtype.itemsize
