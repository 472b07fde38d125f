"""Whether labels are what a classifier can be trained on; every source is checked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from experiments.runtime.errors import UserError
from experiments.runtime.sources.splits import count_of


def check_range(where: str, split: str, labels: Int[np.ndarray, count], classes: int) -> None:
    """Refuses labels that are not from 0 to classes - 1.

    Args:
      where: the source, for the error.
      split: "train" or "test", for the error.
      labels: the split's.
      classes: how many classes there are.

    Raises:
      UserError: a label is none of these.
    """
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise UserError(
            f'the {split} split of "{where}" has {count_of(len(outside), "image")} with labels as '
            f"{outside[0]}, but labels of its classes are from 0 to {classes - 1}; mend the labels "
            "or the list of classes."
        )


def check_classes(
    where: str, names: Sequence[str], labels: Mapping[str, Int[np.ndarray, count]]
) -> None:
    """Refuses splits that have not the same classes, or fewer than two.

    Args:
      where: the source, for the error.
      names: of the classes.
      labels: of the splits "train" and "test".

    Raises:
      UserError: a class is missing from one of them, or there is only one.
    """
    present = {split: set(np.unique(values).tolist()) for split, values in labels.items()}
    for split, classes in present.items():
        if not classes:
            raise UserError(f'the {split} split of "{where}" has no images.')
    if alone := present["train"] ^ present["test"]:
        label = min(alone)
        split, other = ("train", "test") if label in present["train"] else ("test", "train")
        raise UserError(
            f'class "{names[label]}" has no image in the {other} split of "{where}", it is only in '
            f"the {split} split; put images of it into the {other} split or take it out."
        )
    if len(present["train"]) < 2:
        raise UserError(f'"{where}" has one class only; a classifier needs two or more.')


def numbered(
    where: str, names: Sequence[str], labels: Mapping[str, Int[np.ndarray, count]]
) -> tuple[tuple[str, ...], dict[str, Int[np.ndarray, count]]]:
    """Checks labels, and numbers the classes that have images from 0.

    Args:
      where: the source, for errors.
      names: of the classes that the labels are places of; classes without images are left out.
      labels: of the splits "train" and "test".

    Returns:
      The names of the classes that have images, and the labels as places of them.

    Raises:
      UserError: see `check_range` and `check_classes`.
    """
    for split, values in labels.items():
        check_range(where, split, values, len(names))
    check_classes(where, names, labels)
    present = np.unique(labels["train"])
    return (
        tuple(names[label] for label in present),
        {split: np.searchsorted(present, v).astype(np.int32) for split, v in labels.items()},
    )
