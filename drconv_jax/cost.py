"""Multiply-adds and parameters of any flax.linen module, without computing anything.

`python -m drconv_jax.cost` prints the table of all networks beside the published figures.

Counted as the papers of mobile networks count: one multiply-add is one; convolutions and dense
layers count; biases, normalization, activations and pooling do not. A DRConv counts what it does
for each sample, in three parts: `guide` (its guide convolution, unless a guide is given to it),
`filters` (the filter generator, whose small first product counts too) and the convolution itself,
which uses one filter per position and so costs what `nn.Conv` costs, whatever m is.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from drconv_jax.functional import Hyperparameters
from drconv_jax.linen import DRConv


@dataclasses.dataclass(frozen=True)
class Cost:
    """A count, in all and layer by layer.

    Attributes:
      layers: by the layer's path in the variables, as in "stage2_block0/conv1"; a DRConv has the
        parts "…/guide" and "…/filters" besides. The path of a model that is one layer is "".
    """

    layers: Mapping[str, int]

    @property
    def total(self) -> int:
        """The sum over all layers."""
        return sum(self.layers.values())

    def __str__(self) -> str:
        rows = [*self.layers.items(), ("total", self.total)]
        return "\n".join(f"{count:>15,}  {name}" for name, count in rows)


def multiply_adds(model: nn.Module, input_shape: Sequence[int], **arguments: Any) -> Cost:
    """Multiply-adds of one forward pass over an input, all of its samples.

    Example::

      >>> from drconv_jax.cost import multiply_adds
      >>> from drconv_jax.models import ShuffleNetV2
      >>> multiply_adds(ShuffleNetV2(width=0.5), (1, 224, 224, 3)).total
      40476448

    Args:
      model: any module; known are `nn.Conv`, `nn.ConvLocal`, `nn.ConvTranspose`, `nn.Dense` and
        `DRConv`, wherever they stand in it. A layer that is called twice counts twice, one under
        `nn.scan` or `nn.vmap` as often as it is traced.
      input_shape: of a float32 input, the batch included.
      arguments: more arguments of the model's call, by name.

    Returns:
      The counts, in the order in which the layers are called.

    Raises:
      ValueError: a layer with a kernel is none of those known.
    """
    layers: dict[str, int] = defaultdict(int)
    open_paths: set[tuple[str, ...]] = set()

    def count(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module, path = context.module, context.module.path
        # A subclass that calls its parent's __call__ passes here twice.
        if context.method_name != "__call__" or path in open_paths:
            return call(*args, **kwargs)
        open_paths.add(path)
        y = call(*args, **kwargs)
        open_paths.remove(path)
        params = nn.unbox(module.variables.get("params", {}))
        counter = next((c for kind, c in _COUNTERS.items() if isinstance(module, kind)), None)
        if counter is not None:
            for part, value in counter(module, params, args[0], y).items():
                layers["/".join((*path, *part))] += value
        elif hasattr(params.get("kernel"), "shape"):
            known = ", ".join(kind.__name__ for kind in _COUNTERS)
            raise ValueError(
                f"layers that can be counted are {known}; the model has a "
                f"{type(module).__name__} with a kernel at {'/'.join(path)!r}."
            )
        return y

    with nn.intercept_methods(count):
        _variables(model, input_shape, arguments)
    return Cost(dict(layers))


def parameters(model: nn.Module, input_shape: Sequence[int], **arguments: Any) -> Cost:
    """Parameters: what is trained, so norms' scales and biases count, running statistics do not.

    Args:
      model: any module.
      input_shape: of a float32 input, the batch included.
      arguments: more arguments of the model's call, by name.
    """
    layers: dict[str, int] = defaultdict(int)
    params = _variables(model, input_shape, arguments).get("params", {})
    for path, array in flatten_dict(params).items():
        layers["/".join(path[:-1])] += math.prod(array.shape)
    return Cost(dict(layers))


def _variables(
    model: nn.Module, input_shape: Sequence[int], arguments: Mapping[str, Any]
) -> Mapping[str, Any]:
    x = jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32)
    variables: Mapping[str, Any] = jax.eval_shape(
        lambda key, x: nn.unbox(model.init(key, x, **arguments)), jax.random.key(0), x
    )
    return variables


# A counter's result: multiply-adds by part of the layer; () is the layer itself.
_Parts = dict[tuple[str, ...], int]


def _kernel_at_outputs(layer: nn.Module, params: Any, x: Any, y: Any) -> _Parts:
    del layer, x
    return {(): math.prod(y.shape[:-1]) * params["kernel"].size}


def _kernel_at_inputs(layer: nn.Module, params: Any, x: Any, y: Any) -> _Parts:
    del layer, y
    return {(): math.prod(x.shape[:-1]) * params["kernel"].size}


def _local(layer: nn.ConvLocal, params: Any, x: Any, y: Any) -> _Parts:
    """The kernel has one filter, (taps x in, features), at each output position."""
    del layer, x
    return {(): y.size * params["kernel"].shape[-2]}


def _drconv(layer: DRConv, params: Any, x: Any, y: Any) -> _Parts:
    hyper = Hyperparameters.of(layer)
    kernel = hyper.kernel
    taps, samples = math.prod(kernel), math.prod(x.shape[: -len(kernel) - 1])
    positions, in_per_group = math.prod(y.shape[:-1]), x.shape[-1] // layer.feature_group_count
    parts: _Parts = {
        (): positions * taps * in_per_group * layer.features,
        ("filters",): samples * hyper.generator.multiply_adds(params["filters"], kernel),
    }
    if "guide" in params:
        parts["guide",] = positions * params["guide"]["kernel"].size
    return parts


_COUNTERS: Mapping[type[nn.Module], Callable[[Any, Any, Any, Any], _Parts]] = {
    DRConv: _drconv,
    nn.Conv: _kernel_at_outputs,
    nn.ConvLocal: _local,
    nn.ConvTranspose: _kernel_at_inputs,
    nn.Dense: _kernel_at_outputs,
}


# Millions of multiply-adds and of parameters: ShuffleNetV2 (Table 5), MobileNets (Tables 4 and 6),
# MobileNetV2 (Table 4), MobileFaceNets (Section 4), and the DRConv paper for DR-ShuffleNetV2.
PUBLISHED: Mapping[str, tuple[float | None, float | None]] = {
    "mobilenet_v1_x0_25": (41, 0.47),
    "mobilenet_v1_x1_0": (569, 4.2),
    "mobilenet_v2_x1_0": (300, 3.4),
    "shufflenet_v2_x0_5": (41, 1.4),
    "shufflenet_v2_x1_0": (146, 2.3),
    "shufflenet_v2_x1_5": (299, 3.5),
    "shufflenet_v2_x2_0": (591, 7.4),
    "mobilefacenet": (221, 0.99),
    "dr_shufflenet_v2_x0_5": (46, None),
}


def main() -> None:
    """Prints the table."""
    from drconv_jax.models import create_model, list_models

    jax.config.update("jax_platforms", "cpu")  # shapes are all that is computed
    print("Millions; images of 224x224 pixels, faces of 112x112. dr_: the last 1x1 convolution of")
    print(
        "every block is a DRConv with 8 regions; dr_..._all: all of them, as in the released code."
    )
    print(f"{'':26}{'multiply-adds':>14}{'published':>10}{'parameters':>12}{'published':>10}")
    for name in list_models("classification"):
        model, size = create_model(name), 112 if "facenet" in name else 224
        counts = [count(model, (1, size, size, 3)) for count in (multiply_adds, parameters)]
        published = PUBLISHED.get(name, (None, None))
        cells = (
            f"{count.total / 1e6:>{width}.{digits}f}{'' if figure is None else figure:>10}"
            for count, figure, width, digits in zip(
                counts, published, (14, 12), (1, 2), strict=True
            )
        )
        print(f"{name:26}" + "".join(cells))


if __name__ == "__main__":
    main()
