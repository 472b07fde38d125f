"""Writes a data set to ArrayRecord files, which pods read from network storage.

Encoded images are copied as they are, in an order drawn at random, so that any range of records has
samples of all classes. OUT gets classes.json and {train,test}-00000-of-00016.arrayrecord and so
on, in place of those that were there; experiments.classification reads them with --data
arrayrecord:OUT. A record is a line of JSON, {"name": ..., "label": ...}, and the encoded image.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import tyro
from rich.progress import track

from experiments.runtime import commands, data, sources
from experiments.runtime.errors import UserError, reason


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a data set to ArrayRecord files, which pods read from network storage."""

    source: Annotated[str, tyro.conf.Positional]
    """folder:PATH, hf:NAME_OR_PATH or arrayrecord:PATH, as --data of experiments.classification."""
    out: tyro.conf.Positional[commands.Path]
    """The folder to write."""
    per_file: int = 10_000
    """Samples in a file."""
    seed: int = 0
    """Of the order."""

    def __post_init__(self) -> None:
        if self.per_file < 1:
            raise UserError(f"--per-file must be at least 1, got {self.per_file}.")


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(Arguments, prog="python -m experiments.convert", description=__doc__)
        dataset = data.on_disk(arguments.source, "SOURCE")
        for line in dataset.left_out:
            print(f"left out: {line}", file=sys.stderr)
        out = arguments.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            counts = _write(dataset, arguments)
        except OSError as error:
            raise UserError(f'"{out}" cannot be written: {reason(error)}.') from None
        print(
            f"{counts['train']:,} training and {counts['test']:,} test images in "
            f"{len(dataset.classes)} classes; see {out}"
        )


def _write(dataset: sources.Dataset, arguments: Arguments) -> dict[str, int]:
    """Writes both splits, and says how many images of each."""
    assert not isinstance(dataset.train, sources.ArraySplit)
    assert not isinstance(dataset.test, sources.ArraySplit)
    splits = {"train": dataset.train, "test": dataset.test}
    written = sources.replace_records(
        splits, dataset.classes, arguments.out, arguments.per_file, arguments.seed
    )
    counts = dict.fromkeys(splits, 0)
    total = sum(map(len, splits.values()))
    for name, left_out in track(written, "writing images", total):
        if left_out is None:
            counts[name] += 1
        else:
            print(f"skipped {left_out}", file=sys.stderr)
    return counts


if __name__ == "__main__":
    main()
