"""Weights from public PyTorch implementations, as variables of the Flax modules here, and back.

Every module has a table that says, for every array it needs, the foreign name and how its values
are laid out there: `drconv` for the layer, `networks` for whole networks, `detection` for
detectors. Importing is nothing but renaming and transposing, so gradients import the same way as
weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from drconv_jax.detection import FasterRCNN
from drconv_jax.interop.detection import entries_of_detector
from drconv_jax.interop.drconv import entries_of_drconv
from drconv_jax.interop.entries import (
    Entry,
    arrays_of,
    check_names,
    converted,
    converted_back,
    prefix_of,
)
from drconv_jax.interop.networks import NETWORKS, entries_of_network
from drconv_jax.linen import DRConv

StateDict = Mapping[str, Any]


def import_torch(module: nn.Module, state_dict: StateDict) -> dict[str, Any]:
    """Flax variables for `module` from a PyTorch state dict of the same network.

    Known layers: `DRConv` with filter_generator="pooled" from the names of
    shallowtoil/DRConv-PyTorch's `DRConv2d`, which has no bias after the region convolution
    (use_bias=False); `DRConv` with "experts" from megvii-research/DRConv's `DRConv`. The latter's
    guide comes from a mask network of its own, without bias: its `masknet.weight` becomes the
    layer's guide convolution where the state dict has it, and is not needed where every call gives
    a guide.

    Known networks, plain ones of any width and number of blocks: `ShuffleNetV2` and `MobileNetV2`
    from torchvision, `MobileNetV1` from timm, `MobileFaceNet` from InsightFace (arcface_torch), and
    the DR-ShuffleNetV2 of megvii-research/DRConv as `ShuffleNetV2(layout="megvii",
    conv=functools.partial(DRConv, regions=8, filter_generator="experts"),
    guide=BlockGuide(8))`.

    Known detectors: `FasterRCNN` and `MaskRCNN` from torchvision's of these names, with its
    `BackboneWithFPN` over a plain network of those above.

    Args:
      module: the Flax module that the weights are for.
      state_dict: PyTorch names to floating-point arrays of any width (tensors, or anything that
        `np.asarray` takes). A checkpoint that holds a state dict as its entry "state_dict", "model"
        or the like will do, and so will one whose names all begin with a prefix, as "module." of
        DistributedDataParallel and "_orig_mod." of torch.compile; a warning says what was left out.

    Returns:
      Variables as `module.init` lays them out, in the dtypes that it gives them.

    Raises:
      TypeError: no table is known for this kind of module, or `state_dict` is none.
      ValueError: entries are missing, unexpected, misshapen or not floating-point; the message
        lists all of them.
    """
    table = next((t for kind, t in _TABLES.items() if isinstance(module, kind)), None)
    if table is None:
        known = ", ".join(kind.__name__ for kind in _TABLES)
        raise TypeError(f"module must be one of {known}, got {type(module).__name__}.")
    arrays = arrays_of(state_dict)
    entries = table(module, arrays)
    if prefix := prefix_of(arrays, entries):
        warnings.warn(f'All names begin with "{prefix}", which is left out.', stacklevel=2)
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
        entries = table(module, arrays)
    check_names(entries, arrays)
    flat = {entry.path: converted(entry, arrays[entry.name]) for entry in entries}
    return unflatten_dict(flat)


def export_torch(detector: FasterRCNN, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of torchvision's detector of the same network: `import_torch` backwards.

    Args:
      detector: a plain one, as `import_torch` takes.
      variables: of it. Other trees of the same shapes, as gradients, are exported alike.

    Returns:
      Arrays by torchvision's names, in the dtypes of the variables, and without the counts of
      batches that batch norms have there (`num_batches_tracked`).

    Raises:
      ValueError: torchvision has no such network.
    """
    flat = flatten_dict(variables)
    return {
        entry.name: converted_back(entry, flat[entry.path])
        for entry in entries_of_detector(detector, {})
    }


_TABLES: Mapping[type[nn.Module], Callable[[Any, Mapping[str, np.ndarray]], Sequence[Entry]]] = {
    DRConv: entries_of_drconv,
    **dict.fromkeys(NETWORKS, entries_of_network),
    FasterRCNN: entries_of_detector,
}
