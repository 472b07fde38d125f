"""What is measured: suites of cases."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.runtime.errors import UserError

Level = Literal["op", "layer", "network", "compiled", "roi_align", "nms", "detector"]
Suite = Literal["mark", "full", "gpu", "detection", "smoke"]
DType = Literal["float32", "bfloat16"]
ALL_REGIONS = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: everything in it is timed in the same rounds.

    Attributes:
      level: the region convolution alone, a whole layer, a network, what compilers for accelerators
        say of a layer, which takes no clock, or one of detection: RoIAlign over a pyramid,
        non-maximum suppression, a whole detector.
      batch: samples.
      size: height and width of the input; of the image that a pyramid is of.
      in_features: channels of the input; 3 for a network or detector.
      features: channels of the output; classes for a network or detector.
      kernel: taps a side, or RoIAlign's bins.
      regions: each m that is timed.
      dtype: of the computation.
      blocks: in the stages of the small network that has no name.
      network: its name in `drconv_jax.models.list_models()`; none is that small one.
      boxes: of RoIAlign and suppression, in an image.
    """

    level: Level
    batch: int
    size: int
    in_features: int
    features: int
    kernel: int = 1
    regions: tuple[int, ...] = (8,)
    dtype: DType = "float32"
    blocks: tuple[int, int, int] = (2, 2, 2)
    network: str = ""
    boxes: int = 0

    @property
    def label(self) -> str:
        """The case in one line, what --select looks into."""
        level = " ".join(filter(None, (self.level, self.network)))
        regions = f"m={','.join(map(str, self.regions))}" if self.regions else ""
        return " ".join(filter(None, (level, self.shape_label, self.dtype, regions)))

    @property
    def shape_label(self) -> str:
        """Batch, size, channels and kernel, such as 32x28x28 58-58 1x1."""
        boxes = [f"{self.boxes} boxes"] if self.boxes else []
        if self.level == "nms":
            return " ".join(boxes)
        shape = f"{self.batch}x{self.size}x{self.size} {self.in_features}-{self.features}"
        kernel = [] if self.level in ("network", "detector") else [f"{self.kernel}x{self.kernel}"]
        return " ".join([shape, *kernel, *boxes])

    @property
    def multiply_adds(self) -> int | None:
        """Of the standard convolution that stands here, in one forward; None of other cases."""
        if self.level not in ("op", "layer", "compiled"):
            return None
        taps = self.kernel**2 * self.in_features
        return self.batch * self.size**2 * taps * self.features


# (batch, size, channels): where DRConv stands in ShuffleNetV2, and one wide layer.
SHAPES = ((32, 28, 58), (32, 14, 116), (8, 56, 128), (32, 56, 24), (32, 7, 232))
KERNEL_3 = (4, 28, 64)
TPU_SHAPES = ((128, 28, 58), (128, 14, 116), (128, 7, 232))
GPU_SHAPES = ((512, 28, 58), (512, 14, 116), (512, 7, 232))
GPU_KERNEL_3 = (512, 28, 64)
NETWORK = Case("network", 32, 32, 3, 10)
CPU_NETWORKS = tuple(
    Case("network", 16, 224, 3, 1000, network=name)
    for name in ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "mobilenet_v2_x1_0")
)
GPU_NETWORK = Case("network", 256, 224, 3, 1000, dtype="bfloat16", network="shufflenet_v2_x1_0")
DETECTION = (
    Case("roi_align", 1, 320, 256, 256, 7, regions=(), boxes=512),
    Case("nms", 1, 320, 0, 0, regions=(), boxes=2000),
    Case("detector", 2, 320, 3, 80, network="maskrcnn_shufflenet_v2_x0_5_fpn"),
)


def square(level: Level, shape: tuple[int, int, int], kernel: int = 1, **fields: object) -> Case:
    """A case of (batch, size, channels) with as many features as channels."""
    batch, size, channels = shape
    return dataclasses.replace(
        Case(level, batch, size, channels, channels, kernel),
        **fields,  # type: ignore[arg-type]
    )


def _mark() -> list[Case]:
    return [
        *(square("op", shape) for shape in SHAPES),
        square("op", KERNEL_3, 3),
        square("op", SHAPES[1], regions=ALL_REGIONS),
        *(square("layer", shape) for shape in SHAPES),
        square("layer", KERNEL_3, 3),
        NETWORK,
        *CPU_NETWORKS,
        *_compiled(),
    ]


def _compiled() -> list[Case]:
    return [
        *(square("compiled", shape, dtype="bfloat16") for shape in (*TPU_SHAPES, *GPU_SHAPES)),
        square("compiled", GPU_KERNEL_3, 3, dtype="bfloat16"),
    ]


def _full() -> list[Case]:
    levels: tuple[Level, ...] = ("op", "layer")
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    sweep = [
        square(level, shape, kernel, regions=ALL_REGIONS, dtype=dtype)
        for level in levels
        for dtype in dtypes
        for kernel, shapes in ((1, SHAPES), (3, (KERNEL_3, (4, 14, 116))))
        for shape in shapes
    ]
    batches = [
        square(level, (batch, 14, 116))
        for level in levels
        for batch in (1, 8, 128)  # 32 is among the mark's
    ]
    networks = [dataclasses.replace(NETWORK, regions=ALL_REGIONS)]
    return [*_mark(), *sweep, *batches, *networks]


def _gpu() -> list[Case]:
    layers = [
        *(square("layer", shape, dtype="bfloat16") for shape in GPU_SHAPES),
        square("layer", GPU_KERNEL_3, 3, dtype="bfloat16"),
    ]
    # The most important first: the command begins no case after some minutes.
    return [
        GPU_NETWORK,
        *layers,
        *(dataclasses.replace(case, level="op") for case in layers),
        *(dataclasses.replace(case, dtype="float32") for case in layers),
    ]


def _detection() -> list[Case]:
    return list(DETECTION)


def _smoke() -> list[Case]:
    tiny = (2, 6, 8)
    return [
        square("op", tiny, regions=(2, 3)),
        square("op", tiny, 3, dtype="bfloat16", regions=(2,)),
        square("layer", tiny, regions=(2,)),
        Case("network", 1, 16, 3, 2, regions=(2,), blocks=(1, 1, 1)),
    ]


_SUITES = {"mark": _mark, "full": _full, "gpu": _gpu, "detection": _detection, "smoke": _smoke}


def suite(name: Suite, select: str = "") -> list[Case]:
    """The cases of a suite whose label contains `select`.

    Raises:
      UserError: there is none.
    """
    cases = _SUITES[name]()
    chosen = [case for case in cases if select in case.label]
    if not chosen:
        labels = "; ".join(case.label for case in cases[:6])
        raise UserError(
            f'--select: no case of the suite "{name}" contains "{select}"; cases read: {labels}.'
        )
    return chosen
