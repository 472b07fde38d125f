"""Aligns faces: brings five landmarks of each to where the networks expect them.

IMAGES is a folder or a zip, of any tree; the folder --out gets the same tree of images of 112 x 112
or 112 x 96 pixels (height x width). LANDMARKS is a text file with a line for each image, PATH x1 y1
... x5 y5, separated by commas or blanks, below titles or not (as CelebA's), or a .json of
{"PATH": [[x1, y1], ... [x5, y5]]}. PATH is the image's in the tree. The five are the eyes, the tip
of the nose and the corners of the mouth, the image's left ones first, in pixels of the image as it
is to be looked at, upright, of which the upper left one's centre is at 0, 0. Images that are in
--out already are left as they are: a command that was stopped is given again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image
from rich.progress import track

from experiments.face.alignment import Landmarks, aligned
from experiments.runtime import commands
from experiments.runtime.errors import DataLost, UserError, reason
from experiments.runtime.files import replacing, write_text
from experiments.runtime.images import upright
from experiments.runtime.sources.splits import count_of
from experiments.runtime.sources.trees import Reader, files_of, parts_in_zip

_NUMBERS = 10  # of five landmarks
_AT_ONCE = 1024  # faces that wait for a thread; all of a large set would take much memory
_OPTIONS = ".alignment.json"  # in the folder --out; hidden, as it is no image
_SUFFIX = {"png": ".png", "jpeg": ".jpg"}
_SAVING: Mapping[str, dict[str, Any]] = {"png": {}, "jpeg": {"quality": 95, "subsampling": 0}}

Outcome = Literal["aligned", "kept", "skipped"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Aligns faces: brings five landmarks of each to where the networks expect them."""

    images: tyro.conf.Positional[commands.Path]
    """A folder of images in any tree, or a zip of one."""
    landmarks: tyro.conf.Positional[commands.Path]
    """The file of landmarks."""
    out: commands.Path
    """The folder to write."""
    size: Literal["112x112", "112x96"] = "112x112"
    """Height and width of what is written, in pixels."""
    format: Literal["png", "jpeg"] = "png"
    """Of what is written; JPEG is of quality 95."""
    threads: int = os.cpu_count() or 1
    """Images that are worked on at once."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UserError(f"--threads must be at least 1, got {self.threads}.")

    @property
    def width(self) -> int:
        """Of what is written."""
        return int(self.size.partition("x")[2])


def main() -> None:
    """The command."""
    with commands.running():
        arguments = tyro.cli(
            Arguments, prog="python -m experiments.face.align", description=__doc__
        )
        jobs = _jobs(arguments)
        out = arguments.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            _keep_to_options(arguments)
            counts = _align(jobs, arguments)
        except OSError as error:
            raise UserError(f'--out: "{out}" cannot be written: {reason(error)}.') from None
        if not counts["aligned"] + counts["kept"]:
            raise UserError(f"none of the {len(jobs.names):,} faces could be aligned; see above.")
        print(
            f"{counts['aligned']:,} faces aligned, {counts['kept']:,} were there already, "
            f"{counts['skipped']:,} skipped; see {out}"
        )


@dataclasses.dataclass(frozen=True)
class _Jobs:
    """What there is to be aligned.

    Attributes:
      names: of the images that have landmarks, as the reader knows them.
      landmarks: of each.
      reader: reads them.
    """

    names: Sequence[str]
    landmarks: Sequence[Landmarks]
    reader: Reader


def _jobs(arguments: Arguments) -> _Jobs:
    """Finds the images and their landmarks, and tells what lacks the one or the other.

    Raises:
      UserError: there are none, or a file cannot be read.
    """
    images = arguments.images
    if images.is_dir() and arguments.out.resolve().is_relative_to(images.resolve()):
        raise UserError(f'--out: "{arguments.out}" is within "{images}"; give a folder elsewhere.')
    names, reader, left_out = files_of(images)
    if not names:
        raise UserError(f'"{images}" holds no files.')
    landmarks = read_landmarks(arguments.landmarks)
    paths = {"/".join(reader.parts(name)): name for name in names}
    with_landmarks = sorted(paths.keys() & landmarks.keys())
    alone = {
        f'of "{images}" without landmarks': paths.keys() - landmarks.keys(),
        f'named in "{arguments.landmarks}" that "{images}" lacks': landmarks.keys() - paths.keys(),
    }
    left_out += [
        f'{count_of(len(missing), "file")} {what}, as "{min(missing)}"'
        for what, missing in alone.items()
        if missing
    ]
    if not with_landmarks:
        raise UserError(
            f'"{arguments.landmarks}" has no landmarks of any file of "{images}"'
            + (f" ({'; '.join(left_out)})" if left_out else "")
            + f'; its paths must be those within "{images}".'
        )
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    return _Jobs(
        [paths[path] for path in with_landmarks],
        [landmarks[path] for path in with_landmarks],
        reader,
    )


def read_landmarks(path: pathlib.Path) -> dict[str, Landmarks]:
    """Reads a file of landmarks, as the command describes it.

    Returns:
      Five landmarks for each path; they may be any numbers, also NaN.

    Raises:
      UserError: it cannot be read, or is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'"{path}" cannot be read: {reason(error)}.') from None
    found = _in_json(text, path) if path.suffix.lower() == ".json" else _in_lines(text, path)
    if not found:
        raise UserError(f'"{path}" has no landmarks.')
    return found


def _in_json(text: str, path: pathlib.Path) -> dict[str, Landmarks]:
    expected = '{"PATH": [[x1, y1], ... [x5, y5]]}'
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise UserError(f'"{path}" is no JSON: {error}.') from None
    if not isinstance(entries, dict):
        raise UserError(f'"{path}" must be {expected}.')
    found = {}
    for name, points in entries.items():
        try:
            landmarks = np.array(points, np.float64)
        except (TypeError, ValueError):
            landmarks = np.empty(0)
        if landmarks.shape != (5, 2):
            raise UserError(f'the landmarks of "{name}" in "{path}" must be as in {expected}.')
        found["/".join(parts_in_zip(name))] = landmarks
    return found


def _in_lines(text: str, path: pathlib.Path) -> dict[str, Landmarks]:
    found: dict[str, Landmarks] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line:
            continue
        name, *fields = line.rsplit("," if line.count(",") >= _NUMBERS else None, _NUMBERS)
        numbers = [_number(field) for field in fields]
        if not found and all(value is None for value in numbers):
            continue  # titles, or how many lines follow
        if len(numbers) < _NUMBERS or None in numbers:
            raise UserError(
                f'line {number} of "{path}" must be PATH x1 y1 ... x5 y5, got "{line[:200]}".'
            )
        name = "/".join(parts_in_zip(name.strip().strip('"')))
        if name in found:
            raise UserError(
                f'line {number} of "{path}" has landmarks of "{name}" once more; leave those of '
                "one face."
            )
        found[name] = np.array(numbers, np.float64).reshape(5, 2)
    return found


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def _keep_to_options(arguments: Arguments) -> None:
    """Refuses a folder that holds images of other options, and notes these in a new one."""
    options = {"size": arguments.size, "format": arguments.format}
    file = arguments.out / _OPTIONS
    if not file.exists():
        write_text(file, json.dumps(options) + "\n")
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        before = None
    if before != options:
        raise UserError(
            f'--out: "{arguments.out}" holds images of other options ({before}); give these or '
            "another folder."
        )


def _align(jobs: _Jobs, arguments: Arguments) -> collections.Counter[Outcome]:
    """Aligns all faces, and says how many came to what."""
    counts: collections.Counter[Outcome] = collections.Counter()
    for name, outcome, why in track(_outcomes(jobs, arguments), "aligning faces", len(jobs.names)):
        counts[outcome] += 1
        if outcome == "skipped":
            print(f"skipped {name}: {why}", file=sys.stderr)
    return counts


def _outcomes(jobs: _Jobs, arguments: Arguments) -> Iterator[tuple[str, Outcome, str]]:
    """For each face its name, what came of it, and why if it is skipped.

    Raises:
      DataLost: the images cannot be read any more.
      OSError: the folder cannot be written to.
    """
    suffix = _SUFFIX[arguments.format]
    written_from: dict[pathlib.Path, str] = {}
    targets = []
    for name in jobs.names:
        target = arguments.out.joinpath(*jobs.reader.parts(name)).with_suffix(suffix)
        written_from.setdefault(target, name)
        targets.append(target)

    def outcome(index: int) -> tuple[str, Outcome, str]:
        name, target = jobs.names[index], targets[index]
        if written_from[target] != name:
            return name, "skipped", f'"{written_from[target]}" becomes the same file'
        if target.exists():
            return name, "kept", ""
        try:
            image = upright(jobs.reader.read(name))
            face = aligned(image, jobs.landmarks[index], arguments.width)
        except DataLost:
            raise
        except Exception as error:  # of any kind: one broken image never stops the command
            return name, "skipped", reason(error)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            Image.fromarray(face).save(temporary, **_SAVING[arguments.format])
        return name, "aligned", ""

    with concurrent.futures.ThreadPoolExecutor(arguments.threads) as pool:
        for begin in range(0, len(targets), _AT_ONCE):
            yield from pool.map(outcome, range(begin, min(begin + _AT_ONCE, len(targets))))


if __name__ == "__main__":
    main()
