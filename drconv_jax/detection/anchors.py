"""Anchors: boxes of a few sizes and shapes at every position of every feature map."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Anchors:
    """The anchors of a pyramid of feature maps (Lin et al., FPN, CVPR 2017, Section 4.1).

    Attributes:
      sizes: of each level's anchors, square roots of their areas, in pixels.
      aspect_ratios: of heights to widths, for every size.
    """

    sizes: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def at_a_position(self) -> tuple[int, ...]:
        """Anchors at each position, by level."""
        return tuple(len(self.aspect_ratios) * len(sizes) for sizes in self.sizes)

    def cell(self, level: int) -> Float[np.ndarray, "anchors 4"]:
        """A level's anchors about the origin, in whole pixels; by ratio, then by size."""
        heights = np.sqrt(np.asarray(self.aspect_ratios, np.float32))
        sizes = np.asarray(self.sizes[level], np.float32)
        height = (heights[:, None] * sizes).ravel()
        width = ((1 / heights)[:, None] * sizes).ravel()
        return np.round(np.stack([-width, -height, width, height], axis=1) / 2)

    def __call__(
        self, image: tuple[int, int], maps: Sequence[tuple[int, int]]
    ) -> tuple[Float[np.ndarray, "_ 4"], ...]:
        """The anchors of every level, by row, column and `cell`.

        Args:
          image: height and width of the images as they are fed to the network, padding included.
          maps: heights and widths of the feature maps.

        Raises:
          ValueError: there is another number of maps than of levels.
        """
        if len(maps) != len(self.sizes):
            raise ValueError(
                f"sizes must have an entry for each of the {len(maps)} feature maps, got "
                f"{len(self.sizes)}."
            )
        levels = []
        for level, (height, width) in enumerate(maps):
            y = np.arange(height, dtype=np.float32) * (image[0] // height)
            x = np.arange(width, dtype=np.float32) * (image[1] // width)
            rows, columns = np.meshgrid(y, x, indexing="ij")
            corners = np.stack([columns, rows, columns, rows], axis=-1)[:, :, None]
            levels.append((corners + self.cell(level)).reshape(-1, 4))
        # Of numpy: XLA would compute them itself while it compiles, which took it a minute.
        return tuple(levels)
