import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from drconv_jax import DRConv
from experiments.classification.task import Classification
from experiments.runtime import dry_run
from experiments.runtime.errors import UserError
from experiments.runtime.recipes import Recipe

pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")


@pytest.fixture(autouse=True)
def standard_promotion():  # optax's
    with jax.numpy_dtype_promotion("standard"):
        yield


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(16, (3, 3), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = DRConv(32, (1, 1), regions=4)(x)
        return nn.Dense(1000)(nn.relu(nn.Dense(512)(x.mean((1, 2)))))


def compile_step(topology, fsdp=1, **options):
    task, recipe = Classification(Net(), 16, crops=True, flips=True), Recipe(**options)
    return dry_run.compile_step(task, recipe, topology, chip_batch=8, fsdp=fsdp)


def total(report, kind, large):
    return sum(
        c.bytes * c.times
        for c in report.collectives
        if c.kind == kind and (c.bytes >= dry_run.LARGE) == large
    )


@pytest.mark.parametrize(
    "few,many,chips", [("v5e:2x4", "v5e:16x16", 256), ("v5p:2x2x2", "v5p:8x8x16", 1024)]
)
def test_a_chip_does_the_same_in_a_pod_of_8_and_of_many(few, many, chips):
    few, many = compile_step(few), compile_step(many)
    assert (few.chips, many.chips) == (8, chips) and few.images == many.images == 8
    for quantity in ("arithmetic", "flops", "bytes", "memory"):
        assert getattr(many, quantity) == pytest.approx(getattr(few, quantity), rel=0.05), quantity
    for report in (few, many):
        assert {c.kind for c in report.collectives} == {"all-reduce"}
        # The gradients, once, and what batch norm and the metrics sum.
        large, small = (total(report, "all-reduce", size) for size in (True, False))
        assert 4 * report.parameters * 0.95 < large <= 4 * report.parameters * 1.01
        assert small < 4096


def test_parts_of_a_batch_reduce_their_gradients_once():
    report = compile_step("v5e:2x4", accumulate=4)
    assert {c.kind for c in report.collectives} == {"all-reduce"}
    times = {
        size: {c.times for c in report.collectives if (c.bytes >= dry_run.LARGE) == size}
        for size in (True, False)
    }
    assert times[True] == {1} and 4 in times[False]  # batch norm sees the parts one by one
    assert total(report, "all-reduce", True) <= 4 * report.parameters * 1.01


def test_parts_of_parameters_are_gathered_and_nothing_else_is():
    report = compile_step("v5e:2x4", fsdp=4)
    split = 512 * 1000 + 32 * 512  # the kernels that are worth it
    gathered = sum(total(report, "all-gather", large) for large in (True, False))
    assert 2 * split <= gathered <= 4 * split  # in bfloat16, if the compiler sees that it does
    assert {c.kind for c in report.collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}


def convolve(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)


def test_arithmetic_by_hand():
    def program(x, kernel, matrix):
        x = convolve(x, kernel)
        matrix, _ = jax.lax.scan(lambda m, _: (m @ m, None), matrix, length=7)
        return jax.lax.cond(x.sum() > 0, lambda m: m @ m @ m, lambda m: m, matrix)

    shapes = [jnp.zeros(shape) for shape in ((2, 8, 8, 3), (3, 3, 3, 5), (10, 10))]
    convolution, product = 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3), 2 * 10**3
    jaxpr = jax.make_jaxpr(program)(*shapes).jaxpr
    assert dry_run.arithmetic(jaxpr) == convolution + (7 + 2) * product

    gradients = jax.grad(lambda *arguments: convolve(*arguments).sum(), (0, 1))
    jaxpr = jax.make_jaxpr(gradients)(*shapes[:2]).jaxpr
    assert dry_run.arithmetic(jaxpr) == 3 * convolution  # forward, for the input, for the kernel


def test_arithmetic_of_a_drconv_by_hand():
    """On a mesh of TPUs: all experts at every position, and three times that with gradients."""
    layer = DRConv(6, (1, 1), regions=3, experts=4, use_bias=False)
    x = jnp.zeros((2, 5, 5, 7))
    variables = layer.init(jax.random.key(0), x)
    experts, guide, mixing = 2 * 50 * 4 * 7 * 6, 2 * 50 * 7 * 3, 2 * 2 * 7 * 3 * 4
    forward = jax.make_jaxpr(layer.apply)(variables, x).jaxpr
    assert dry_run.arithmetic(forward) == experts + guide + mixing
    loss = lambda variables, x: layer.apply(variables, x).sum()  # noqa: E731
    gradients = jax.make_jaxpr(jax.grad(loss, (0, 1)))(variables, x).jaxpr
    assert dry_run.arithmetic(gradients) == 4 * experts + 3 * (guide + mixing)


def test_messages_in_loops_and_in_pieces():
    hlo = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], f32[100])) -> (s32[], f32[100]) {
  %r = (f32[100]{0:T(128)}, bf16[2,3]{1,0}) all-reduce(%x, %y), channel_id=1, to_apply=%sum, \
metadata={op_name="jit(step)/norm" stack_frame_id=1}
}

%condition (p: (s32[], f32[100])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%piece (p: f32[4]) -> f32[8] {
  %g = f32[8]{0} all-gather(%p), channel_id=2, metadata={op_name="jit(step)/gather"}
}

ENTRY %main (p: f32[4]) -> f32[8] {
  %w = (s32[], f32[100]) while(%t), condition=%condition, body=%body
  %f = f32[8] fusion(%p), kind=kCustom, calls=%piece
  ROOT %h = f32[8]{0} all-gather(%p), channel_id=2, metadata={op_name="jit(step)/gather"}
}
""".replace("\\\n", "")
    assert dry_run.collectives(hlo) == (
        dry_run.Collective("all-reduce", 5, 412, 2, "jit(step)/norm"),
        dry_run.Collective("all-gather", 1, 32, 1, "jit(step)/gather"),
    )


def test_the_command(tmp_path):
    size = ["--model.blocks", "1", "1", "1", "--model.conv", "standard", "--image-size", "16"]
    where = ["--topology", "v5e:2x2", "--train.batch-size", "5", "--run-dir", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "experiments.classification", "--dry-run", *size, *where],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    (report,) = json.loads((tmp_path / "dry_run.json").read_text())
    assert report["topology"] == "v5e:2x2" and report["chips"] == 4 and report["images"] == 2
    for line in (
        "chips",
        "arithmetic, Gflop",
        "memory at the peak",
        "large all-reduces",
        "compile",
    ):
        assert line in result.stdout
    assert "1 a step: jit(step)/" in result.stdout
    said = "the batch of 5 does not divide among the 4 chips of v5e:2x2: this is for one of 8, 2 on"
    assert said in result.stdout


@pytest.mark.parametrize(
    "options,chips,chip_batch,batch",
    [
        ({"batch_size": 64}, 256, None, 256),
        ({"batch_size": 1024}, 256, None, 1024),
        ({"batch_size": 1000, "accumulate": 3}, 8, None, 1008),
        ({"batch_size": 64, "accumulate": 4}, 8, 12, 96),
    ],
)
def test_the_batch_of_a_dry_run(options, chips, chip_batch, batch):
    assert dry_run.batch_of(Recipe(**options), chips, chip_batch) == batch


def test_a_chips_batch_that_does_not_divide():
    with pytest.raises(UserError, match="--chip-batch must be a multiple of .* is 4, got 6"):
        dry_run.batch_of(Recipe(accumulate=4), 8, 6)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(dry_run.tpu, "compiler_is_installed", lambda: False)
    with pytest.raises(UserError, match=r"needs libtpu, .* with pip install '.\[tpu\]'"):
        compile_step("v5e:2x4")


@pytest.mark.parametrize(
    "topology,options,message",
    [
        ("v5e:3x77", {}, '--topology: "v5e:3x77" is none'),
        ("v5e:2x4", {"fsdp": 3}, "--fsdp must divide the 8 devices, got 3"),
    ],
)
def test_what_cannot_be_compiled(topology, options, message):
    fsdp = options.pop("fsdp", 1)
    with pytest.raises(UserError, match=message):
        dry_run.compile_step(Classification(Net(), 16), Recipe(**options), topology, fsdp=fsdp)
