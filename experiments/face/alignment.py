"""Faces brought to one place and size, by five landmarks."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

# Where InsightFace's networks (ArcFace, Deng et al., CVPR 2019) have in images of 112 x 112 pixels
# the eyes, the tip of the nose and the corners of the mouth, x and y, the image's left ones first.
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
TEMPLATE.flags.writeable = False
_WIDTH = 112  # of the template's image
# Landmarks lie on a line whose spread across it is at most this share of that along it.
_FLAT = 1e-3

Landmarks = Float[np.ndarray, "5 2"]
"""x and y in pixels: eyes, nose, corners of the mouth. The upper left pixel's centre is at 0, 0."""


class BadLandmarksError(ValueError):
    """Landmarks are not those of a face in the image; the message says why."""


def template(width: int) -> Landmarks:
    """Where landmarks belong in an image of 112 pixels in height.

    Args:
      width: 112, or 96 as SphereFace (Liu et al., CVPR 2017) has it, which is the middle of the
        wider one.
    """
    return TEMPLATE - [(_WIDTH - width) / 2, 0]


def similarity(landmarks: Landmarks, target: Landmarks) -> Float[np.ndarray, "2 3"]:
    """The rotation, scale and translation that bring landmarks nearest to others.

    It has the least sum of squared distances without reflection (Umeyama, TPAMI 1991, Equations
    40-42). In the plane these are the complex numbers w = c z + t, whose least squares are linear.

    Args:
      landmarks: what is brought.
      target: whereto.

    Returns:
      The matrix M with (x', y') = M (x, y, 1), in float64.

    Raises:
      BadLandmarksError: the landmarks are not finite, or lie in one point or on one line.
    """
    if not np.isfinite(landmarks).all():
        raise BadLandmarksError("its landmarks are not all numbers")
    centred = landmarks - landmarks.mean(axis=0)
    longest, shortest = np.linalg.svd(centred, compute_uv=False)
    if shortest <= _FLAT * max(longest, 1):
        raise BadLandmarksError("its landmarks lie on one line or in one point")
    z, w = landmarks @ [1, 1j], target @ [1, 1j]
    c = np.vdot(z - z.mean(), w - w.mean()) / np.vdot(z - z.mean(), z - z.mean())
    t = w.mean() - c * z.mean()
    return np.array([[c.real, -c.imag, t.real], [c.imag, c.real, t.imag]])


def warped(
    image: UInt8[np.ndarray, "height width channels"],
    matrix: Float[np.ndarray, "2 3"],
    height: int,
    width: int,
) -> Float[np.ndarray, "{height} {width} channels"]:
    """An image moved by a matrix: bilinear, and 0 beyond the image.

    Args:
      image: what is moved.
      matrix: as `similarity` returns it; pixels' centres are at whole numbers.
      height, width: of what is returned.
    """
    to = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1)
    x, y = np.moveaxis((to - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T, -1, 0)
    # A border of zeros, in which everything beyond the image lies, is what pixels mix with there.
    bordered = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    rows, columns = image.shape[:2]
    x, y = np.clip(x + 1, 0, columns + 1), np.clip(y + 1, 0, rows + 1)
    left, above = np.minimum(x.astype(int), columns), np.minimum(y.astype(int), rows)
    rightwards, downwards = (x - left)[..., None], (y - above)[..., None]

    def between(above: np.ndarray) -> np.ndarray:
        one, other = bordered[above, left], bordered[above, left + 1]
        return (1 - rightwards) * one + rightwards * other

    return (1 - downwards) * between(above) + downwards * between(above + 1)


def aligned(
    image: UInt8[np.ndarray, "height width channels"], landmarks: Landmarks, width: int
) -> UInt8[np.ndarray, "112 {width} channels"]:
    """A face brought to the template, 112 pixels in height.

    Args:
      image: with the face, upright as the landmarks are.
      landmarks: of the face.
      width: 112 or 96.

    Raises:
      BadLandmarksError: the landmarks are not finite, on one line, or outside the image.
    """
    matrix = similarity(landmarks, template(width))
    x, y = landmarks.T
    # A pixel's tolerance: some count pixels from 1.
    inside = (x >= -1) & (x <= image.shape[1]) & (y >= -1) & (y <= image.shape[0])
    if not inside.all():
        (x, y), size = landmarks[~inside][0], image.shape
        raise BadLandmarksError(
            f"its landmark {x:g}, {y:g} is outside the image of {size[1]} x {size[0]} pixels"
        )
    return np.rint(warped(image, matrix, _WIDTH, width)).astype(np.uint8)
