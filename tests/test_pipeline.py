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

import numpy as np
import pytest
from PIL import Image
from runs import SMALL, finish, start

from experiments.runtime import data, images, sources
from experiments.runtime.errors import DataLost, UserError
from experiments.runtime.images import BrokenImageError
from experiments.runtime.pipeline import Loading, Pipeline
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


def pipeline(processes=1, process=0, augment="none", seed=0, batch=6, **loading):
    return Pipeline(
        batch, process, processes, SIZE, augment, flips=True, seed=seed, loading=Loading(**loading)
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name in ("image", "label", "index"):
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.fixture(scope="module", params=["memory", "disk"])
def splits(request, tree):
    dataset = data.load(f"folder:{tree}", SIZE, hold=request.param)
    assert isinstance(dataset.train, ArraySplit) == (request.param == "memory")
    return dataset


def test_the_seed_is_the_order(splits):
    batches = take(pipeline().training(splits.train, 0), 6)
    assert_same(batches, take(pipeline().training(splits.train, 0), 6))
    others = take(pipeline(seed=1).training(splits.train, 0), 6)
    assert [b["index"].tolist() for b in batches] != [b["index"].tolist() for b in others]
    first, second = batches[:2], batches[2:4]  # two epochs
    assert [b["index"].tolist() for b in first] != [b["index"].tolist() for b in second]


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_every_sample_once_for_any_number_of_processes(splits, processes):
    parts = [pipeline(processes, process) for process in range(processes)]
    epoch = 2 * COUNT // 6  # two samples are left over
    training = [take(part.training(splits.train, 0), 3 * epoch) for part in parts]
    alone = take(pipeline().training(splits.train, 0), 3 * epoch)
    seen = []
    for shares, whole in zip(zip(*training, strict=True), alone, strict=True):
        indices = np.concatenate([share["index"] for share in shares])
        assert sorted(indices) == sorted(whole["index"])
        seen.append(indices)
        for share in shares:
            assert share["label"].tolist() == [int(i >= COUNT) for i in share["index"]]
            colours = [10 + 7 * int(i) for i in share["index"]]
            np.testing.assert_array_equal(share["image"][:, 5, 5, 0], colours)
    for i in range(3):
        in_epoch = np.concatenate(seen[i * epoch : (i + 1) * epoch])
        assert len(set(in_epoch.tolist())) == len(in_epoch) == 12
    parts = [pipeline(processes, process, batch=12) for process in range(processes)]
    evaluation = [b for part in parts for b in part.evaluation(splits.test)]
    indices = np.concatenate([batch["index"] for batch in evaluation])
    labels = np.concatenate([batch["label"] for batch in evaluation])
    assert sorted(indices) == [-1] * 6 + list(range(6))
    np.testing.assert_array_equal(labels, np.where(indices < 0, -1, indices >= 3))


@pytest.mark.parametrize("augment", ["none", "resized-crop"])
@pytest.mark.parametrize("step", [1, 5])
def test_going_on_in_the_midst_of_an_epoch(tree, augment, step):
    split = data.load(f"folder:{tree}", SIZE, hold="disk").train
    whole = take(pipeline(augment=augment).training(split, 0), 8)
    assert_same(take(pipeline(augment=augment).training(split, step), 8 - step), whole[step:])


def test_worker_processes_change_nothing(tree):
    split = data.load(f"folder:{tree}", SIZE, hold="disk").train
    alone = take(pipeline(augment="resized-crop").training(split, 0), 5)
    assert_same(take(pipeline(augment="resized-crop", workers=2).training(split, 0), 5), alone)


@pytest.fixture
def broken_tree(tree, tmp_path):
    """The tree, with an image in each split that is none."""
    shutil.copytree(tree, tmp_path / "images")
    for path in ("train/dog/2.png", "test/cat/1.png"):
        (tmp_path / "images" / path).write_bytes(b"no image")
    return tmp_path / "images"


@pytest.mark.parametrize("augment", ["none", "resized-crop"])
@pytest.mark.parametrize("workers", [0, 1])
def test_another_image_takes_the_place_of_a_broken_one(broken_tree, augment, workers):
    split = data.load(f"folder:{broken_tree}", SIZE, hold="disk").train
    (broken,) = (i for i in range(2 * COUNT) if split.name_of(i) == "train/dog/2.png")
    batches = take(pipeline(augment=augment, batch=14, workers=workers).training(split, 0), 2)
    stand_ins = set()
    for batch in batches:
        assert batch["broken"] == {broken: "it is not an image of a format that Pillow reads"}
        assert batch["label"].tolist() == [int(i >= COUNT) for i in batch["index"]]
        colours = [10 + 7 * int(i) for i in batch["index"]]
        np.testing.assert_array_equal(batch["image"][:, 5, 5, 0], colours)
        whole = [i for i in range(2 * COUNT) if i != broken]
        (twice,) = (np.bincount(batch["index"], minlength=14) - np.isin(range(14), whole)).nonzero()
        stand_ins |= set(twice.tolist())
    assert len(stand_ins) == 1  # the same in every epoch
    for processes in (1, 2):
        parts = [pipeline(processes, i, augment, batch=14) for i in range(processes)]
        shares = [next(part.training(split, 1)) for part in parts]  # going on with the second
        found = np.concatenate([share["index"] for share in shares])
        assert sorted(found) == sorted(batches[1]["index"])
        assert {k for share in shares for k in share["broken"]} == {broken}


def test_a_broken_image_does_not_count_in_evaluation(broken_tree):
    split = data.load(f"folder:{broken_tree}", SIZE, hold="disk").test
    (batch,) = pipeline(batch=8).evaluation(split)
    assert batch["label"].tolist() == [0, -1, 0, 1, 1, 1, -1, -1]
    assert batch["index"].tolist() == [0, 1, 2, 3, 4, 5, -1, -1] and set(batch["broken"]) == {1}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["folder", "zip", "records"])
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
        pipeline(workers=workers).training(dataset.train, 0),
        pipeline(workers=workers).evaluation(dataset.test),
    ):
        with pytest.raises(DataLost, match=f'^"{where}.*" ({lost})'):
            take(batches, 3)


def test_half_of_the_images_may_go_away_but_not_more(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "images")
    split = data.load(f"folder:{tmp_path / 'images'}", SIZE, hold="disk").train
    for i in range(COUNT):
        (tmp_path / "images" / "train" / "cat" / f"{i}.png").unlink()
    for batch in take(pipeline(batch=2).evaluation(split), 7):
        assert all((batch["label"] < 0) == (batch["index"] < COUNT))
    for i in range(3):
        (tmp_path / "images" / "train" / "dog" / f"{i}.png").unlink()
    for batches in (pipeline(batch=2).training(split, 0), pipeline(batch=2).evaluation(split)):
        with pytest.raises(DataLost, match="images in a row cannot be read, as train/.*: No such"):
            take(batches, 50)
    shutil.rmtree(tmp_path / "images" / "train")  # the root is there still
    with pytest.raises(DataLost, match="none of 32 images drawn can be read"):
        next(pipeline(batch=2).training(split, 0))


def test_a_disk_that_fails_is_no_broken_image(tree, monkeypatch):
    dataset = data.load(f"folder:{tree}", SIZE, hold="disk")

    def read_bytes(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    for batches in (pipeline().training(dataset.train, 0), pipeline().evaluation(dataset.test)):
        with pytest.raises(DataLost, match="cannot be read any more: Input/output error"):
            next(batches)
    with pytest.raises(UserError, match=r"--data: .* any more: Input/output error"):
        data.load(f"folder:{tree}", SIZE)


def test_workers_leave_nothing_in_shared_memory(tree):
    split = data.load(f"folder:{tree}", SIZE, hold="disk").train
    batches = pipeline(workers=2).training(split, 0)
    batch = next(batches)
    assert not list(pathlib.Path("/dev/shm").glob("psm_*")) and type(batch["image"]) is np.ndarray
    batches.close()
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
    (batch,) = take(pipeline(workers=1).training(records.train, 0), 1)
    colours = [ours[:2] for ours in batch["image"][:, 5, 5]]
    names = [records.train.name_of(i) for i in batch["index"]]
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


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ("digits", SIZE, {"hold": "disk"}),
            '--data digits is held in memory, but --hold is "disk"',
        ),
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
