"""The arithmetic of the cost model, by hand, and what it chooses."""

import jax
import jax.numpy as jnp
import pytest

from drconv_jax.region_conv import Mixture
from drconv_jax.region_conv.cost_model import (
    OPERATIONS_PER_BYTE,
    PASSES_TO_SORT,
    Cost,
    defaults,
    experts_first_cost,
    filters_first_cost,
)


def layer(batch, size, channels, *, m=8, experts=8, shared=True, kernel=1, dtype=jnp.bfloat16):
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    bank = struct(1 if shared else m, experts, kernel, kernel, channels, channels)
    mixture = Mixture(struct(batch, m, 1, 1, experts), bank)
    return struct(batch, size, size, channels), mixture, struct(batch, size, size, m)


def test_costs_by_hand():
    shapes = layer(2, 4, 3, m=5, experts=7, kernel=3)
    positions, filter_size, activations = 2 * 16, 9 * 3 * 3, 2 * 2 * 16 * 3
    assert experts_first_cost(*shapes) == Cost(
        2 * 7 * positions * filter_size, 2 * (activations + 7 * filter_size)
    )
    filters, windows = 2 * 5 * filter_size, positions * 9 * 3
    assert filters_first_cost(*shapes) == Cost(
        2 * (positions * filter_size + 7 * filters),
        2 * ((1 + PASSES_TO_SORT) * activations + 2 * (filters + windows)),
    )
    one = layer(2, 4, 3, m=1, experts=7, kernel=3)
    assert filters_first_cost(*one).bytes == 2 * (activations + 2 * (2 * filter_size + windows))
    own_banks = layer(2, 4, 3, m=5, experts=7, kernel=3, shared=False)
    assert experts_first_cost(*own_banks).operations == 2 * 35 * positions * filter_size


def test_whatever_takes_longer_counts():
    assert Cost(operations=10.0 * OPERATIONS_PER_BYTE, bytes=9.0).time == 10.0
    assert Cost(operations=10.0 * OPERATIONS_PER_BYTE, bytes=11.0).time == 11.0


EXPERTS_FIRST = ("experts_first_gpu", "experts_first_tpu", "experts_first")


@pytest.mark.parametrize(
    "platform,shapes,expected",
    [
        ("cpu", layer(32, 28, 58), ("cpu", "blocked")),
        ("tpu", layer(128, 28, 58), EXPERTS_FIRST),
        ("cuda", layer(512, 7, 232), EXPERTS_FIRST),
        ("cuda", layer(512, 28, 64, kernel=3), EXPERTS_FIRST),
        # Channels so wide that E times the arithmetic takes longer than sorting positions.
        ("tpu", layer(8, 56, 1024), ("pallas_gpu", "pallas_tpu")),
        ("cuda", layer(8, 56, 256, m=1, experts=16), ("select",)),
        ("tpu", layer(128, 28, 64, m=1, kernel=3), EXPERTS_FIRST),
        ("tpu", layer(128, 28, 58, shared=False), EXPERTS_FIRST),
        ("cuda", layer(128, 28, 58, shared=False), ("pallas_gpu", "pallas_tpu")),
    ],
)
def test_defaults(platform, shapes, expected):
    names = defaults(platform, *shapes)
    assert names[: len(expected)] == expected
    assert names[-1] in ("blocked", "select")  # which take everything


def test_filters_that_are_given():
    x, mixture, guide = layer(8, 14, 116)
    filters = jax.ShapeDtypeStruct(mixture.shape, x.dtype)
    assert defaults("cuda", x, filters, guide)[0] == "pallas_gpu"
    assert defaults("tpu", x, filters, guide)[-1] == "blocked"
