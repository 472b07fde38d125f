"""What is measured: suites of cases."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.runtime.errors import UserError

Level = Literal["op", "layer", "network", "compiled"]
Suite = Literal["mark", "full", "gpu", "smoke"]
DType = Literal["float32", "bfloat16"]
ALL_REGIONS = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: everything in it is timed in the same rounds.

    Attributes:
      level: the region convolution alone, a whole layer, a network, or what compilers for
        accelerators say of a layer, which takes no clock.
      batch: samples.
      size: height and width of the input.
      in_features: channels of the input; 3 for a network.
      features: channels of the output; classes for a network.
      kernel: taps a side.
      regions: each m that is timed.
      dtype: of the computation.
      blocks: in the stages of the small network that has no name.
      network: its name in `drconv_jax.models.list_models()`; none is that small one.
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

    @property
    def label(self) -> str:
        """The case in one line, what --select looks into."""
        level = " ".join(filter(None, (self.level, self.network)))
        return f"{level} {self.shape_label} {self.dtype} m={','.join(map(str, self.regions))}"

    @property
    def shape_label(self) -> str:
        """Batch, size, channels and kernel, such as 32x28x28 58-58 1x1."""
        shape = f"{self.batch}x{self.size}x{self.size} {self.in_features}-{self.features}"
        return shape if self.level == "network" else f"{shape} {self.kernel}x{self.kernel}"

    @property
    def multiply_adds(self) -> int | None:
        """Of the standard convolution that stands here, in one forward; unknown for a network."""
        if self.level == "network":
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


def _smoke() -> list[Case]:
    tiny = (2, 6, 8)
    return [
        square("op", tiny, regions=(2, 3)),
        square("op", tiny, 3, dtype="bfloat16", regions=(2,)),
        square("layer", tiny, regions=(2,)),
        Case("network", 1, 16, 3, 2, regions=(2,), blocks=(1, 1, 1)),
    ]


_SUITES = {"mark": _mark, "full": _full, "gpu": _gpu, "smoke": _smoke}


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
