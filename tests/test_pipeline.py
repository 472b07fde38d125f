"""Images from a disk, and batches of them."""

import errno
import gzip
import io
import itertools
import json
import multiprocessing
import pathlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps
from runs import SMALL, finish, start

from experiments.classification.feed import LabelledImages
from experiments.convert.__main__ import main as convert_main
from experiments.runtime import data, images, sources
from experiments.runtime.errors import DataLost, UserError
from experiments.runtime.images import BrokenImageError
from experiments.runtime.pipeline import Loading, Share
from experiments.runtime.sources import ArraySplit

SIZE, COUNT = 12, 7  # of images in a class of the training split


def encoded(pixels, kind="png", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two classes of images, each of one colour that is its own."""
    root = tmp_path_factory.mktemp("images")
    colours = itertools.count(10, 7)
    for split, count in (("train", COUNT), ("test", 3)):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((18 + i, 24, 3), next(colours), np.uint8)
                (folder / f"{i}.png").write_bytes(encoded(pixels))
    return root


def feed(split, processes=1, process=0, augment="none", seed=0, batch=6, **loading):
    share = Share(batch, process, processes)
    return LabelledImages(split, split, share, SIZE, augment, True, seed, Loading(**loading))


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(batch.index, other.index)
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch.arrays[name], other.arrays[name])


@pytest.fixture(scope="module", params=["memory", "disk"])
def splits(request, tree):
    dataset = data.load(f"folder:{tree}", SIZE, hold=request.param)
    assert isinstance(dataset.train, ArraySplit) == (request.param == "memory")
    return dataset


def test_the_seed_is_the_order(splits):
    batches = take(feed(splits.train).training(0), 6)
    assert_same(batches, take(feed(splits.train).training(0), 6))
    others = take(feed(splits.train, seed=1).training(0), 6)
    assert [b.index.tolist() for b in batches] != [b.index.tolist() for b in others]
    first, second = batches[:2], batches[2:4]  # two epochs
    assert [b.index.tolist() for b in first] != [b.index.tolist() for b in second]


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_every_sample_once_for_any_number_of_processes(splits, processes):
    parts = [feed(splits.train, processes, process) for process in range(processes)]
    epoch = 2 * COUNT // 6  # two samples are left over
    training = [take(part.training(0), 3 * epoch) for part in parts]
    alone = take(feed(splits.train).training(0), 3 * epoch)
    seen = []
    for shares, whole in zip(zip(*training, strict=True), alone, strict=True):
        indices = np.concatenate([share.index for share in shares])
        assert indices.tolist() == whole.index.tolist()
        seen.append(indices)
        for share in shares:
            assert share.arrays["label"].tolist() == [int(i >= COUNT) for i in share.index]
            colours = [10 + 7 * int(i) for i in share.index]
            np.testing.assert_array_equal(share.arrays["image"][:, 5, 5, 0], colours)
    for i in range(3):
        in_epoch = np.concatenate(seen[i * epoch : (i + 1) * epoch])
        assert len(set(in_epoch.tolist())) == len(in_epoch) == 12
    parts = [feed(splits.test, processes, process, batch=12) for process in range(processes)]
    evaluation = [b for part in parts for b in part.evaluation()]
    indices = np.concatenate([batch.index for batch in evaluation])
    labels = np.concatenate([batch.arrays["label"] for batch in evaluation])
    assert sorted(indices) == [-1] * 6 + list(range(6))
    np.testing.assert_array_equal(labels, np.where(indices < 0, -1, indices >= 3))


@pytest.mark.parametrize("augment", ["none", "resized-crop"])
@pytest.mark.parametrize("step", [1, 5])
def test_going_on_in_the_midst_of_an_epoch(tree, augment, step):
    split = data.load(f"folder:{tree}", SIZE, hold="disk").train
    whole = take(feed(split, augment=augment).training(0), 8)
    assert_same(take(feed(split, augment=augment).training(step), 8 - step), whole[step:])


def test_worker_processes_change_nothing(tree):
    split = data.load(f"folder:{tree}", SIZE, hold="disk").train
    alone = take(feed(split, augment="resized-crop").training(0), 5)
    assert_same(take(feed(split, augment="resized-crop", workers=2).training(0), 5), alone)


@pytest.fixture
def broken_tree(tree, tmp_path):
    """The tree, with an image in each split that is none."""
    shutil.copytree(tree, tmp_path / "images")
    for path in ("train/dog/2.png", "test/cat/1.png"):
        (tmp_path / "images" / path).write_bytes(b"no image")
    return tmp_path / "images"


@pytest.mark.parametrize("augment,workers", [("none", 0), ("resized-crop", 0), ("none", 1)])
def test_another_image_takes_the_place_of_a_broken_one(broken_tree, augment, workers):
    split = data.load(f"folder:{broken_tree}", SIZE, hold="disk").train
    (broken,) = (i for i in range(2 * COUNT) if split.name_of(i) == "train/dog/2.png")
    batches = take(feed(split, augment=augment, batch=14, workers=workers).training(0), 2)
    stand_ins = set()
    for batch in batches:
        assert batch.broken == {broken: "it is not an image of a format that Pillow reads"}
        assert batch.arrays["label"].tolist() == [int(i >= COUNT) for i in batch.index]
        colours = [10 + 7 * int(i) for i in batch.index]
        np.testing.assert_array_equal(batch.arrays["image"][:, 5, 5, 0], colours)
        whole = [i for i in range(2 * COUNT) if i != broken]
        (twice,) = (np.bincount(batch.index, minlength=14) - np.isin(range(14), whole)).nonzero()
        stand_ins |= set(twice.tolist())
    assert len(stand_ins) == 1  # the same in every epoch
    assert_same(take(feed(split, augment=augment, batch=14).training(1), 1), batches[1:])
    for processes in (1, 2):
        parts = [feed(split, processes, i, augment, batch=14) for i in range(processes)]
        shares = [next(part.training(1)) for part in parts]  # going on with the second
        found = np.concatenate([share.index for share in shares])
        assert found.tolist() == batches[1].index.tolist()
        assert {k for share in shares for k in share.broken} == {broken}


def test_a_broken_image_does_not_count_in_evaluation(broken_tree):
    split = data.load(f"folder:{broken_tree}", SIZE, hold="disk").test
    (batch,) = feed(split, batch=8).evaluation()
    assert batch.arrays["label"].tolist() == [0, -1, 0, 1, 1, 1, -1, -1]
    assert batch.index.tolist() == [0, 1, 2, 3, 4, 5, -1, -1] and set(batch.broken) == {1}


@pytest.mark.parametrize("kind,workers", [("folder", 0), ("zip", 0), ("records", 0), ("folder", 1)])
def test_data_that_goes_away(kind, workers, tree, tmp_path):
    where = tmp_path / "data"
    if kind == "folder":
        shutil.copytree(tree, where)
    elif kind == "zip":
        where = pathlib.Path(shutil.make_archive(where, "zip", tree))
    else:
        converted(tree, where)
    source = f"arrayrecord:{where}" if kind == "records" else f"folder:{where}"
    dataset = data.load(source, SIZE, hold="disk")
    lost = r"cannot be read any more: No such|is not the file any more"
    if kind == "records":  # a file that is open can be read though it has no name any more
        for file in where.glob("*.arrayrecord"):
            file.write_bytes(b"")
    else:
        shutil.rmtree(where) if where.is_dir() else where.unlink()
    for batches in (
        feed(dataset.train, workers=workers).training(0),
        feed(dataset.test, workers=workers).evaluation(),
    ):
        with pytest.raises(DataLost, match=f'^"{where}.*" ({lost})'):
            take(batches, 3)


def test_half_of_the_images_may_go_away_but_not_more(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "images")
    split = data.load(f"folder:{tmp_path / 'images'}", SIZE, hold="disk").train
    for i in range(COUNT):
        (tmp_path / "images" / "train" / "cat" / f"{i}.png").unlink()
    for batch in take(feed(split, batch=2).evaluation(), 7):
        assert all((batch.arrays["label"] < 0) == (batch.index < COUNT))
    for i in range(3):
        (tmp_path / "images" / "train" / "dog" / f"{i}.png").unlink()
    for batches in (feed(split, batch=2).training(0), feed(split, batch=2).evaluation()):
        with pytest.raises(DataLost, match="images in a row cannot be read, as train/.*: No such"):
            take(batches, 50)
    shutil.rmtree(tmp_path / "images" / "train")  # the root is there still
    with pytest.raises(DataLost, match="none of 32 images drawn can be read"):
        next(feed(split, batch=2).training(0))


def test_a_disk_that_fails_is_no_broken_image(tree, monkeypatch):
    dataset = data.load(f"folder:{tree}", SIZE, hold="disk")

    def read_bytes(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    for batches in (feed(dataset.train).training(0), feed(dataset.test).evaluation()):
        with pytest.raises(DataLost, match="cannot be read any more: Input/output error"):
            next(batches)
    with pytest.raises(UserError, match=r"--data: .* any more: Input/output error"):
        data.load(f"folder:{tree}", SIZE)


def test_workers_leave_nothing_behind(tree):
    split = data.load(f"folder:{tree}", SIZE, hold="disk").train
    shared = set(pathlib.Path("/dev/shm").glob("psm_*"))
    batches = feed(split, workers=2).training(0)
    batch = next(batches)
    assert not set(pathlib.Path("/dev/shm").glob("psm_*")) - shared
    assert type(batch.arrays["image"]) is np.ndarray
    multiprocessing.active_children()[0].kill()
    with pytest.raises(DataLost, match="a process that reads images has ended"):
        take(batches, 20)
    assert not multiprocessing.active_children()


def convert(*arguments):
    command = [sys.executable, "-m", "experiments.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def converted(tree, out, per_file=5):
    """A folder of ArrayRecord files."""
    dataset = data.on_disk(f"folder:{tree}")
    out.mkdir(exist_ok=True)
    splits = {"train": dataset.train, "test": dataset.test}
    list(sources.replace_records(splits, dataset.classes, out, per_file, seed=0))
    return out


def samples_of(split):
    """All samples by name."""
    return {split.name_of(i): tuple(split[i]) for i in range(len(split))}


def test_array_records_are_the_folder(tree, tmp_path):
    result = convert(f"folder:{tree}", tmp_path / "records", "--per-file", 5)
    assert result.returncode == 0, result.stderr
    files = sorted(path.name for path in (tmp_path / "records").glob("train-*"))
    assert files == [f"train-0000{i}-of-00003.arrayrecord" for i in range(3)]
    records = data.load(f"arrayrecord:{tmp_path / 'records'}", SIZE, hold="disk")
    folder = data.load(f"folder:{tree}", SIZE, hold="disk")
    assert records.classes == folder.classes == ("cat", "dog")
    for name in ("train", "test"):
        ours, theirs = getattr(records, name), getattr(folder, name)
        assert samples_of(ours) == samples_of(theirs)
    # The order is drawn at random.
    assert len({records.train[i].label for i in range(COUNT)}) == 2
    (batch,) = take(feed(records.train, workers=1).training(0), 1)
    colours = [ours[:2] for ours in batch.arrays["image"][:, 5, 5]]
    names = [records.train.name_of(i) for i in batch.index]
    expected = [images.squashed(samples_of(folder.train)[n][0], SIZE)[5, 5, :2] for n in names]
    np.testing.assert_array_equal(colours, expected)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda path: None, "has no classes.json"),
        (lambda path: (path / "classes.json").write_text("["), "has no classes.json that can"),
        (lambda path: (path / "classes.json").write_text("[]"), "has no train-*.arrayrecord"),
    ],
)
def test_no_array_records(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError) as refused:
        data.load(f"arrayrecord:{tmp_path}", SIZE)
    assert message in str(refused.value)


def flip_a_byte(path, content):
    """In a file, somewhere within the content."""
    whole = bytearray(path.read_bytes())
    whole[whole.index(content[: len(content) // 2]) + len(content) // 4] ^= 255
    path.write_bytes(whole)


def test_a_damaged_record_is_named_and_left_out(tree, tmp_path):
    folder = converted(tree, tmp_path / "records", per_file=14)
    whole = data.load(f"arrayrecord:{folder}", SIZE, hold="disk").train
    flip_a_byte(next(folder.glob("train-*")), whole[3].content)
    dataset = data.load(f"arrayrecord:{folder}", SIZE, hold="disk")
    (batch,) = take(feed(dataset.train, batch=14).training(0), 1)
    ((broken, why),) = batch.broken.items()
    assert broken == 3 and "its record is damaged" in why and (batch.arrays["label"] >= 0).all()
    assert dataset.train.name_of(3) == "train record 3"
    assert [line.split(":")[0] for line in data.load(f"arrayrecord:{folder}", 16).skipped] == [
        "train record 3"
    ]


def test_converting_again_replaces_all_of_it(tree, tmp_path):
    out = converted(tree, tmp_path / "records", per_file=2)
    converted(tree, out, per_file=14)
    assert sorted(path.name for path in out.iterdir()) == [
        "classes.json",
        "test-00000-of-00001.arrayrecord",
        "train-00000-of-00001.arrayrecord",
    ]
    before = {path: path.read_bytes() for path in out.iterdir()}
    dataset = data.on_disk(f"folder:{tree}")

    class Lost:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise DataLost("gone")

    with pytest.raises(DataLost):
        list(sources.replace_records({"train": dataset.test, "test": Lost()}, [], out, 5, 0))
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_record_files_that_are_not_one_set(tree, tmp_path):
    folder = converted(tree, tmp_path / "records")
    whole = (folder / "train-00001-of-00003.arrayrecord").read_bytes()
    (folder / "train-00001-of-00003.arrayrecord").unlink()
    with pytest.raises(UserError, match=r"--data: .* has no train-00001-of-00003.arrayrecord"):
        data.load(f"arrayrecord:{folder}", SIZE)
    (folder / "train-00001-of-00003.arrayrecord").write_bytes(whole)
    (folder / "train-00000-of-00002.arrayrecord").write_bytes(whole)
    with pytest.raises(UserError, match="train-.*.arrayrecord in .* are of several sets"):
        data.load(f"arrayrecord:{folder}", SIZE)
    (folder / "train-00000-of-00002.arrayrecord").unlink()
    (folder / "train-00001-of-00003.arrayrecord").write_bytes(whole[:1000])
    with pytest.raises(UserError, match="the files of .* cannot be read: .*convert"):
        data.load(f"arrayrecord:{folder}", SIZE)


@pytest.mark.parametrize(
    "classes,message",
    [
        (
            ["cat"],
            "the train split of .* has 7 images with labels as 1, but labels of .* from 0 to 0",
        ),
        (["cat", "dog", "emu"], None),
        ({"cat": 0}, "must be a list of the names of classes"),
    ],
)
def test_labels_of_records(classes, message, tree, tmp_path):
    folder = converted(tree, tmp_path / "records")
    (folder / "classes.json").write_text(json.dumps(classes))
    if message is None:  # a class that has no images in either split
        assert data.load(f"arrayrecord:{folder}", SIZE, hold="disk").classes == tuple(classes)
        return
    with pytest.raises(UserError, match=message):
        data.load(f"arrayrecord:{folder}", SIZE, hold="disk")


def test_what_convert_refuses_and_leaves_out(tree, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        convert_main()
        return capsys.readouterr()

    for source in ("digits", "idx:x", "folder:/nowhere"):
        with pytest.raises(SystemExit):
            run(source, tmp_path / "out")
        error = capsys.readouterr().err
        assert error.startswith("error: SOURCE") and "--" not in error and "Traceback" not in error
    shutil.copytree(tree, tmp_path / "images")
    path = tmp_path / "images" / "train" / "cat" / "0.png"
    path.chmod(0)
    read = pathlib.Path.read_bytes

    def read_bytes(self):  # of root too
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(self)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    said = run(f"folder:{tmp_path / 'images'}", tmp_path / "out")
    assert said.err.endswith("skipped train/cat/0.png: Permission denied\n")
    assert "13 training and 6 test images in 2 classes" in said.out
    assert len(data.on_disk(f"arrayrecord:{tmp_path / 'out'}").train) == 13


def test_a_data_set_of_hugging_face(tree, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = data.load(f"folder:{tree}", SIZE, hold="disk")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    parts = {}
    for name, split in (("train", folder.train), ("validation", folder.test)):
        samples = [split[i] for i in range(len(split))]
        columns = {
            "img": [{"bytes": sample.content, "path": None} for sample in samples],
            "label": [sample.label for sample in samples],
        }
        parts[name] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    found = data.load(f"hf:{tmp_path / 'saved'}", SIZE, hold="disk")
    assert found.classes == ("cat", "dog") and found.train.name_of(3) == "train row 3"
    assert [tuple(found.test[i]) for i in range(6)] == [tuple(folder.test[i]) for i in range(6)]
    in_memory = data.load(f"hf:{tmp_path / 'saved'}", SIZE)
    expected = data.load(f"folder:{tree}", SIZE)
    np.testing.assert_array_equal(in_memory.train.images, expected.train.images)
    del parts["validation"]
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "half")
    with pytest.raises(UserError, match='"train" and one of test, val, validation, got train'):
        data.load(f"hf:{tmp_path / 'half'}", SIZE)


@pytest.fixture
def hugging_face(tree, tmp_path):
    """Saves splits of (encoded image, label) and loads them."""
    datasets = pytest.importorskip("datasets")

    def save(splits, names=("cat", "dog"), others=None, **options):
        parts = {}
        for name, rows in splits.items():
            columns = {
                "img": [row[0] and {"bytes": row[0], "path": None} for row in rows],
                "label": [row[1] for row in rows],
            }
            order = (others or {}).get(name, names)
            kinds = {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(order))}
            parts[name] = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "hf")
        return data.load(f"hf:{tmp_path / 'hf'}", SIZE, **options)

    return save


ROWS = [(encoded(np.full((9, 9, 3), 20 * i, np.uint8)), i % 2) for i in range(6)]
UNLABELLED = [(image, -1) for image, _ in ROWS]


@pytest.mark.parametrize("hold", ["memory", "disk"])
def test_a_split_without_labels_is_not_used(hold, hugging_face):
    found = hugging_face({"train": ROWS, "test": UNLABELLED, "validation": ROWS[:4]}, hold=hold)
    assert found.left_out == ('the split "test", which has no labels, as "validation" is held out',)
    assert [batch.arrays["label"].tolist() for batch in feed(found.test, batch=4).evaluation()] == [
        [0, 1, 0, 1]
    ]
    some = [(image, None if i < 2 else label) for i, (image, label) in enumerate(ROWS)]
    found = hugging_face({"train": some, "test": ROWS}, hold=hold)
    assert found.left_out == ('2 rows without a label in the split "train"',)
    assert found.train.name_of(0) == "train row 2" and len(found.train) == 4


@pytest.mark.parametrize(
    "splits,message",
    [
        ({"train": ROWS, "test": UNLABELLED}, "no row of .* has a label in test"),
        ({"train": UNLABELLED, "test": ROWS}, "no row of .* has a label in train"),
        ({"train": ROWS, "test": ROWS[::2]}, 'class "dog" has no image in the test split'),
    ],
)
def test_labels_of_hugging_face(splits, message, hugging_face):
    with pytest.raises(UserError, match=f"--data: {message}"):
        hugging_face(splits)


def test_classes_of_hugging_face_go_by_name(hugging_face):
    splits = {"train": ROWS, "test": ROWS}
    found = hugging_face(splits, others={"test": ["dog", "cat"]})
    assert found.train.labels.tolist() == [0, 1] * 3 and found.test.labels.tolist() == [1, 0] * 3
    with pytest.raises(UserError, match='not the same classes in "test" as in "train": dog, emu'):
        hugging_face(splits, others={"test": ["cat", "emu"]})
    later = {name: [(image, label + 1) for image, label in ROWS] for name in splits}
    found = hugging_face(later, names=["N/A", "cat", "dog"])
    assert found.classes == ("cat", "dog") and found.test.labels.tolist() == [0, 1] * 3


@pytest.mark.parametrize("hold", ["memory", "disk"])
def test_a_row_without_an_image_is_skipped(hold, hugging_face):
    found = hugging_face({"train": [(None, 0), *ROWS], "test": ROWS}, hold=hold)
    if hold == "memory":
        assert found.skipped == ("train row 0: the row has no image",)
        return
    (batch,) = take(feed(found.train, batch=7).training(0), 1)
    assert batch.broken == {0: "the row has no image"}
    assert found.train.name_of(0) == "train row 0"


@pytest.mark.parametrize(
    "names,flips",
    [
        (["0", "1"], False),
        (["zero", "One"], False),
        (["A", "b"], False),
        (["3", "10"], False),
        (["cat", "10"], True),
    ],
)
def test_characters_are_not_mirrored(names, flips, hugging_face):
    found = hugging_face({"train": ROWS, "test": ROWS}, names=names)
    assert found.flips == flips


def write_idx(path, values, packed):
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(packed, tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 255, (9, 28, 28)), np.arange(9) % 3
    for part, count in (("train", 9), ("t10k", 3)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", pixels[:count], packed)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels[:count], packed)
    found = data.load(f"idx:{tmp_path}", 28)
    assert found.classes == ("0", "1", "2") and not found.flips
    np.testing.assert_array_equal(found.train.images, np.repeat(pixels[..., None], 3, -1))
    np.testing.assert_array_equal(found.test.labels, labels[:3])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels[:2], packed)
    with pytest.raises(UserError, match="3 images with 2 labels"):
        data.load(f"idx:{tmp_path}", 28)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels[:1].repeat(3), packed)
    with pytest.raises(UserError, match='class "1" has no image in the test split'):
        data.load(f"idx:{tmp_path}", 28)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", pixels[0], packed)
    with pytest.raises(UserError, match="is no idx file of bytes in 1 dimensions"):
        data.load(f"idx:{tmp_path}", 28)


def test_idx_labels_that_do_not_begin_at_0(tmp_path):
    """As those of EMNIST's letters do, which are 1 to 26."""
    labels = np.array([1, 26, 3, 3, 26, 1])
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", np.zeros((6, 28, 28)), packed=False)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels, packed=False)
    found = data.load(f"idx:{tmp_path}", 28)
    assert found.classes == ("1", "3", "26")
    assert found.train.labels.tolist() == found.test.labels.tolist() == [0, 2, 1, 1, 2, 0]
    path = tmp_path / "t10k-labels-idx1-ubyte"
    for content in (b"", b"\0\0\10\1\0", gzip.compress(path.read_bytes())[:-12] + b"x" * 12):
        path.write_bytes(content)
        path.with_name(f"{path.name}.gz").write_bytes(content)
        for _ in range(2):
            with pytest.raises(UserError, match="cannot be read|is no idx file"):
                data.load(f"idx:{tmp_path}", 28)  # the packed file, and then the other
            path.with_name(f"{path.name}.gz").unlink(missing_ok=True)


def names_in(split):
    return [split.name_of(i) for i in range(len(split))]


def test_which_files_of_a_tree_are_images(tree, tmp_path):
    """Links are followed, folders below a class's are read, and what is hidden is not there."""
    where = tmp_path / "images"
    shutil.copytree(tree, where)
    (where / "train" / "dog").rename(tmp_path / "dogs")
    (where / "train" / "dog").symlink_to(tmp_path / "dogs")
    (where / "train" / "cat" / "all").symlink_to(where / "train")  # a circle
    image = Image.fromarray(np.full((9, 9, 3), 7, np.uint8))
    below = where / "train" / "cat" / "more" / "still"
    below.mkdir(parents=True)
    suffixes = ["pgm", "jfif", "avif", "jp2", "tga", "jpe", "PNG", "Webp"]
    for suffix in suffixes:
        image.save(below / f"x.{suffix}")
    for hidden in (
        "train/.ipynb_checkpoints/x.png",
        "__MACOSX/train/cat/x.png",
        "test/cat/._0.png",
    ):
        (where / hidden).parent.mkdir(parents=True, exist_ok=True)
        image.save(where / hidden)
    for name in ("train/cat/.DS_Store", "train/cat/Thumbs.db", "train/cat/a.txt", "train/b.TXT"):
        (where / name).write_text("x")
    (where / "train" / "cat" / "x.pdf").write_text("x")
    image.save(where / "train" / "alone.png")
    (where / "train" / "cat" / "lost.png").symlink_to("nowhere")
    found = data.load(f"folder:{where}", SIZE, hold="disk")
    assert found.classes == ("cat", "dog")
    cats = {f"train/cat/{i}.png" for i in range(COUNT)}
    cats |= {f"train/cat/more/still/x.{suffix}" for suffix in suffixes}
    dogs = {f"train/dog/{i}.png" for i in range(COUNT)}
    assert names_in(found.train) == sorted(cats | dogs)
    labels = {found.train.name_of(i): found.train[i].label for i in range(len(found.train))}
    assert labels == {name: int(name in dogs) for name in cats | dogs}
    assert len(found.test) == 6
    assert found.left_out == (
        '1 link to nothing, or what is no file, as "train/cat/lost.png"',
        "3 files of other kinds than images (.txt 2, .pdf 1)",
        '1 image in no folder of a split and a class, as "train/alone.png"',
    )
    assert not data.load(f"folder:{where}", SIZE).skipped  # all of them can be read


def zip_of(tree, path, name_of=lambda name: name):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(tree.rglob("*.png")):
            archive.write(file, name_of(str(file.relative_to(tree))))
    return path


@pytest.mark.parametrize(
    "name_of",
    [
        lambda name: name.replace("/", "\\"),
        lambda name: f"top\\{name}".replace("/", "\\"),
        lambda name: "data/" + name.replace("/", "\\"),
        lambda name: f"test/{name}",
        lambda name: f"../{name}",
        lambda name: f"/{name}",
        lambda name: name.replace("train/", "Train/").replace("test/", "VALIDATION/"),
    ],
)
def test_paths_in_a_zip(name_of, tree, tmp_path):
    path = zip_of(tree, tmp_path / "x.zip")  # ZipInfo would change the names as it writes them
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "y.zip", "w") as other:
        for info in archive.infolist():
            content = archive.read(info)
            info.filename = info.orig_filename = name_of(info.filename)
            other.writestr(info, content)
    found = data.load(f"folder:{tmp_path / 'y.zip'}", SIZE)
    expected = data.load(f"folder:{tree}", SIZE)
    assert found.classes == expected.classes and not found.left_out
    for name in ("train", "test"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        np.testing.assert_array_equal(ours.images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_a_file_that_a_zip_spells_in_two_ways_is_there_once(tree, tmp_path):
    path = zip_of(tree, tmp_path / "x.zip")
    expected = len(data.load(f"folder:{path}", SIZE).train)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("./train/cat/0.png", (tree / "train" / "cat" / "0.png").read_bytes())
    assert len(data.load(f"folder:{path}", SIZE).train) == expected


def test_a_set_most_of_whose_images_cannot_be_read_is_refused_in_memory_too(tree, tmp_path):
    where = tmp_path / "images"
    shutil.copytree(tree, where)
    for label in ("cat", "dog"):
        for i in range(9):
            (where / "test" / label / f"broken{i}.png").write_bytes(b"text")
    with pytest.raises(UserError, match="18 of 24 images of the test split .* cannot be read; the"):
        data.load(f"folder:{where}", SIZE)


def test_a_name_that_is_twice_in_a_zip(tree, tmp_path):
    path = zip_of(tree, tmp_path / "x.zip")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/cat/0.png", encoded(np.full((9, 9, 3), 200, np.uint8)))
    found = data.load(f"folder:{path}", SIZE)
    assert len(found.train) == 2 * COUNT and found.train.images[0, 0, 0, 0] == 200  # the last


def test_an_encrypted_zip(tree, tmp_path):
    path = zip_of(tree, tmp_path / "x.zip")
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        content[at + 8] |= 1
        at = content.find(b"PK\x01\x02", at + 1)
    path.write_bytes(content)
    with pytest.raises(UserError, match="is encrypted; give a zip without a password"):
        data.load(f"folder:{path}", SIZE)


@pytest.mark.parametrize("copies", [("x", "y"), ("", "backup"), ("a/b", "a")])
@pytest.mark.parametrize("packed", [True, False])
def test_a_tree_that_is_there_twice(copies, packed, tree, tmp_path):
    for copy in copies:
        shutil.copytree(tree, tmp_path / "images" / copy, dirs_exist_ok=True)
    where = tmp_path / "images"
    if packed:
        where = zip_of(where, tmp_path / "x.zip")
    with pytest.raises(UserError, match="holds two trees of images") as refused:
        data.load(f"folder:{where}", SIZE)
    for copy in copies:
        assert f'"{copy or "."}"' in str(refused.value)


def test_classes_that_are_named_like_splits(tree, tmp_path):
    for split, kind in (("train", "train"), ("test", "test")):
        for old, new in (("cat", "train"), ("dog", "test/below")):
            shutil.copytree(tree / split / old, tmp_path / kind / new)
    found = data.load(f"folder:{tmp_path}", SIZE)
    assert found.classes == ("test", "train") and len(found.train) == 2 * COUNT


def test_which_split_is_held_out(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "images")
    where = tmp_path / "images"
    shutil.copytree(where / "test", where / "val")
    found = data.load(f"folder:{where}", SIZE)
    assert len(found.test) == 6 and found.test.name_of(0) == "test/cat/0.png"
    assert found.left_out == ('6 images of "val", as "test" is held out',)
    shutil.rmtree(where / "test" / "dog")
    (where / "test" / "cat").rename(where / "test" / "unknown")  # as of a test without labels
    found = data.load(f"folder:{where}", SIZE)
    assert found.test.name_of(0) == "val/cat/0.png"
    assert found.left_out == ('3 images of "test", as "val" is held out',)
    shutil.copytree(where / "train", where / "Train")
    with pytest.raises(UserError, match='two folders for one split, "Train" and "train"'):
        data.load(f"folder:{where}", SIZE)


def test_the_identity_of_data(tree, tmp_path):
    """Moved or packed it is the same; another image, label or name of a class makes another."""

    def identity(source, **options):
        found = data.load(source, SIZE, **options).identity()
        assert json.loads(json.dumps(found)) == found
        return found

    where = tmp_path / "images"
    shutil.copytree(tree, where)
    archive = zip_of(tree, tmp_path / "x.zip", lambda name: f"top/{name}")
    records = converted(tree, tmp_path / "records")
    kept = {
        (source, hold): identity(source, hold=hold)
        for source in (f"folder:{where}", f"folder:{archive}", f"arrayrecord:{records}")
        for hold in ("memory", "disk")
    }
    for hold in ("memory", "disk"):
        assert kept[f"folder:{where}", hold] == kept[f"folder:{archive}", hold]
    assert kept[f"folder:{where}", "disk"] == identity(f"folder:{tree}", hold="disk")
    shutil.move(records, tmp_path / "moved")
    moved = f"arrayrecord:{tmp_path / 'moved'}"
    assert identity(moved, hold="disk") == kept[f"arrayrecord:{records}", "disk"]

    def differing(hold):
        now = identity(f"folder:{where}", hold=hold)
        return {name for name, value in kept[f"folder:{where}", hold].items() if now[name] != value}

    path = where / "train" / "cat" / "0.png"
    content = path.read_bytes()
    changes = {
        "a pixel": lambda: path.write_bytes(encoded(np.full((18, 24, 3), 11, np.uint8))),
        "a label": lambda: path.rename(where / "train" / "dog" / "x.png"),
        "one less": lambda: path.unlink(),
    }
    for change in changes.values():
        change()
        for hold in ("memory", "disk"):
            assert "training digest" in differing(hold) <= {"training digest", "training images"}
        (where / "train" / "dog" / "x.png").unlink(missing_ok=True)
        path.write_bytes(content)
    for split in ("train", "test"):
        (where / split / "dog").rename(where / split / "wolf")
    assert "class names" in differing("disk") and "class names" in differing("memory")
    first, second = (data.load("digits", size).identity() for size in (8, 16))
    assert first == second and first["classes"] == 10


def test_the_identity_of_hugging_face_data(hugging_face):
    def identity(rows, test=ROWS):
        return hugging_face({"train": rows, "test": test}, hold="disk").identity()

    whole = identity(ROWS)
    assert whole == identity(ROWS)
    swapped = [(ROWS[0][0], 1), (ROWS[1][0], 0), *ROWS[2:]]
    larger = [(encoded(gradient_image(64, 64)), 0), *ROWS[1:]]
    for rows in (swapped, larger, ROWS[:-1]):
        assert identity(rows)["training digest"] != whole["training digest"]
        assert identity(ROWS, rows)["test digest"] != whole["test digest"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ("digits", SIZE, {"hold": "disk"}),
            '--data digits is held in memory, but --hold is "disk"',
        ),
        (("digits", SIZE, {"whole_images": True}), "but --train.augment is resized-crop; give"),
        (("folder:x.zip", SIZE, {"whole_images": True, "hold": "memory"}), "--hold is"),
        (("folder:", SIZE, {}), 'got "folder:"'),
        (("digits", 7, {}), "--image-size must be at least 8, got 7"),
    ],
)
def test_what_cannot_be_loaded(arguments, message):
    source, size, options = arguments
    with pytest.raises(UserError) as refused:
        data.load(source, size, **options)
    assert message in str(refused.value)


def gradient_image(width, height):
    """Red grows to the right and green downwards, each from 0 to 255."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return pixels


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


GREY16 = np.full((16, 16), 0x8000, np.uint16)
RED = Image.new("RGB", (16, 16), (255, 0, 0))
LAB, SRGB = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))


@pytest.mark.parametrize(
    "content,colour",
    [
        (saved(Image.fromarray(GREY16), "png"), 128),
        (saved(Image.fromarray(GREY16), "tiff"), 128),
        (saved(Image.fromarray(GREY16.astype(">u2")), "tiff"), 128),  # I;16B
        (saved(Image.fromarray(GREY16), "ppm"), 128),
        (saved(Image.fromarray(GREY16 // 256), "ppm"), 0),  # almost black
        (saved(Image.fromarray(GREY16.astype(np.int32)), "tiff"), 128),
        (saved(Image.fromarray((GREY16 // 256).astype(np.int32)), "tiff"), 128),
        (saved(Image.fromarray(GREY16.astype(np.int32) << 15), "tiff"), 128),
        (saved(Image.fromarray(GREY16.astype(np.float32) / 0xFFFF), "tiff"), 128),
        (saved(Image.fromarray(GREY16.astype(np.float32) / 256), "tiff"), 128),
        (saved(Image.fromarray(GREY16.astype(np.float32)), "tiff"), 128),
        (saved(Image.fromarray(np.full((16, 16), np.nan, np.float32)), "tiff"), 0),
        (saved(Image.fromarray(np.full((16, 16), -5, np.float32)), "tiff"), 0),
        (saved(RED.convert("L"), "png"), 76),
        (saved(Image.new("1", (16, 16), 1), "png"), 255),
        (saved(RED.convert("P"), "gif"), (255, 0, 0)),
        (saved(RED.convert("CMYK"), "jpeg"), (254, 0, 0)),
        (saved(RED.convert("YCbCr"), "jpeg"), (254, 0, 0)),
        (saved(ImageCms.profileToProfile(RED, SRGB, LAB, outputMode="LAB"), "tiff"), (251, 5, 4)),
        (saved(RED, "gif", save_all=True, append_images=[Image.new("RGB", (16, 16))]), (255, 0, 0)),
    ],
)
def test_every_mode_in_its_colour(content, colour):
    pixels = images.squashed(content, 8)
    np.testing.assert_allclose(pixels, np.broadcast_to(colour, (8, 8, 3)), atol=1)
    assert (pixels == images.centre_crop(content, 8)).all()


def test_what_is_transparent_is_white():
    glyph = np.zeros((16, 16, 2), np.uint8)
    glyph[:8, :, 1] = 255  # black above, and nothing below, which is black too
    la = Image.fromarray(glyph)
    opaque = Image.new("L", (16, 16), 60)
    opaque.paste(0, (0, 8, 16, 16))
    rgba = la.convert("RGBA")
    contents = [saved(la, "png"), saved(rgba, "png"), saved(rgba, "webp", lossless=True)]
    for content in contents:
        pixels = images.squashed(content, 16)
        assert (pixels[:8] == 0).all() and (pixels[8:] == 255).all()
    for mode, transparent in (("L", 0), ("RGB", (0, 0, 0)), ("P", 0)):
        pixels = images.squashed(saved(opaque.convert(mode), "png", transparency=transparent), 16)
        assert (pixels[:8] == 60).all() and (pixels[8:] == 255).all()
    for mode in ("La", "RGBa", "PA"):
        between = la if mode == "La" else rgba
        pixels = np.asarray(images.as_rgb(between.convert(mode)))
        assert (pixels[:8] == 0).all() and (pixels[8:] == 255).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = Image.fromarray(gradient_image(160, 80))
    content = saved(picture, kind, exif=exif, **({} if kind == "png" else {"quality": 95}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    for decode in (images.squashed, images.centre_crop):
        expected = decode(saved(upright, "png"), 16).astype(int)
        np.testing.assert_allclose(decode(content, 16), expected, atol=4)
    assert upright.size == ((80, 160) if orientation > 4 else (160, 80))


def test_a_damaged_exif_block_is_no_matter():
    content = encoded(gradient_image(64, 64), "jpeg", exif=b"Exif\0\0garbage")
    assert images.squashed(content, 8).shape == (8, 8, 3)


def test_a_centre_crop_is_the_middle():
    crop = images.centre_crop(encoded(gradient_image(640, 320)), 56).astype(int)
    half = 0.875 * 160  # pixels from the middle to an edge
    for channel, length in ((0, 640), (1, 320)):
        values = crop[..., channel] if channel else crop[..., channel].T
        low, high = (255 * (length / 2 + side * half) / length for side in (-1, 1))
        assert abs(values[0].mean() - low) < 4 and abs(values[-1].mean() - high) < 4


@pytest.mark.parametrize("kind,options", [("png", {}), ("jpeg", {"quality": 95})])
def test_random_crops_are_parts_of_the_image(kind, options):
    content = encoded(gradient_image(512, 384), kind, **options)
    generator = np.random.default_rng(0)
    areas, ratios, mirrored = [], [], 0
    for _ in range(200):
        crop = images.random_resized_crop(content, 32, generator, flip=True).astype(float)
        mirrored += crop[:, 0, 0].mean() > crop[:, -1, 0].mean()
        # The values at the edges tell which part it is.
        width = abs(crop[:, -1, 0].mean() - crop[:, 0, 0].mean()) / 255 * 512 * 32 / 31
        height = (crop[-1, :, 1].mean() - crop[0, :, 1].mean()) / 255 * 384 * 32 / 31
        areas.append(width * height / (512 * 384))
        ratios.append(width / height)
    assert min(areas) > 0.06 and max(areas) < 1.05 and 0.4 < np.mean(areas) < 0.55
    assert min(ratios) > 0.7 and max(ratios) < 1.45
    assert 70 < mirrored < 130


def test_a_very_long_image_has_a_crop():
    content = encoded(gradient_image(4000, 10))
    crop = images.random_resized_crop(content, 16, np.random.default_rng(0), flip=False)
    assert crop.shape == (16, 16, 3) and 120 < crop[..., 0].mean() < 135


@pytest.mark.parametrize("content", [b"", b"no image", encoded(gradient_image(64, 64))[:-300]])
def test_a_broken_image_says_why(content):
    for decode in (images.squashed, images.centre_crop):
        with pytest.raises(BrokenImageError, match=r"\w"):
            decode(content, 8)


def test_a_run_from_disk_names_what_it_skipped(tree, tmp_path, env):
    for path in tree.rglob("*.png"):
        copy = tmp_path / "images" / path.relative_to(tree)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "images" / "train" / "cat" / "1.png").write_bytes(b"")
    (tmp_path / "images" / "test" / "dog" / "0.png").write_bytes(b"GIF89a")
    options = ["--train.augment", "resized-crop", "--train.epochs", "2", "--train.batch-size", "7"]
    options += ["--data", f"folder:{tmp_path / 'images'}", "--run-dir", tmp_path / "run"]
    returncode, _, stderr = finish(start(*SMALL, "--image-size", 16, *options, env=env))
    assert returncode == 0, stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [line.split(":")[0] for line in report["skipped"]] == [
        "test/dog/0.png",
        "train/cat/1.png",
    ]
    assert "train/cat/1.png: the file is empty" in report["skipped"]
    assert report["test_accuracy"] * 5 == pytest.approx(round(report["test_accuracy"] * 5))
    assert stderr.count("skipped train/cat/1.png") == 1
