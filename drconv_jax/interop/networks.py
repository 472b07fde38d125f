"""Names of whole networks in torchvision, timm, InsightFace and megvii-research/DRConv.

A network's table yields its layers: the path of the Flax module and the prefix of the PyTorch one.
What arrays a layer has, and in which shapes, follows from the Flax network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.module import InterceptorContext
from flax.traverse_util import flatten_dict

from drconv_jax.filters import ExpertsGenerator
from drconv_jax.functional import Hyperparameters
from drconv_jax.interop.drconv import entry_of_experts
from drconv_jax.interop.entries import Entry, oihw_to_hwio
from drconv_jax.linen import DRConv
from drconv_jax.models import BlockGuide, MobileFaceNet, MobileNetV1, MobileNetV2, ShuffleNetV2
from drconv_jax.models.mobilenet_v1 import STAGES as STAGES_V1
from drconv_jax.models.mobilenet_v2 import STAGES as STAGES_V2

Layers = Iterator[tuple[str, str]]  # "block/layer" in Flax, "prefix" in PyTorch


def entries_of_network(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> list[Entry]:
    """What a network needs of a state dict.

    Raises:
      ValueError: the network has a layer that its public counterpart has not, such as a DRConv, or
        computes something else with the same weights.
    """
    table, stem, size_for = next(t for kind, t in NETWORKS.items() if isinstance(model, kind))
    if released := getattr(model, "layout", None) == "megvii":
        table, stem = _dr_shufflenet_v2, "conv_first.conv.weight"
    channels = arrays[stem].shape[1] if stem in arrays and arrays[stem].ndim == 4 else 3
    size = size_for(arrays)
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    strange_generators: set[str] = set()

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, DRConv):
            generator = Hyperparameters.of(module).generator
            if not isinstance(generator, ExpertsGenerator):
                strange_generators.add(f'"{module.filter_generator}"')
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
    # "mixture" has parameters of the same shapes, and another scale.
    if released and strange_generators:
        raise ValueError(
            'filter_generator must be "experts", as in the code the weights are from, got '
            f"{min(strange_generators)}."
        )
    guide = getattr(model, "guide", None)
    if released and guide is not None and guide != BlockGuide(guide.regions):
        raise ValueError(
            f"guide must be BlockGuide({guide.regions}), as in the code the weights are from, got "
            f"{guide}."
        )
    return entries_of_layers(model, variables, table(model))


def entries_of_layers(model: nn.Module, variables: Any, layers: Layers) -> list[Entry]:
    """The arrays of all layers, by the names that a table gives these.

    Args:
      model: the network, for an error.
      variables: shapes of the arrays, as `model.init` lays them out.
      layers: the table.

    Raises:
      ValueError: the network has a layer that the table has not.
    """
    flat = flatten_dict(variables)
    prefixes = {tuple(path.split("/")): prefix for path, prefix in layers}
    strangers = sorted({"/".join(path[1:-1]) for path in flat if path[1:-1] not in prefixes})
    if strangers:
        raise ValueError(
            f"{type(model).__name__} must be plain for its public weights, which have no "
            f"{', '.join(strangers[:3])}. Import them into the plain network, then start yours "
            "with drconv_jax.weights."
        )
    return [
        dataclasses.replace(_entry(path, prefixes[path[1:-1]], leaf.shape), dtype=leaf.dtype)
        for path, leaf in flat.items()
    ]


def _entry(path: tuple[str, ...], prefix: str, shape: tuple[int, ...]) -> Entry:
    if path[-2] == "filters":
        return entry_of_experts(path, f"{prefix}.", shape)
    suffix = _SUFFIXES[path[-1]]
    if path[-1] != "kernel":
        return Entry(path, f"{prefix}.{suffix}", shape, lambda values: values)
    *kernel, inputs, outputs = shape
    return Entry(path, f"{prefix}.{suffix}", (outputs, inputs, *kernel), oihw_to_hwio)


_SUFFIXES = {
    "kernel": "weight",
    "scale": "weight",
    "negative_slope": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _shufflenet_v2(model: ShuffleNetV2) -> Layers:
    """torchvision.models.shufflenetv2."""
    yield from (("stem_conv", "conv1.0"), ("stem_norm", "conv1.1"))
    for stage, count in enumerate(model.blocks, start=2):
        for block in range(count):
            ours, theirs = f"stage{stage}_block{block}", f"stage{stage}.{block}"
            main = ("conv1", "norm1", "", "depthwise", "depthwise_norm", "conv2", "norm2")
            for i, name in enumerate(main):
                if name:
                    yield f"{ours}/{name}", f"{theirs}.branch2.{i}"
            if block == 0:
                for i, name in enumerate(("depthwise", "depthwise_norm", "conv", "norm")):
                    yield f"{ours}/shortcut_{name}", f"{theirs}.branch1.{i}"
    yield from (("head_conv", "conv5.0"), ("head_norm", "conv5.1"), ("classifier", "fc"))


def _dr_shufflenet_v2(model: ShuffleNetV2) -> Layers:
    """megvii-research/DRConv, ShuffleNetV2_pytorch.py."""
    parts = {"conv1": "conva_right", "depthwise": "convb_right", "conv2": "convc_right"}
    shortcut = {"shortcut_depthwise": "conva_left", "shortcut_conv": "convb_left"}
    norms = {"conv1": "norm1", "conv2": "norm2", "shortcut_conv": "shortcut_norm"}
    for end, theirs in (("stem", "conv_first"), ("head", "conv_last")):
        yield from ((f"{end}_conv", f"{theirs}.conv"), (f"{end}_norm", f"{theirs}.bn"))
    yield "classifier", "classifier"
    for stage, count in enumerate(model.blocks, start=1):
        for block in range(count):
            ours, theirs = f"stage{stage + 1}_block{block}", f"stage{stage}_block{block + 1}"
            yield f"{ours}/guide", f"{theirs}.masknet"
            for name, part in (parts | (shortcut if block == 0 else {})).items():
                dynamic = "/filters" if name in ("conv1", "conv2") else ""
                yield f"{ours}/{name}{dynamic}", f"{theirs}.{part}.conv"
                yield f"{ours}/{norms.get(name, f'{name}_norm')}", f"{theirs}.{part}.bn"


def _mobilenet_v2(model: MobileNetV2) -> Layers:
    """torchvision.models.mobilenetv2."""
    del model
    yield from (("stem_conv", "features.0.0"), ("stem_norm", "features.0.1"))
    number = 0
    for stage, (expansion, _, count, _) in enumerate(STAGES_V2):
        for block in range(count):
            number += 1
            ours, theirs = f"stage{stage}_block{block}", f"features.{number}.conv"
            inside = ("expand", "depthwise") if expansion > 1 else ("depthwise",)
            for i, name in enumerate(inside):
                yield f"{ours}/{name}", f"{theirs}.{i}.0"
                yield f"{ours}/{name}_norm", f"{theirs}.{i}.1"
            yield f"{ours}/project", f"{theirs}.{len(inside)}"
            yield f"{ours}/project_norm", f"{theirs}.{len(inside) + 1}"
    head = f"features.{number + 1}"
    yield from (("head_conv", f"{head}.0"), ("head_norm", f"{head}.1"))
    yield "classifier", "classifier.1"


def _mobilenet_v1(model: MobileNetV1) -> Layers:
    """timm.models.mobilenetv1_100 and its like."""
    del model
    yield from (("stem_conv", "conv_stem"), ("stem_norm", "bn1"), ("classifier", "classifier"))
    for stage, (_, _, count) in enumerate(STAGES_V1):
        for block in range(count):
            ours, theirs = f"stage{stage}_block{block}", f"blocks.{stage}.{block}"
            for i, (name, part) in enumerate((("depthwise", "conv_dw"), ("pointwise", "conv_pw"))):
                yield f"{ours}/{name}", f"{theirs}.{part}"
                yield f"{ours}/{name}_norm", f"{theirs}.bn{i + 1}"


def _mobilefacenet(model: MobileFaceNet) -> Layers:
    """InsightFace, arcface_torch/backbones/mobilefacenet.py."""

    def conv_norm_prelu(ours: str, theirs: str) -> Layers:
        conv = ours if ours.endswith("depthwise") or "/" in ours else f"{ours}_conv"
        for i, name in enumerate((conv, f"{ours}_norm", f"{ours}_prelu")):
            yield name, f"{theirs}.layers.{i}"

    def block(ours: str, theirs: str) -> Layers:
        yield from conv_norm_prelu(f"{ours}/expand", f"{theirs}.layers.0")
        yield from conv_norm_prelu(f"{ours}/depthwise", f"{theirs}.layers.1")
        yield f"{ours}/project", f"{theirs}.layers.2.layers.0"
        yield f"{ours}/project_norm", f"{theirs}.layers.2.layers.1"

    in_stem, *in_stages = model.blocks
    yield from conv_norm_prelu("stem", "layers.0")
    if in_stem == 1:
        yield from conv_norm_prelu("stem_depthwise", "layers.1")
    else:
        for i in range(in_stem):
            yield from block(f"stage0_block{i}", f"layers.1.layers.{i}")
    for stage, count in enumerate(in_stages, start=1):
        yield from block(f"stage{stage}_down", f"layers.{2 * stage}")
        for i in range(count):
            yield from block(f"stage{stage}_block{i}", f"layers.{2 * stage + 1}.layers.{i}")
    yield from conv_norm_prelu("head", "conv_sep")
    yield "global_depthwise", "features.layers.0.layers.0"
    yield "global_depthwise_norm", "features.layers.0.layers.1"
    yield from (("embedding", "features.layers.2"), ("embedding_norm", "features.layers.3"))


def _size_of_faces(arrays: Mapping[str, np.ndarray]) -> int:
    """The input's size is 16 times that of the last, global convolution."""
    kernel = arrays.get("features.layers.0.layers.0.weight")
    return 16 * (7 if kernel is None else int(kernel.shape[-1]))


NETWORKS: Mapping[
    type[nn.Module],
    tuple[Callable[[Any], Layers], str, Callable[[Mapping[str, np.ndarray]], int]],
] = {
    ShuffleNetV2: (_shufflenet_v2, "conv1.0.weight", lambda arrays: 32),
    MobileNetV2: (_mobilenet_v2, "features.0.0.weight", lambda arrays: 32),
    MobileNetV1: (_mobilenet_v1, "conv_stem.weight", lambda arrays: 32),
    MobileFaceNet: (_mobilefacenet, "layers.0.layers.0.weight", _size_of_faces),
}
