"""Writes a data set to ArrayRecord files, which pods read from network storage.

Encoded images are copied as they are, in an order drawn at random, so that any range of records has
samples of all classes. --out gets classes.json and {train,test}-00000-of-00016.arrayrecord and so
on; experiments.classification reads them with --data arrayrecord:OUT. A record is a line of JSON,
{"name": ..., "label": ...}, and the encoded image.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np
import tyro
from rich.progress import track

from experiments.runtime import commands, data, sources
from experiments.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a data set to ArrayRecord files, which pods read from network storage."""

    source: Annotated[str, tyro.conf.Positional]
    """folder:PATH or hf:NAME_OR_PATH, as --data of experiments.classification."""
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
        dataset = data.load(arguments.source, 8, hold="disk")
        out = arguments.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            _write(dataset, arguments)
        except OSError as error:
            raise UserError(f'"{out}" cannot be written: {error.strerror or error}.') from None
        print(
            f"{len(dataset.train):,} training and {len(dataset.test):,} test images in "
            f"{len(dataset.classes)} classes; see {out}"
        )


def _write(dataset: sources.Dataset, arguments: Arguments) -> None:
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        assert not isinstance(split, sources.ArraySplit)
        order = np.random.default_rng(arguments.seed).permutation(len(split)).tolist()
        written = sources.write_records(split, arguments.out / name, arguments.per_file, order)
        for _ in track(written, f"writing {name} images", len(split)):
            pass
    # Last, so that a folder that has it is whole.
    sources.write_classes(dataset.classes, arguments.out)


if __name__ == "__main__":
    main()
