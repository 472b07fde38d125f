"""The faces of a run: which images are trained on, and which pairs of others it is judged by."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from experiments.face.config import Config
from experiments.face.pairs import Pairs, bin_pairs, lfw_pairs
from experiments.face.recordio import record_io
from experiments.runtime import sources
from experiments.runtime.errors import UserError, blaming, reason
from experiments.runtime.sources import EncodedSplit, Labelled, Sample
from experiments.runtime.sources.splits import count_of, digest_of, some_contents


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some images of a split, with labels of their own (`EncodedSplit`).

    Attributes:
      images: the split.
      places: which of its images.
      labels: theirs.
    """

    images: EncodedSplit
    places: Int[np.ndarray, count]
    labels: Int[np.ndarray, count]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        content = self.images[int(self.places[index])].content
        return Sample(content, int(self.labels[index]))

    def name_of(self, index: int) -> str:
        """Of the image in the split."""
        return self.images.name_of(int(self.places[index]))

    def digest(self) -> str:
        """Of the split, and of what was chosen of it."""
        whole = self.images.digest().encode()
        return digest_of([whole, self.places.tobytes(), self.labels.tobytes()])


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Encoded images that are there already (`EncodedSplit`).

    Attributes:
      contents: the images.
      where: what they were read from.
    """

    contents: Sequence[bytes]
    where: str

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.contents[index], -1)

    def name_of(self, index: int) -> str:
        """Its number."""
        return f"image {index} of {self.where}"

    def digest(self) -> str:
        """Of some of the images, and of the number of all."""
        return digest_of([str(len(self)).encode(), *some_contents(self)])


class Faces(NamedTuple):
    """What a run is trained on and judged by.

    Attributes:
      train: the images of training, labelled from 0.
      people: names of the people who are trained on, in the order of the labels.
      held_out: the images that are in pairs.
      pairs: of places in `held_out`.
      judged: the pairs that count; with the others, those of people set apart, a threshold is
        chosen. All count where every fold is judged by the threshold that is best for the others.
      left_out: what of the data is not used and why, a line for each kind.
    """

    train: Chosen
    people: tuple[str, ...]
    held_out: Chosen
    pairs: Pairs
    judged: Bool[np.ndarray, pairs]
    left_out: tuple[str, ...]

    def identity(self) -> dict[str, str | int]:
        """What tells this data from other data, by short names."""
        pairs = (np.ascontiguousarray(array).tobytes() for array in dataclasses.astuple(self.pairs))
        return {
            "people": len(self.people),
            "training images": len(self.train),
            "training digest": self.train.digest(),
            "held-out images": len(self.held_out),
            "held-out digest": self.held_out.digest(),
            "pairs": len(self.pairs.same),
            "pairs digest": digest_of([*pairs, self.judged.tobytes()]),
        }


def load(config: Config) -> Faces:
    """Finds the faces that a run's options name.

    Raises:
      UserError: there is something wrong with them.
    """
    with blaming("--data"):
        found = labelled(config.data)
    left_out = list(found.left_out)
    images, pairs = _held_out(config, found)
    if not pairs.same.any() or pairs.same.all():
        kinds = "of two people" if pairs.same.all() else "of one person"
        raise UserError(f"--pairs: there are no pairs {kinds}; both kinds are needed.")
    judged = np.ones(len(pairs.same), bool)
    seen = np.ones(len(found.classes), bool)  # the people who may be trained on
    if images is found.images:
        if config.fold is None:
            seen[_people_in(found, pairs)] = False
            why = "who is in a pair"
        else:
            pairs, judged, seen = _by_fold(config, found, pairs)
            why = f"who is not in the folds that are trained on, for --fold {config.fold}"
        others = count_of(int(np.isin(found.labels, np.flatnonzero(~seen)).sum()), "image")
        left_out.append(f"{others} of people {why}")
    elif config.fold is not None:
        raise UserError("--fold is for pairs of images in --data, and --pairs has its own.")
    images_of = np.bincount(found.labels, minlength=len(found.classes))
    few = seen & (images_of < config.min_images)
    if few.any():
        left_out.append(
            f"{int(few.sum()):,} people with fewer than {config.min_images} images (--min-images)"
        )
    people = np.flatnonzero(seen & ~few)
    if len(people) < 2:
        raise UserError(
            f'--data: {count_of(len(people), "person")} of "{config.data}" with '
            f"{config.min_images} images or more (--min-images) can be trained on; two or more are "
            "needed."
        )
    places = np.flatnonzero(np.isin(found.labels, people))
    if images is found.images:
        _check_nobody_is_known(found, places, _some(pairs, judged))
    labels = np.searchsorted(people, found.labels[places])
    used, numbers = np.unique([pairs.first, pairs.second], return_inverse=True)
    numbers = numbers.reshape(2, -1)
    return Faces(
        Chosen(found.images, places, labels),
        tuple(found.classes[person] for person in people),
        Chosen(images, used, np.full(len(used), -1)),
        dataclasses.replace(pairs, first=numbers[0], second=numbers[1]),
        judged,
        tuple(left_out),
    )


def labelled(source: str) -> Labelled:
    """The faces that --data names.

    Raises:
      UserError: it names none.
    """
    kind, _, path = source.partition(":")
    if source == "lfw":
        return sources.one_split(_downloaded())
    readers: dict[str, Callable[[str], Labelled]] = {
        "folder": lambda path: sources.one_split(pathlib.Path(path)),
        "recordio": _records,
        "hf": sources.hugging_face_train,
    }
    if kind not in readers or not path:
        raise UserError(
            'it must be "folder:PATH", "recordio:PATH", "hf:NAME_OR_PATH" or "lfw", got '
            f'"{source}".'
        )
    return readers[kind](path)


def _records(path: str) -> Labelled:
    faces = record_io(pathlib.Path(path))
    return Labelled(faces, faces.labels, tuple(str(key) for key in np.unique(faces.labels)))


def _downloaded() -> pathlib.Path:
    """LFW as scikit-learn downloads and keeps it."""
    from sklearn.datasets import fetch_lfw_people, get_data_home

    folder = pathlib.Path(get_data_home()) / "lfw_home" / "lfw_funneled"
    if not folder.exists():
        try:
            fetch_lfw_people(min_faces_per_person=100)
        except Exception as error:  # of many kinds, all about the download
            raise UserError(
                f"scikit-learn cannot download LFW: {reason(error)}; give folder:PATH."
            ) from None
    return folder


def _held_out(config: Config, found: Labelled) -> tuple[EncodedSplit, Pairs]:
    """The pairs, and the images that they are of."""
    images = found.images
    if config.pairs_data is not None:
        with blaming("--pairs-data"):
            images = labelled(config.pairs_data).images
    source = config.data if config.pairs_data is None else config.pairs_data
    with blaming("--pairs"):
        where, content = _read_pairs(config.pairs, source)
        if where.endswith(".bin"):
            contents, pairs = bin_pairs(content, where)
            return InMemory(contents, where), pairs
        names = [images.name_of(i) for i in range(len(images))]
        return images, lfw_pairs(content, where, names)


def _read_pairs(path: str | None, source: str) -> tuple[str, bytes]:
    """A file of pairs: the one named, or else the pairs.txt among the images."""
    if path is not None:
        try:
            return path, pathlib.Path(path).read_bytes()
        except OSError as error:
            raise UserError(f'"{path}" cannot be read: {reason(error)}.') from None
    kind, _, tree = source.partition(":")
    if kind == "folder":
        names, reader, _ = sources.files_of(pathlib.Path(tree))
        found = [name for name in names if reader.parts(name)[-1] == "pairs.txt"]
        if len(found) == 1:
            return f"{tree}/{found[0]}", reader.read(found[0])
    raise UserError(
        f'it must be given, as there is no pairs.txt in "{source}": a list as LFW\'s pairs.txt, or '
        "a .bin of InsightFace."
    )


def _people_in(found: Labelled, pairs: Pairs) -> Int[np.ndarray, people]:
    return np.unique(found.labels[np.concatenate([pairs.first, pairs.second])])


def _by_fold(
    config: Config, found: Labelled, pairs: Pairs
) -> tuple[Pairs, Bool[np.ndarray, pairs], Bool[np.ndarray, people]]:
    """The pairs that are judged or choose the threshold, which are judged, and who is trained on.

    Raises:
      UserError: there is no such fold.
    """
    folds = int(pairs.folds.max()) + 1
    assert config.fold is not None
    if not 0 <= config.fold < folds:
        raise UserError(f"--fold must be from 0 to {folds - 1}, got {config.fold}.")
    if config.set_apart > folds - 2:
        raise UserError(
            f"--set-apart must be at most {folds - 2} of {folds} folds, got {config.set_apart}."
        )
    behind = (pairs.folds - config.fold) % folds  # 0 is judged, the next are set apart
    apart = behind <= config.set_apart
    seen = np.zeros(len(found.classes), bool)
    seen[_people_in(found, _some(pairs, ~apart))] = True
    kept = _some(pairs, apart) if config.set_apart else pairs
    return kept, kept.folds == config.fold, seen


def _check_nobody_is_known(
    found: Labelled, trained_on: Int[np.ndarray, images], judged: Pairs
) -> None:
    """Refuses to judge by people who are trained on.

    Raises:
      UserError: there are such people.
    """
    known = np.intersect1d(_people_in(found, judged), found.labels[trained_on])
    if len(known):
        raise UserError(
            f'--pairs: "{found.classes[known[0]]}" is in a pair that is judged and in a fold that '
            f"is trained on; {len(known)} people are. Nobody may be in two folds."
        )


def _some(pairs: Pairs, which: Bool[np.ndarray, pairs]) -> Pairs:
    return Pairs(pairs.first[which], pairs.second[which], pairs.same[which], pairs.folds[which])
