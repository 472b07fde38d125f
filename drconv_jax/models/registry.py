"""Networks by name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from flax import linen as nn

from drconv_jax.linen import DRConv
from drconv_jax.models.embedding import EmbeddingNetwork
from drconv_jax.models.mobilefacenet import MobileFaceNet
from drconv_jax.models.mobilenet_v1 import MobileNetV1
from drconv_jax.models.mobilenet_v2 import MobileNetV2
from drconv_jax.models.parts import BlockGuide
from drconv_jax.models.shufflenet_v2 import ShuffleNetV2

_REGIONS = 8  # the DRConv paper's m
_WIDTHS: Mapping[str, tuple[type[nn.Module], tuple[float, ...]]] = {
    "mobilenet_v1": (MobileNetV1, (0.25, 0.5, 0.75, 1.0)),
    "mobilenet_v2": (MobileNetV2, (0.35, 0.5, 0.75, 1.0, 1.4)),
    "shufflenet_v2": (ShuffleNetV2, (0.5, 1.0, 1.5, 2.0)),
}


# With the whole stride of a classifier, too little is left of a face.
_STEM_OF_FACES: Mapping[str, int | tuple[int, int]] = {
    "mobilenet_v2": 1,
    "shufflenet_v2": (1, 2),
}


@functools.cache
def _networks() -> dict[str, Callable[..., nn.Module]]:
    from drconv_jax import detection  # here, because detectors are made of networks

    plain: dict[str, Callable[..., nn.Module]] = {
        f"{family}_x{width}".replace(".", "_"): functools.partial(network, width=width)
        for family, (network, widths) in _WIDTHS.items()
        for width in widths
    }
    plain["mobilefacenet"] = MobileFaceNet
    dynamic: dict[str, Callable[..., nn.Module]] = {}
    for name, network in plain.items():
        dr = functools.partial(
            network, conv=functools.partial(DRConv, regions=_REGIONS), guide=BlockGuide()
        )
        if name.startswith("mobilenet_v1"):  # has one 1x1 convolution in a block
            dynamic[f"dr_{name}"] = dr
        else:
            dynamic[f"dr_{name}"] = functools.partial(dr, placement="last")
            dynamic[f"dr_{name}_all"] = functools.partial(dr, placement="all")
    detectors: dict[str, Callable[..., nn.Module]] = {}
    faces: dict[str, Callable[..., nn.Module]] = {}
    for name, network in (plain | dynamic).items():
        family = name.removeprefix("dr_")
        if family.startswith(tuple(_STEM_OF_FACES)):
            faces[f"{name}_face"] = functools.partial(_embedding_network, network)
        for kind, detector in (
            ("fasterrcnn", detection.FasterRCNN),
            ("maskrcnn", detection.MaskRCNN),
        ):
            if not family.startswith("mobilefacenet"):  # whose head takes one size of images
                prefix = name.removesuffix(family)
                detectors[f"{prefix}{kind}_{family}_fpn"] = functools.partial(
                    _detector, detector, network
                )
    return plain | dynamic | detectors | faces


def _detector(
    detector: type[nn.Module], network: Callable[..., nn.Module], **fields: Any
) -> nn.Module:
    """A detector; of its fields, those that it does not have are the backbone's."""
    own = {field.name for field in dataclasses.fields(detector)}
    backbone = network(
        num_classes=None,
        **{name: value for name, value in fields.items() if name not in own or name == "dtype"},
    )
    return detector(backbone, **{name: v for name, v in fields.items() if name in own})


def _embedding_network(network: Callable[..., nn.Module], **fields: Any) -> nn.Module:
    """A network with the head for faces; fields that this does not have are the network's."""
    own = {name: fields.pop(name) for name in ("embedding_size",) if name in fields}
    backbone = network(num_classes=None, **fields)
    if "stem_strides" not in fields:
        family = next(f for f in _STEM_OF_FACES if isinstance(backbone, _WIDTHS[f][0]))
        backbone = backbone.clone(stem_strides=_STEM_OF_FACES[family])
    return EmbeddingNetwork(backbone, dtype=fields.get("dtype"), **own)


def list_models(
    task: Literal["classification", "detection", "faces"] | None = None,
) -> list[str]:
    """The names that `create_model` takes, all of them or those of networks for one task.

    Networks have the widths of their papers. With "dr_" before it, the last 1x1 convolution of a
    block is a DRConv with 8 regions and the block's guide, which gives the DRConv paper's 46 M
    multiply-adds for "dr_shufflenet_v2_x0_5"; with "_all" behind it too, all of a block's 1x1
    convolutions are, as in the authors' released code. "maskrcnn_shufflenet_v2_x1_0_fpn" and
    "fasterrcnn_..." are detectors on a feature pyramid over the network of that name, plain or, as
    in "dr_maskrcnn_shufflenet_v2_x1_0_fpn", with DRConv; their num_classes is without background,
    and fields that a detector does not have are its backbone's. "mobilefacenet" and
    "shufflenet_v2_x0_5_face" give embeddings of faces; in the latter, the strides of the stem are
    half of the network's own, for images of 112x112 pixels.
    """
    return [name for name in _networks() if task is None or task in _tasks_of(name)]


def _tasks_of(name: str) -> tuple[str, ...]:
    if name.endswith("_fpn"):
        return ("detection",)
    if name.endswith("_face"):
        return ("faces",)
    return ("classification", "faces") if "mobilefacenet" in name else ("classification",)


def create_model(name: str, **fields: Any) -> nn.Module:
    """A network by its name.

    Example::

      >>> from drconv_jax.models import create_model
      >>> create_model("dr_shufflenet_v2_x0_5", num_classes=10).width
      0.5

    Args:
      name: one of `list_models()`.
      **fields: of the network, such as num_classes, in place of those that the name stands for.

    Raises:
      ValueError: there is no network of that name.
    """
    networks = _networks()
    if name not in networks:
        near = difflib.get_close_matches(name, networks, n=3, cutoff=0.0)
        raise ValueError(f'there is no model "{name}"; the nearest names are {", ".join(near)}.')
    return networks[name](**fields)
