"""Faces from a disk: InsightFace's records, held-out pairs, alignment."""

import concurrent.futures
import io
import itertools
import json
import os
import pathlib
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.face import align
from experiments.face.alignment import (
    TEMPLATE,
    BadLandmarksError,
    aligned,
    similarity,
    template,
    warped,
)
from experiments.face.pairs import bin_pairs, lfw_pairs
from experiments.face.recordio import RecordFile, record_io
from experiments.runtime.errors import DataLost, UserError
from experiments.runtime.images import BrokenImageError, upright

GOLDEN = pathlib.Path(__file__).parent / "data/face"
MAGIC = bytes.fromhex("0a23d7ce")


def golden(name):
    with np.load(GOLDEN / name) as arrays:
        return dict(arrays)


# --- Records


def framed(data):
    """A record as it lies in a .rec."""
    parts, begin = [], 0
    for at in range(0, len(data) - 3, 4):
        if data[at : at + 4] == MAGIC:
            parts.append(data[begin:at])
            begin = at + 4
    parts.append(data[begin:])
    kinds = [0] if len(parts) == 1 else [1] + [2] * (len(parts) - 2) + [3]
    framed = b""
    for kind, part in zip(kinds, parts, strict=True):
        framed += (
            MAGIC + struct.pack("<I", kind << 29 | len(part)) + part + b"\0" * (-len(part) % 4)
        )
    return framed


def data_of(labels, content=b""):
    """The data of a record: one label in the header, or several behind it."""
    if np.ndim(labels) == 0:
        return struct.pack("<IfQQ", 0, labels, 7, 0) + content
    return struct.pack(f"<IfQQ{len(labels)}f", len(labels), 0, 7, 0, *labels) + content


def write(folder, records):
    """A train.rec and train.idx of the data of records, by their keys; where they begin."""
    rec, offsets = b"", {}
    for key, data in records.items():
        offsets[key] = len(rec)
        rec += framed(data)
    (folder / "train.rec").write_bytes(rec)
    write_idx(folder, offsets)
    return offsets


def write_idx(folder, offsets):
    lines = (f"{key}\t{offset}\n" for key, offset in offsets.items())
    (folder / "train.idx").write_text("".join(lines))


def of_people(sizes, labels):
    """Records of so many images of people, with their identity records."""
    images = [label for size, label in zip(sizes, labels, strict=True) for _ in range(size)]
    ends = np.cumsum([1, *sizes])
    records = {0: data_of([ends[-1], ends[-1] + len(sizes)])}
    for key, label in enumerate(images, 1):
        records[key] = data_of(label, b"image %d" % key)
    for key, begin_end in enumerate(itertools.pairwise(ends), len(records)):
        records[key] = data_of(begin_end)
    return records


def mode_of(content):
    with Image.open(io.BytesIO(content)) as image:
        return image.mode


def test_golden_records():
    expected = golden("train_rec_decoded.npz")
    faces = record_io(GOLDEN)
    assert faces.keys.tolist() == expected["keys"].tolist()
    assert faces.offsets.tolist() == expected["offsets"][expected["keys"]].tolist()
    assert faces.labels.tolist() == expected["labels"].tolist()
    samples = [faces[i] for i in range(len(faces))]
    assert [len(s.content) for s in samples] == expected["jpeg_lengths"].tolist()
    assert sum(MAGIC in s.content for s in samples) == 2
    for sample, label, pixels in zip(samples, faces.labels, expected["images"], strict=True):
        assert sample.label == label
        np.testing.assert_array_equal(upright(sample.content), pixels)
    assert [mode_of(s.content) for s in samples].count("L") == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([MAGIC, b"x", b"abcd", MAGIC[:2], b"\0"])), min_size=1))
def test_records_split_at_the_magic_word(tmp_path_factory, pieces):
    folder = tmp_path_factory.mktemp("records")
    contents = [b"".join(some) for some in pieces]
    offsets = write(folder, dict(enumerate(contents)))
    file = RecordFile(folder / "train.rec")
    assert [file.record(offset) for offset in offsets.values()] == contents


def test_many_records_from_many_threads(tmp_path):
    sizes = np.random.default_rng(0).integers(1, 9, 400)
    labels = 3 * np.random.default_rng(1).permutation(400)  # in no order, with gaps
    write(tmp_path, of_people(sizes, labels))
    faces = pickle.loads(pickle.dumps(record_io(tmp_path)))
    assert faces.identities.tolist() == sorted(labels)
    assert faces.labels.tolist() == np.repeat(labels // 3, sizes).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(faces.__getitem__, range(len(faces))))
    assert [s.content for s in samples] == [b"image %d" % k for k in range(1, sizes.sum() + 1)]
    assert [s.label for s in samples] == faces.labels.tolist()
    assert faces.name_of(4) == f"record 5 of {tmp_path / 'train.rec'}"


def test_labels_of_images_in_no_identity_record(tmp_path):
    records = of_people([2, 3, 1], [5, 4, 9])
    records[8] = data_of([3, 5])  # the second person's third image is left out
    records[7], records[9] = records[9], records[7]  # in another order than the images
    records[5] = data_of([2, 0.5, 0.5], b"image 5")  # a vector, of which the first counts
    write(tmp_path, records)
    faces = record_io(tmp_path)
    assert faces.identities.tolist() == [2, 4, 5, 9]
    assert faces.labels.tolist() == [2, 2, 1, 1, 0, 3]
    assert faces[4] == (b"image 5", 0)


def test_without_identity_records(tmp_path):
    images = {key: data_of(label, b"image") for key, label in ((3, 8), (0, 6), (1, 8))}
    write(tmp_path, images)
    faces = record_io(tmp_path / "train.rec")
    assert faces.keys.tolist() == [0, 1, 3]
    assert faces.labels.tolist() == [0, 1, 1]


def test_keys_beyond_what_float32_tells_apart(tmp_path):
    """Glint360K has more than 2^24 records: the ranges in its identity records are rounded."""
    last = 2**24
    records = {
        0: data_of([last + 3, last + 5]),
        last: data_of(1, b"a"),
        last + 1: data_of(0, b"b"),
        last + 2: data_of(0, b"c"),
        last + 3: data_of([last, last + 1]),
        last + 4: data_of([last + 1, last + 3]),
    }
    write(tmp_path, records)
    faces = record_io(tmp_path)
    assert faces.keys.tolist() == [last, last + 1, last + 2]
    assert faces.labels.tolist() == [1, 0, 0]


def test_the_digest_is_of_images_and_labels(tmp_path):
    def digest(name, sizes, labels):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, of_people(sizes, labels))
        return record_io(folder).digest()

    one = digest("one", [2, 1], [0, 1])
    assert digest("again", [2, 1], [0, 1]) == one
    assert len({one, digest("other", [1, 2], [0, 1]), digest("more", [2, 2], [0, 1])}) == 3


@pytest.fixture
def people(tmp_path):
    """A folder of records, and where they begin."""
    return tmp_path, write(tmp_path, of_people([2, 3, 1], [0, 1, 2]))


def refusal(folder):
    with pytest.raises(UserError) as error:
        record_io(folder)
    return str(error.value)


def test_missing_files(people):
    folder, _ = people
    (folder / "train.idx").unlink()
    assert f'there is no "{folder / "train.idx"}", which tells where' in refusal(folder)
    (folder / "train.rec").unlink()
    assert f'there is no "{folder / "train.rec"}"; give a folder' in refusal(folder)


@pytest.mark.parametrize("content", ["", "1", "a b", "0 0\n1 x", "0 -4", "0 0 1"])
def test_no_index(people, content):
    folder, _ = people
    (folder / "train.idx").write_text(content)
    assert "is no index of a .rec, lines of a key and a byte; copy it anew" in refusal(folder)


def test_one_record_twice_in_the_index(people):
    folder, offsets = people
    with (folder / "train.idx").open("a") as file:
        file.write(f"3\t{offsets[4]}\n")
    assert "has record 3 twice; copy" in refusal(folder)


@pytest.mark.parametrize("begin,said", [(b"", "is empty"), (b"PK\3\4", "begins with 0x04034b50")])
def test_another_magic_word(people, begin, said):
    folder, _ = people
    rec = (folder / "train.rec").read_bytes()
    (folder / "train.rec").write_bytes(begin and begin + rec[4:])
    message = refusal(folder)
    assert f"is no RecordIO file: it {said}, not with 0xced7230a; copy" in message


def test_cut_in_the_middle(people):
    folder, offsets = people
    rec = (folder / "train.rec").read_bytes()
    (folder / "train.rec").write_bytes(rec[: offsets[4] + 3])
    assert (
        f'"{folder / "train.rec"}" ends at byte {offsets[4] + 3}, but "{folder / "train.idx"}" '
        f"has record 4 at byte {offsets[4]}: the .rec is cut, or the .idx is another's; copy the "
        ".rec and its .idx anew."
    ) == refusal(folder)
    (folder / "train.rec").write_bytes(rec[:-1])
    assert (
        f'"{folder / "train.rec"}" is cut: it ends at byte {len(rec) - 1}, in the midst of a '
        f"record (record 9 at byte {offsets[9]}); copy the .rec and its .idx anew."
    ) == refusal(folder)


@pytest.mark.parametrize("wrong", [2**63 - 1, 10**5])
def test_an_index_beyond_the_file(people, wrong):
    folder, offsets = people
    write_idx(folder, {**offsets, 2: wrong})
    assert f"has record 2 at byte {wrong:,}: the .rec is cut, or the .idx" in refusal(folder)


@pytest.mark.parametrize("key,by", [(0, 4), (1, 4), (1, 1), (7, 8)])
def test_an_index_that_points_nowhere(people, key, by):
    folder, offsets = people
    write_idx(folder, {**offsets, key: offsets[key] + by})
    assert f"has no record {key} at byte {offsets[key] + by}, where" in refusal(folder)


@pytest.mark.parametrize("labels", [[1, 4], [3, 1], 1, [1, 2, 3], [float("nan"), 2]])
def test_no_identity_record(people, labels):
    folder, _ = people
    write(folder, of_people([2, 3, 1], [0, 1, 2]) | {7: data_of(labels)})
    assert "must tell which images are of one identity and of no other" in refusal(folder)


@pytest.mark.parametrize("label", [1.5, -1.0, float("nan"), float("inf")])
def test_a_label_that_is_no_number_of_an_identity(people, label):
    folder, offsets = people
    write(folder, of_people([2, 3, 1], [0, label, 2]))
    assert f"the label of record 3 at byte {offsets[3]} is {label}, but" in refusal(folder)


def test_no_images(tmp_path):
    write(tmp_path, {0: data_of([1, 1])})
    assert "has no image in any of the records" in refusal(tmp_path)
    write(tmp_path, {1: data_of(0), 2: data_of([0, 1])})
    assert "has no image in any of the records" in refusal(tmp_path)


def test_single_damaged_records(people):
    folder, offsets = people
    records = of_people([2, 3, 1], [0, 1, 2])
    records[4] = data_of(1)
    records[5] = records[6] = data_of(1, b"...." + MAGIC + b"....")
    offsets = write(folder, records)
    with (folder / "train.rec").open("r+b") as file:
        file.seek(offsets[2])
        file.write(b"damaged!")
        file.seek(offsets[5] + 36 + 4)
        file.write(struct.pack("<I", 4))  # a record of its own where the last part should be
        file.seek(offsets[6] + 4)
        file.write(struct.pack("<I", 3 << 29 | 28))  # the last part of none
    faces = record_io(folder)
    for index, why in (
        (1, f'"{folder / "train.rec"}" has no record at byte {offsets[2]}'),
        (3, "its record holds no image"),
        (4, f'"{folder / "train.rec"}" has no record at byte {offsets[5] + 36}'),
        (5, f'"{folder / "train.rec"}" has no record at byte {offsets[6]}'),
    ):
        with pytest.raises(BrokenImageError) as error:
            faces[index]
        assert str(error.value) == why
    assert faces[2].content == b"image 3"


def test_a_file_that_changes_while_it_is_read(people):
    folder, _ = people
    faces = record_io(folder)
    os.truncate(folder / "train.rec", 60)
    with pytest.raises(DataLost, match="is not the file any more that it was"):
        faces[4]


# --- Pairs


NAMES = [
    "Ann/Ann_0001.jpg",
    "Ann/Ann_0002.png",
    "lfw/Bob_B/Bob_B_0001.jpg",
    "lfw/Bob_B/Bob_B_0012.jpg",
    "lfw/Bob_B/notes.txt",
    "Cy D/Cy D_0003.webp",
]


def test_pairs_of_two_folds():
    text = "2\t1\nAnn\t1\t2\nAnn\t2\tCy D\t3\n\nBob_B\t12\t1\r\nCy D\t3\tAnn\t1\n"
    pairs = lfw_pairs(text.encode(), "pairs.txt", NAMES)
    assert pairs.first.tolist() == [0, 1, 3, 5]
    assert pairs.second.tolist() == [1, 5, 2, 0]
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.folds.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("header", ["", "11\n"])
def test_pairs_without_folds(header):
    text = header + "Ann 1 2\n" * 11 + "Ann 1 Bob_B 1\n" * 11
    pairs = lfw_pairs(text.encode(), "pairs.txt", NAMES)
    assert pairs.same.tolist() == [True] * 11 + [False] * 11
    assert pairs.folds.tolist() == 2 * [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_without_folds_the_order_of_lfw_gives_its_own():
    text = ("Ann 1 2\n" * 3 + "Ann 1 Bob_B 1\n" * 3) * 10
    folds = [lfw_pairs((h + text).encode(), "x", NAMES).folds.tolist() for h in ("10 3\n", "")]
    assert folds[0] == folds[1] == np.repeat(np.arange(10), 6).tolist()


@pytest.mark.parametrize(
    "text,said",
    [
        ("Ann 1 2\nEve 1 2", 'line 2 of "p.txt": there is no person "Eve" among the images.'),
        ("Ann 1 Eve 2", 'line 1 of "p.txt": there is no person "Eve" among'),
        ("1 1\nAnn 1 3", 'line 2 of "p.txt": "Ann" has no image 3 ("Ann_0003") among the images.'),
        ("Ann 1 Bob_B 2", '"Bob_B" has no image 2 ("Bob_B_0002")'),
        ("Ann 1 2\nAnn 1", 'line 2 of "p.txt": it must be "NAME i j" or "NAME i OTHER j", got "'),
        ("Ann 1 two", 'got "Ann 1 two"'),
        ("Ann -1 2", 'got "Ann -1 2"'),
        ("Ann 1 Bob_B 1 3", 'got "Ann 1 Bob_B 1 3"'),
        ("Ann 1 Ann 2", 'it is a pair of two people, both of which are "Ann"'),
        ("2 1\nAnn 1 2\nAnn 1 Bob_B 1", 'must have 4 pairs by its first line, "2 1", but has 2'),
        ("2\nAnn 1 2\nAnn 1 Bob_B 1", 'must have 4 pairs by its first line, "2", but has 2'),
        ("ten 300\nAnn 1 2", 'the first line of "p.txt" must tell how many folds'),
        ("0 3\nAnn 1 2", 'or be a pair, got "0 3"'),
        ("", '"p.txt" has no pairs.'),
        ("10 300\n", '"p.txt" has no pairs.'),
        (b"\xff\xd8\xff", '"p.txt" is no list of pairs, but no text at all.'),
    ],
)
def test_no_list_of_pairs(text, said):
    with pytest.raises(UserError) as error:
        lfw_pairs(text if isinstance(text, bytes) else text.encode(), "p.txt", NAMES)
    assert said in str(error.value)


def test_one_image_under_two_names():
    with pytest.raises(UserError, match='could be "Ann/Ann_0001.jpg" or "b/Ann/Ann_0001.png"'):
        lfw_pairs(b"Ann 1 2", "p.txt", [*NAMES, "b/Ann/Ann_0001.png"])


@pytest.mark.parametrize("name", ["pairs.bin", "pairs_python2.bin"])
def test_golden_bin(name):
    expected = golden("pairs_bin_decoded.npz")
    images, pairs = bin_pairs((GOLDEN / name).read_bytes(), name)
    assert [len(image) for image in images] == expected["jpeg_lengths"].tolist()
    for image, pixels in zip(images, expected["images"], strict=False):
        np.testing.assert_array_equal(upright(image), pixels)
    assert pairs.same.tolist() == expected["same"].tolist()
    assert pairs.first.tolist() == list(range(0, 24, 2))
    assert pairs.second.tolist() == list(range(1, 24, 2))
    assert pairs.folds.tolist() == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_bins_of_every_protocol(protocol):
    found = [b"\xff\xd8 one", b"two\0"], [True]
    images, pairs = bin_pairs(pickle.dumps(found, protocol), "x.bin")
    assert (images, pairs.same.tolist(), pairs.same.dtype) == (found[0], [True], bool)


class Making:
    """Is made by a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_bin_that_would_run_a_program(tmp_path, protocol):
    made = tmp_path / "made"
    content = pickle.dumps(([Making(made), b"b"], [True]), protocol)
    with pytest.raises(UserError, match=r'"x.bin" holds a foreign object, \w+.mkdir, which'):
        bin_pairs(content, "x.bin")
    assert not made.exists()
    pickle.loads(content)
    assert made.exists()  # Python's own unpickler runs it


@pytest.mark.parametrize(
    "opcodes,named",
    [
        (b"cos\nsystem\n.", "a foreign object, os.system"),
        (b"c__builtin__\neval\n.", "a foreign object, __builtin__.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "a foreign object, os.system"),
        (b"(S'ls'\nios\nsystem\n.", "a foreign object, os.system"),
        (b"cnumpy.core.multiarray\n_reconstruct\n.", "numpy.core.multiarray._reconstruct"),
        (b"c_codecs\ndecode\n.", "a foreign object, _codecs.decode"),
        (
            b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
            "_codecs.encode of no text in latin1",
        ),
        (
            b"c_codecs\nencode\n(NVlatin1\ntR.",
            "_codecs.encode of no text in latin1",
        ),
        (b"Pname\n.", "a reference to a foreign object"),
    ],
)
def test_foreign_objects_are_refused(opcodes, named):
    with pytest.raises(UserError) as error:
        bin_pairs(opcodes, "x.bin")
    assert f"{named}, which could run a program when it is read, and" in str(error.value)


@pytest.mark.parametrize(
    "found,said",
    [
        (([b"a", b"b", b"c"], [True]), "has 3 images for 1 pair, but must have two for each"),
        (([b"a", b"b"], [True, False]), "has 2 images for 2 pairs, but must have two for each"),
        (([], []), '"x.bin" has no pairs.'),
        (([b"a", "b"], [True]), 'number 1 of the images in "x.bin" is a str; write it anew.'),
        (([b"a", b"b"], [2]), 'number 0 of the bools in "x.bin" is a int; write it anew.'),
        (([b"a", b"b"], [b"1"]), 'number 0 of the bools in "x.bin" is a bytes'),
        ({"a": 1}, "is no .bin of pairs, a list of images and one of bools."),
        (([b"a"], [True], []), "is no .bin of pairs, a list of images and one of bools."),
    ],
)
def test_no_pairs_in_a_pickle(found, said):
    with pytest.raises(UserError) as error:
        bin_pairs(pickle.dumps(found), "x.bin")
    assert said in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(([b"abc"], [True]))[:-9]])
def test_no_pickle(content):
    with pytest.raises(UserError, match='"x.bin" is no .bin of pairs: .*; copy it anew.'):
        bin_pairs(content, "x.bin")


# --- Alignment


def test_golden_similarities():
    expected = golden("alignment.npz")
    np.testing.assert_array_equal(expected["template"], TEMPLATE)
    for landmarks, matrix in zip(expected["landmarks"], expected["matrices"], strict=True):
        found = similarity(landmarks, template(112))
        np.testing.assert_allclose(found, matrix, rtol=0, atol=1e-12)
        assert np.linalg.det(found[:, :2]) > 0


@pytest.mark.parametrize("crop", [2, 3])
def test_golden_crops(crop):
    arrays = golden("alignment.npz")
    image, matrix, y = (arrays[f"crop/{crop}/{name}"] for name in ("image", "matrix", "y"))
    np.testing.assert_allclose(warped(image, matrix, 112, 112), y, rtol=0, atol=1e-5)
    landmarks = arrays[f"crop/{crop}/landmarks"]
    wide, narrow = aligned(image, landmarks, 112), aligned(image, landmarks, 96)
    # Rounded golden pixels; the golden ones have float32's error.
    assert np.abs(wide - y.astype(np.float64)).max() <= 0.5 + 1e-5
    np.testing.assert_array_equal(narrow, wide[:, 8:104])


def test_beyond_the_image_is_zero():
    image = np.full((3, 4, 1), 200, np.uint8)
    moved = warped(image, np.array([[1, 0, 0.25], [0, 1, 1.0]]), 6, 7)[..., 0]
    expected = np.zeros((6, 7))
    expected[1:4, :5] = [150, 200, 200, 200, 50]
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-12)
    far = np.array([[1, 0, 1e9], [0, 1, -1e9]])
    assert not warped(image, far, 6, 7).any()


FLAT = [[10, 10], [20, 20], [15, 15], [12, 12], [18, 18]]


@pytest.mark.parametrize(
    "landmarks,said",
    [
        (FLAT, "its landmarks lie on one line or in one point"),
        ([[7.3, 8.1]] * 5, "its landmarks lie on one line or in one point"),
        (TEMPLATE + np.array([np.nan, 0]), "its landmarks are not all numbers"),
        (
            TEMPLATE + np.array([60, 0]),
            "its landmark 133.532, 51.5014 is outside the image of 120",
        ),
        (
            TEMPLATE - np.array([0, 53]),
            "its landmark 38.2946, -1.3037 is outside",
        ),
    ],
)
def test_bad_landmarks(landmarks, said):
    with pytest.raises(BadLandmarksError, match=said):
        aligned(np.zeros((112, 120, 3), np.uint8), np.array(landmarks), 112)


# --- The command


FACES = ("Ann/1.png", "Ann/2.jpg", "deep/er/Bob/1.webp")


def face(seed):
    """An image of 130 x 140 and landmarks in it."""
    generator = np.random.default_rng(seed)
    image = Image.fromarray(generator.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return image.resize((140, 130)), TEMPLATE + generator.uniform(-8, 8, (5, 2))


@pytest.fixture
def tree(tmp_path):
    """A folder of images, and their landmarks."""
    root, landmarks = tmp_path / "images", {}
    for seed, name in enumerate(FACES):
        image, landmarks[name] = face(seed)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    return root, landmarks


def lines_of(landmarks, separator=" "):
    rows = ([name, *map(repr, map(float, points.flat))] for name, points in landmarks.items())
    return "".join(separator.join(row) + "\n" for row in rows)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command; its exit status, and what it has said on stdout and stderr."""
    out = tmp_path / "out"

    def run(images, landmarks, *options, suffix=".txt"):
        file = tmp_path / f"landmarks{suffix}"
        file.write_text(landmarks)
        arguments = [images, file, "--out", out, "--threads", "2", *options]
        monkeypatch.setattr(sys, "argv", ["align", *map(str, arguments)])
        status = 0
        try:
            align.main()
        except SystemExit as exit:
            status = exit.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", ["blanks", "csv with titles", "json", "zip"])
def test_alignment_of_a_tree(tree, command, tmp_path, kind):
    root, landmarks = tree
    text, suffix = lines_of(landmarks), ".txt"
    if kind == "csv with titles":
        titles = ",".join(["path", *(f"{axis}{i}" for i in range(1, 6) for axis in "xy")])
        text, suffix = f"3\n{titles}\n\n{lines_of(landmarks, ',')}", ".csv"
    elif kind == "json":
        text, suffix = json.dumps({n: p.tolist() for n, p in landmarks.items()}), ".json"
    elif kind == "zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for name in FACES:
                archive.write(root / name, name)
        root = tmp_path / "images.zip"
    status, out, err = command(root, text, suffix=suffix)
    assert (status, err) == (0, "")
    assert "3 faces aligned, 0 were there already, 0 skipped; see " in out
    written = ["Ann/1.png", "Ann/2.png", "deep/er/Bob/1.png"]
    assert files_in(tmp_path / "out") == [".alignment.json", *written]
    for name, result in zip(FACES, written, strict=True):
        expected = aligned(upright((tree[0] / name).read_bytes()), landmarks[name], 112)
        with Image.open(tmp_path / "out" / result) as image:
            np.testing.assert_array_equal(np.asarray(image), expected)


def test_narrow_jpegs(tree, command, tmp_path):
    root, landmarks = tree
    status, _, _ = command(root, lines_of(landmarks), "--size", "112x96", "--format", "jpeg")
    assert status == 0
    with Image.open(tmp_path / "out/Ann/1.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (96, 112))
        expected = aligned(upright((root / FACES[0]).read_bytes()), landmarks[FACES[0]], 96)
        assert np.abs(np.asarray(image, np.float64) - expected).mean() < 2


def test_what_is_there_is_left(tree, command, tmp_path):
    root, landmarks = tree
    lines = lines_of(landmarks)
    command(root, lines)
    done, missing = tmp_path / "out/Ann/1.png", tmp_path / "out/Ann/2.png"
    before = missing.read_bytes()
    done.write_bytes(b"mine")
    missing.unlink()
    (tmp_path / "out/Ann/.tmp-2.png").write_bytes(b"half")
    status, out, _ = command(root, lines)
    assert status == 0 and "1 faces aligned, 2 were there already, 0 skipped" in out
    assert done.read_bytes() == b"mine" and missing.read_bytes() == before
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    (root / FACES[0]).unlink()
    status, _, err = command(root, lines, "--size", "112x96")
    assert status == 2
    assert "holds images of other options ({'size': '112x112', 'format': 'png'}); give" in err
    assert missing.read_bytes() == before


def test_broken_images_and_bad_landmarks_are_named(tree, command, tmp_path):
    root, landmarks = tree
    for name in ("broken.png", "flat.png", "outside.png", "Ann/2.png", "lonely.png"):
        face(9)[0].save(root / name)
    (root / "broken.png").write_bytes(b"no image")
    landmarks |= {"broken.png": TEMPLATE, "Ann/2.png": TEMPLATE, "nobody.png": TEMPLATE}
    landmarks |= {"flat.png": np.array(FLAT), "outside.png": TEMPLATE + 90}
    status, out, err = command(root, lines_of(landmarks))
    assert status == 0 and "3 faces aligned, 0 were there already, 4 skipped" in out
    lines = err.splitlines()
    assert lines[0] == (f'left out: 1 file of "{root}" without landmarks, as "lonely.png"')
    assert lines[1] == (
        f'left out: 1 file named in "{tmp_path / "landmarks.txt"}" that "{root}" lacks, as '
        '"nobody.png"'
    )
    assert (
        sorted(lines[2:])
        == [
            'skipped Ann/2.png: "Ann/2.jpg" becomes the same file',
            "skipped broken.png: it is not an image of a format that Pillow reads",
            "skipped flat.png: its landmarks lie on one line or in one point",
            "skipped outside.png: its landmark 128.295, 141.696 is outside the image of 140 x 130 "
            "pixels",
        ]
        or sorted(lines[2:])[0] == 'skipped Ann/2.jpg: "Ann/2.png" becomes the same file'
    )


def test_nothing_can_be_aligned(tree, command, tmp_path):
    root, landmarks = tree
    lines = lines_of(landmarks)
    out = tmp_path / "out"

    def refused(said, images=root, text=lines, *options, suffix=".txt"):
        status, _, err = command(images, text, *options, suffix=suffix)
        assert status == 2
        assert said in err

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(f'error: "{empty}" holds no files.', empty)
    refused('there is no "', tmp_path / "nowhere")
    refused("has no landmarks of any file of", root / "Ann")
    refused("its paths must be those within", root, lines.replace("/", "_"))
    refused(f'"{tmp_path / "landmarks.txt"}" has no landmarks.', root, "")
    refused(f'"{tmp_path / "landmarks.txt"}" has no landmarks.', root, "neither\nof these\n")
    refused("line 2 of", root, lines.splitlines()[0] + "\nAnn/3.png 1 2 3\n")
    refused("must be PATH x1 y1 ... x5 y5, got", root, "a.png" + " 1" * 9 + " x\n" + lines)
    refused("line 4 of", root, lines + lines.splitlines()[0])
    refused("is no JSON: ", root, "{", suffix=".json")
    refused('must be {"PATH": [[x1, y1], ... [x5, y5]]}.', root, "[]", suffix=".json")
    refused('the landmarks of "a" in', root, '{"a": [[1, 2]]}', suffix=".json")
    refused("--threads must be at least 1, got 0.", root, lines, "--threads", "0")
    refused(f'--out: "{root / "x"}" is within "{root}"', root, lines, "--out", str(root / "x"))
    assert not out.exists()
    for name in FACES:
        (root / name).write_bytes(b"")
    refused("none of the 3 faces could be aligned; see above.")
    assert files_in(out) == [".alignment.json"]


def test_a_folder_that_cannot_be_written(tree, command, tmp_path):
    root, landmarks = tree
    (tmp_path / "out").write_text("a file")
    status, _, err = command(root, lines_of(landmarks))
    assert status == 2
    assert err.startswith(f'error: --out: "{tmp_path / "out"}" cannot be written: ')
