"""The native kernels, called directly: values, gradients, what they decline, malformed calls."""

import pytest

from drconv_jax import native
from drconv_jax.geometry import Window
from drconv_jax.region_conv.spec import ConvSpec

pytestmark = pytest.mark.skipif(
    isinstance(native._library, str), reason="the package has no native kernels"
)


def spec_of(kernel, strides=1, padding=((0, 0), (0, 0)), dilation=1, groups=1):
    rank = len(kernel)
    return ConvSpec(
        Window(kernel, (strides,) * rank, padding[:rank], (dilation,) * rank), groups, None
    )
