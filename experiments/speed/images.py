"""Measures how many images a second one core decodes and augments: `--help` for more.

Side by side on one core, medians over rounds: Pillow's bare decoding, the random resized crop of
training and the centre crop of evaluation at 224 pixels; then the whole input pipeline, all cores.
Without --data, on crops of scikit-learn's two photographs, as large as the average image of
ImageNet (500 x 375, JPEG of quality 90).
"""

from __future__ import annotations

import dataclasses
import io
import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import tyro
from PIL import Image

from experiments.classification.feed import LabelledImages
from experiments.runtime import commands, data, images
from experiments.runtime.errors import UserError
from experiments.runtime.pipeline import Loading, Share
from experiments.runtime.sources import ArraySplit, EncodedSplit, Sample
from experiments.runtime.sources.splits import digest_of

_WIDTH, _HEIGHT, _QUALITY = 500, 375, 90


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures how many images a second one core decodes and augments."""

    data: str | None = None
    """folder:PATH, arrayrecord:PATH or hf:NAME_OR_PATH, whose training images are used."""
    images: int = 256
    """How many of them."""
    image_size: int = 224
    """Pixels a side of what is made of them."""
    rounds: int = 5
    """In each of which everything takes a turn."""

    def __post_init__(self) -> None:
        for name in ("images", "image_size", "rounds"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise UserError(f"--{option} must be at least 1, got {getattr(self, name)}.")


class _Photographs:
    """Encoded crops of scikit-learn's photographs."""

    def __init__(self, count: int):
        from sklearn.datasets import load_sample_images

        generator = np.random.default_rng(0)
        photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
        self._encoded = []
        for index in range(count):
            photograph = photographs[index % len(photographs)]
            left = int(generator.integers(photograph.width - _WIDTH + 1))
            top = int(generator.integers(photograph.height - _HEIGHT + 1))
            file = io.BytesIO()
            crop = photograph.crop((left, top, left + _WIDTH, top + _HEIGHT))
            crop.save(file, "jpeg", quality=_QUALITY)
            self._encoded.append(file.getvalue())

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._encoded[index], 0)

    def name_of(self, index: int) -> str:
        return f"photograph {index}"

    def digest(self) -> str:
        return digest_of(self._encoded)


def main() -> None:
    """The command."""
    with commands.running():
        program = "python -m experiments.speed.images"
        arguments = tyro.cli(Arguments, prog=program, description=__doc__)
        split = _split(arguments)
        contents = [split[index].content for index in range(min(arguments.images, len(split)))]
        print(f"{len(contents)} images; images/s on one core, median (smallest to largest)")
        _compare(contents, arguments)
        print("images/s of the input pipeline with --train.augment resized-crop")
        for workers in (0, os.cpu_count() or 1):
            rate = _pipeline_rate(split, arguments, workers)
            print(f"{workers} worker processes, 4 threads: {rate:8,.0f}")


def _split(arguments: Arguments) -> EncodedSplit:
    if arguments.data is None:
        return _Photographs(arguments.images)
    split = data.on_disk(arguments.data).train
    assert not isinstance(split, ArraySplit)
    return split


def _compare(contents: Sequence[bytes], arguments: Arguments) -> None:
    size, generator = arguments.image_size, np.random.default_rng(0)
    turns: dict[str, Callable[[bytes], object]] = {
        "Pillow's decoding": lambda content: Image.open(io.BytesIO(content)).convert("RGB"),
        "random resized crop": lambda content: images.random_resized_crop(
            content, size, generator, flip=True
        ),
        "centre crop": lambda content: images.centre_crop(content, size),
    }
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(arguments.rounds):
        for name, turn in turns.items():
            start = time.perf_counter()
            for content in contents:
                turn(content)
            rates[name].append(len(contents) / (time.perf_counter() - start))
    for name, found in rates.items():
        print(
            f"{name:20} {statistics.median(found):8,.0f} ({min(found):,.0f} to {max(found):,.0f})"
        )


def _pipeline_rate(split: EncodedSplit, arguments: Arguments, workers: int) -> float:
    batch = min(64, len(split))
    size, loading = arguments.image_size, Loading(workers)
    feed = LabelledImages(split, split, Share(batch), size, "resized-crop", True, 0, loading)
    batches = feed.training(0)
    for _ in range(4):  # until the workers are there and what they hold ready is gone
        next(batches)
    count = 4 * arguments.rounds
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * batch / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
