import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from drconv_jax import DRConv
from drconv_jax.cost import PUBLISHED, main, multiply_adds, parameters
from drconv_jax.models import BlockGuide, ShuffleNetV2, create_model, list_models
from experiments.runtime import dry_run

# Published with torchvision's weights, to the last parameter.
TORCHVISION = {
    "mobilenet_v2_x1_0": 3_504_872,
    "shufflenet_v2_x0_5": 1_366_792,
    "shufflenet_v2_x1_0": 2_278_604,
    "shufflenet_v2_x1_5": 3_503_624,
    "shufflenet_v2_x2_0": 7_393_996,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    model, size = create_model(name), 112 if "facenet" in name else 224
    published_multiply_adds, published_parameters = PUBLISHED[name]
    count = multiply_adds(model, (1, size, size, 3)).total / 1e6
    assert count == pytest.approx(published_multiply_adds, rel=0.02)
    if published_parameters is not None:
        count = parameters(model, (1, size, size, 3)).total
        if name in TORCHVISION:
            assert count == TORCHVISION[name]
        # MobileNetV2's paper says 3.4 M for what its public weights have 3.50 M of.
        if name != "mobilenet_v2_x1_0":  # the others are in millions, some to one decimal
            near = pytest.approx(published_parameters, rel=0.02)
            assert count / 1e6 == near or round(count / 1e6, 1) == published_parameters


@pytest.mark.parametrize(
    "name",
    ["shufflenet_v2_x0_5", "mobilenet_v1_x0_25", "mobilenet_v2_x0_35", "mobilefacenet"],
)
def test_every_networks_multiply_adds_are_those_of_its_program(name):
    """And its DR twins have them too, besides what guides and filter generators take."""
    shape = (1, 112, 112, 3)
    model, x = create_model(name, num_classes=7), jnp.zeros(shape)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    operations = dry_run.arithmetic(jax.make_jaxpr(model.apply)(variables, x).jaxpr)
    count = multiply_adds(model, shape).total
    assert count == operations / 2
    for twin in {f"dr_{name}", f"dr_{name}_all"} & set(list_models()):
        layers = multiply_adds(create_model(twin, num_classes=7), shape).layers
        added = sum(n for layer, n in layers.items() if layer.endswith(("guide", "filters")))
        assert sum(layers.values()) - added == count and added > 0


def test_what_drconv_adds_to_shufflenet():
    def count(**fields):
        conv = functools.partial(DRConv, regions=8)
        model = ShuffleNetV2(width=0.5, conv=conv, guide=BlockGuide(8), **fields)
        return multiply_adds(model, (1, 224, 224, 3))

    plain = multiply_adds(ShuffleNetV2(width=0.5), (1, 224, 224, 3)).total
    both, last = count(placement="all"), count(placement="last")
    guides = sum(n for layer, n in both.layers.items() if layer.endswith("guide"))
    assert guides / 1e6 == pytest.approx(2.15, abs=0.01)
    for cost, filters in ((both, 7.5), (last, 3.7)):
        made = sum(n for layer, n in cost.layers.items() if layer.endswith("filters"))
        assert made / 1e6 == pytest.approx(filters, abs=0.06)
        assert cost.total == plain + guides + made


def test_one_layer_by_hand():
    def count(layer, **arguments):
        return dict(multiply_adds(layer, (2, 8, 8, 6), **arguments).layers)

    assert count(nn.Conv(4, (3, 3), strides=2, feature_group_count=2)) == {"": 2 * 16 * 9 * 3 * 4}
    assert count(nn.Dense(5)) == {"": 2 * 64 * 6 * 5}
    assert count(nn.ConvLocal(4, (3, 3))) == {"": 2 * 64 * 9 * 6 * 4}
    pooled = DRConv(4, (3, 3), regions=5, filter_generator="pooled")
    assert count(pooled) == {
        "": 2 * 64 * 9 * 6 * 4,
        "guide": 2 * 64 * 9 * 6 * 5,
        "filters": 2 * 9 * (6 * 25 + 25 * 6 * 4),  # pooled to 3x3: mixing, then the banks
    }
    assert count(DRConv(4, (3, 3), regions=5, experts=7), guide=jnp.zeros((2, 8, 8, 5))) == {
        "": 2 * 64 * 9 * 6 * 4,
        "filters": 2 * (6 * 5 * 7 + 5 * 7 * 9 * 6 * 4),
    }


def test_boxed_parameters_and_small_letters_count_the_same():
    init = nn.initializers.lecun_normal()
    boxed = nn.with_partitioning(init, (None, None, None, "out"))
    for layer in (nn.Conv, DRConv, functools.partial(DRConv, filter_generator="pooled")):
        one, other = (
            layer(4, (3, 3), padding=padding, kernel_init=kernel_init)
            for padding, kernel_init in (("same", boxed), ("SAME", init))
        )
        for count in (multiply_adds, parameters):
            assert count(one, (2, 8, 8, 6)) == count(other, (2, 8, 8, 6))


def test_a_plain_network_against_the_compiler():
    """XLA counts two operations a multiply-add, and norms and activations besides."""
    model, x = create_model("mobilenet_v1_x0_25"), jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    with pytest.MonkeyPatch.context() as patch:  # XLA's own depthwise convolution, counted as such
        patch.setattr("drconv_jax.fast_cpu.conv_general_dilated", jax.lax.conv_general_dilated)
        compiled = jax.jit(model.apply).lower(variables, x).compile()
    flops = compiled.cost_analysis()["flops"]
    assert flops / 2 == pytest.approx(multiply_adds(model, x.shape).total, rel=0.25)


def test_an_unknown_layer_with_a_kernel():
    class Strange(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("kernel", nn.initializers.ones, ())

    with pytest.raises(ValueError, match="the model has a Strange with a kernel"):
        multiply_adds(Strange(), (1, 4))


def test_the_table(capsys, monkeypatch):
    names = ["shufflenet_v2_x0_5", "dr_shufflenet_v2_x0_5", "dr_shufflenet_v2_x0_5_all"]
    assert set(names) | set(PUBLISHED) <= set(list_models())
    monkeypatch.setattr("drconv_jax.models.list_models", lambda task: names)
    main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert list(rows) == names
    assert rows["shufflenet_v2_x0_5"] == ["40.5", "41", "1.37", "1.4"]
    assert rows["dr_shufflenet_v2_x0_5"][:2] == ["46.4", "46"]
    assert rows["dr_shufflenet_v2_x0_5_all"][0] == "50.1"
