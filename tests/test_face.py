"""Face recognition: who is trained on and who is judged, the task, the command."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from experiments.face import faces
from experiments.face.config import Config
from experiments.runtime.errors import UserError

SIZE = (32, 32)
PEOPLE = 24  # two in each of 12 folds' worth; the last four are in no pair
FOLDS = 5


def jpeg(person, number):
    """A face is a colour and a bar that tell the person, and noise that tells the image."""
    generator = np.random.default_rng((person, number))
    pixels = np.full((*SIZE, 3), 40 + 8 * person, np.uint8)
    pixels[:, person % 8 * 4 : person % 8 * 4 + 4] = 255 - 8 * person
    pixels = np.clip(pixels + generator.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=95)
    return content.getvalue()


def images_of(person):
    return 1 if person == 3 else 2 + person % 3


def name(person):
    return f"Person_{person:02}"


def pairs_txt(people_of=lambda fold: range(4 * fold, 4 * fold + 4)):
    """Five folds of two pairs of one person, and two of two people."""
    lines = [f"{FOLDS}\t2"]
    for fold in range(FOLDS):
        a, b, c, d = people_of(fold)
        lines += [f"{name(p)}\t1\t2" for p in (a, b)]
        lines += [f"{name(a)}\t1\t{name(c)}\t1", f"{name(b)}\t2\t{name(d)}\t1"]
    return "\n".join(lines) + "\n"


@pytest.fixture
def tree(tmp_path):
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for person in range(PEOPLE):
            for number in range(1, images_of(person) + 1):
                file = f"faces/{name(person)}/{name(person)}_{number:04}.jpg"
                archive.writestr(file, jpeg(person, number))
        archive.writestr("faces/pairs.txt", pairs_txt())
    return path


def config(tree, **fields):
    return Config(data=f"folder:{tree}", image_size=SIZE, **fields)


def people_in(split, places):
    return {split.name_of(int(place)).split("/")[-2] for place in places}


@pytest.mark.parametrize("set_apart", [0, 1, 2])
def test_nobody_who_is_judged_is_trained_on(tree, set_apart):
    judged_in_all = set()
    for fold in range(FOLDS):
        found = faces.load(config(tree, fold=fold, set_apart=set_apart))
        trained_on = people_in(found.train, range(len(found.train)))
        pairs = found.pairs
        judged = people_in(
            found.held_out, np.concatenate([pairs.first[found.judged], pairs.second[found.judged]])
        )
        apart = people_in(
            found.held_out,
            np.concatenate([pairs.first[~found.judged], pairs.second[~found.judged]]),
        )
        assert judged == {name(p) for p in range(4 * fold, 4 * fold + 4)}
        assert not judged & trained_on and set(found.people) == trained_on
        others = [(fold + 1 + i) % FOLDS for i in range(FOLDS - 1)]
        expected = {name(p) for f in others[set_apart:] for p in range(4 * f, 4 * f + 4)}
        assert trained_on == expected - {name(3)}  # who has a single image
        if set_apart:
            assert not apart & trained_on
        assert found.judged.sum() == 4 and pairs.same[found.judged].sum() == 2
        judged_in_all |= judged
    assert len(judged_in_all) == 4 * FOLDS


def test_a_person_in_two_folds_is_refused(tree, tmp_path):
    other = tmp_path / "pairs.txt"
    other.write_text(pairs_txt(lambda fold: [4 * fold, 4 * fold + 1, 4 * fold + 2, 7]))
    with pytest.raises(UserError, match=f'"{name(7)}" is in a pair that is judged and in a fold'):
        faces.load(config(tree, pairs=str(other), fold=0))


def test_without_folds_nobody_in_a_pair_is_trained_on(tree):
    found = faces.load(config(tree))
    assert set(found.people) == {name(p) for p in range(20, 24)}
    assert found.judged.all() and len(found.judged) == 20
    assert any("of people who is in a pair" in line for line in found.left_out)


def test_images_are_those_of_the_people(tree):
    found = faces.load(config(tree, fold=1))
    for index in range(len(found.train)):
        content, label = found.train[index]
        person, number = found.train.name_of(index).split("_")[-2:]
        assert found.people[label] == f"Person_{person}"
        assert content == jpeg(int(person), int(number.split(".")[0]))
    first, second = found.pairs.first[found.judged], found.pairs.second[found.judged]
    named = [
        [found.held_out.name_of(place).split("/")[-1] for place in pair]
        for pair in np.stack([first, second], axis=1)
    ]
    assert named[0] == ["Person_04_0001.jpg", "Person_04_0002.jpg"]
    assert named[3] == ["Person_05_0002.jpg", "Person_07_0001.jpg"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"fold": 5}, "--fold must be from 0 to 4, got 5"),
        ({"fold": 0, "set_apart": 4}, "--set-apart must be at most 3 of 5 folds, got 4"),
        ({"min_images": 9}, r"--data: 0 persons of .* with 9 images or more \(--min-images\)"),
        ({"pairs": "/nowhere/pairs.txt"}, '--pairs: "/nowhere/pairs.txt" cannot be read'),
        ({"pairs_data": "tree:x"}, '--pairs-data: it must be "folder:PATH"'),
    ],
)
def test_faces_that_cannot_be_had(tree, fields, message):
    with pytest.raises(UserError, match=message):
        faces.load(config(tree, **fields))


def test_data_that_is_none(tmp_path):
    (tmp_path / "empty").mkdir()
    for data, message in (
        (f"folder:{tmp_path / 'empty'}", "has no images in folders, as in CLASS/x.jpg"),
        ("faces", '--data: it must be .* got "faces"'),
        (f"recordio:{tmp_path / 'empty'}", "--data: "),
    ):
        with pytest.raises(UserError, match=message):
            faces.load(Config(data=data))
