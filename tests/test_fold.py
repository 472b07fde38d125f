import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from drconv_jax import DRConv
from drconv_jax.fold import fold_batch_norm
from drconv_jax.models import MobileFaceNet, ShuffleNetV2

X = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
DR = functools.partial(DRConv, regions=3)
EXPERTS = functools.partial(DRConv, regions=3, filter_generator="experts", use_bias=True)


def drawn(model):
    """Variables as after some training: no norm is the identity."""
    variables = jax.jit(model.init)(jax.random.key(1), X)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            leaf * jax.random.uniform(k, leaf.shape, minval=0.7, maxval=1.4)
            + (0.1 * jax.random.uniform(k, leaf.shape) if leaf.ndim == 1 else 0)
            for leaf, k in zip(leaves, keys, strict=True)
        ],
    )


@pytest.mark.parametrize(
    "model",
    [
        ShuffleNetV2(num_classes=5, width=0.1, blocks=(1, 1, 1), conv=DR, guide_regions=3),
        ShuffleNetV2(
            num_classes=5,
            width=0.1,
            blocks=(1, 1, 1),
            conv=functools.partial(DRConv, regions=3, filter_generator="experts"),
        ),
        MobileFaceNet(embedding_size=8, width=0.25, blocks=(1, 1, 1, 1), conv=DR),
    ],
    ids=["shared guide", "own guides", "facenet"],
)
def test_a_network_without_its_norms_computes_the_same(model):
    variables = drawn(model)
    folded = fold_batch_norm(model, variables, (1, 32, 32, 3))
    assert not jax.tree.leaves(folded.variables.get("batch_stats", {}))
    expected = jax.jit(model.apply)(variables, X)
    y = jax.jit(folded.apply)(folded.variables, X)
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max())


class Net(nn.Module):
    conv: nn.Module
    also_read: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        y = self.conv(x)
        z = nn.BatchNorm(use_running_average=not train, epsilon=1e-3)(y)
        return z + y if self.also_read else z


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv(4, (3, 3), strides=2),
        nn.Conv(6, (3, 3), feature_group_count=3, use_bias=False),
        nn.Dense(5),
        nn.ConvLocal(4, (3, 3)),
        DRConv(4, (3, 3), regions=3),
        EXPERTS(4, (3, 3)),
        EXPERTS(6, (3, 3), feature_group_count=3, strides=2),
    ],
    ids=["strides", "groups", "dense", "local", "pooled", "experts", "experts in groups"],
)
def test_every_kind_of_convolution(conv):
    model = Net(conv)
    variables = drawn(model)
    folded = fold_batch_norm(model, variables, X.shape)
    assert list(folded.norms) == [("BatchNorm_0",)]
    expected = model.apply(variables, X)
    y = folded.apply(folded.variables, X)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def test_a_norm_whose_input_is_read_elsewhere_stays():
    model = Net(nn.Conv(4, (3, 3)), also_read=True)
    variables = drawn(model)
    folded = fold_batch_norm(model, variables, X.shape)
    assert not folded.norms
    np.testing.assert_array_equal(folded.apply(folded.variables, X), model.apply(variables, X))


def test_no_training():
    model = Net(nn.Conv(4, (3, 3)))
    variables = drawn(model)
    with pytest.raises(ValueError, match="train must be False to fold"):
        fold_batch_norm(model, variables, X.shape, train=True)
    folded = fold_batch_norm(model, variables, X.shape)
    with pytest.raises(ValueError, match="train must be False for a network with folded"):
        folded.apply(folded.variables, X, train=True)
