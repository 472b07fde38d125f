"""What is compared, and with which recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.classification.config import ClassifierRecipe, Config
from experiments.classification.model import ModelConfig
from experiments.runtime.checkpoints import CheckpointConfig

# ShuffleNetV2 for 32 x 32 images, narrow enough to train in minutes on one core.
_CHANNELS = (4, 8, 16, 32, 128)
_NETWORK: dict[str, Any] = {
    "name": "shufflenet_v2_x0_5",
    "channels": _CHANNELS,
    "blocks": (1, 2, 1),
    "stem_strides": (1, 1),
}
# The rate is the best of 0.1 to 1.6 for nn.Conv; see docs/ablation/lessons.md.
_RECIPE = ClassifierRecipe(
    epochs=5,
    batch_size=128,
    learning_rate=0.8,
    warmup_epochs=0.5,
    weight_decay=1e-4,
    label_smoothing=0.0,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network of the study.

    Attributes:
      title: in tables.
      model: the network.
    """

    title: str
    model: ModelConfig


def _plain(title: str, **options: Any) -> Case:
    return Case(title, ModelConfig(**{**_NETWORK, **options}))


# The variants are of the network whose blocks' guides are the released code's.
def _dr(title: str, **options: Any) -> Case:
    return _plain(title, **{"conv": "drconv", "shared_guide": True, **options})


CASES: Mapping[str, Case] = {
    "plain": _plain("nn.Conv"),
    "dr": _dr("DRConv, m = 8, guides that start as grids", guide_start="grid", guide_pool=2),
    "wide": _plain("nn.Conv, as many multiply-adds", channels=(5, 8, 18, 36, 152)),
    "released-guide": _dr("DRConv, m = 8, guides as in the released code"),
    "wider": _plain("nn.Conv, as many multiply-adds", channels=(5, 10, 20, 40, 160)),
    "squares": _dr("guides of 2x2 squares", guide_pool=2),
    "m1": _plain("m = 1", conv="dynamic"),
    "m2": _dr("m = 2", regions=2),
    "m4": _dr("m = 4", regions=4),
    "m16": _dr("m = 16", regions=16),
    "own-guide": _dr("a guide for every layer", shared_guide=False),
    "guide-3x3": _dr("a 3x3 guide for every layer", shared_guide=False, guide_kernel_size=3),
    "pooled": _dr('generator "pooled", the paper\'s', filter_generator="pooled"),
    "experts": _dr('generator "experts", the released code\'s', filter_generator="experts"),
    "straight-through": _dr("straight-through backward", guide="straight-through"),
    "grid": _dr("fixed grid of regions", guide="grid"),
    "random": _dr("random regions", guide="random"),
    "local": _plain("locally connected (nn.ConvLocal)", conv="local"),
}

# The cases of each table, by its title.
TABLES: Mapping[str, tuple[str, ...]] = {
    "DRConv against its plain twin": ("plain", "dr", "wide", "released-guide", "wider"),
    "Number of regions": ("plain", "m1", "m2", "m4", "released-guide", "m16"),
    "Guide and generator": (
        "released-guide",
        "dr",
        "squares",
        "own-guide",
        "guide-3x3",
        "pooled",
        "experts",
        "straight-through",
        "grid",
        "random",
    ),
    "Other convolutions of the kind": ("released-guide", "m1", "local"),
}

# The claim itself is the first to be known.
_FIRST = TABLES["DRConv against its plain twin"]


def config_of(name: str, seed: int, data: str, epochs: int) -> Config:
    """The options of a run."""
    return Config(
        data=data,
        image_size=32,
        model=CASES[name].model,
        train=dataclasses.replace(_RECIPE, epochs=epochs, seed=seed),
        checkpoint=CheckpointConfig(keep=1),
    )


def order(names: tuple[str, ...], seeds: int) -> list[tuple[str, int]]:
    """Case and seed of all runs, in the order to do them."""
    first = [name for name in names if name in _FIRST]
    rest = [name for name in names if name not in _FIRST]
    return [(name, seed) for part in (first, rest) for seed in range(seeds) for name in part]
