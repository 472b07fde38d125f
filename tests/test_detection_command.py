"""The commands of experiments.detection, from a COCO data set to what a person does with a run."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_coco
from flax.traverse_util import flatten_dict
from PIL import ExifTags, Image
from pycocotools import mask as codec
from pycocotools.coco import COCO
from runs import checkpoints_of, finish, rows_of
from test_hosts import free_address

from drconv_jax.export import export_model
from drconv_jax.weights import save_weights
from experiments.classification.config import Config as ClassifierConfig
from experiments.classification.model import ModelConfig
from experiments.classification.task import Classification
from experiments.detection import __main__ as detection
from experiments.detection import export, predict
from experiments.detection.config import DetectorRecipe
from experiments.detection.model import DetectorConfig
from experiments.detection.samples import Canvas, Preparation
from experiments.detection.task import Detection
from experiments.detection.trained import read_detector
from experiments.export import __main__ as export_of_classifiers
from experiments.runtime import experiment, mesh, run_folder, training
from experiments.runtime.checkpoints import Checkpoints
from experiments.runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools

TESTS = pathlib.Path(__file__).parent
DR = ["--model.name", "dr_maskrcnn_shufflenet_v2_x0_5_fpn", "--model.regions", 2]
RECIPE = ["--train.batch-size", 2, "--train.epochs", 2, "--checkpoint.every-steps", 1]
OPTIONS = [*tiny_coco.SMALL, *DR, *RECIPE, "--checkpoint.keep", 9]


def start(module, *arguments, env, devices=1):
    """Starts a command in a process of its own, with shallow detectors."""
    more = {
        "PYTHONPATH": os.getcwd(),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        [sys.executable, TESTS / "tiny_coco.py", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env, **more},
    )


def train(*arguments, env, devices=1):
    return start("experiments.detection.__main__", *arguments, env=env, devices=devices)


@pytest.fixture(scope="module")
def env_(env, common):
    return env | {"XDG_CACHE_HOME": str(common / "cache")}


@pytest.fixture(scope="module")
def data(common):
    """A data set with one image of each split that is none, and an annotation that is none."""
    return made_once(common / "coco", write_data)


def write_data(root):
    tiny_coco.write(root)
    (root / "train/4.png").write_bytes(b"no image")
    (root / "val/4.png").write_bytes(b"")
    path = root / "annotations/instances_train.json"
    document = json.loads(path.read_text())
    document["annotations"].append(document["annotations"][0] | {"id": 99, "bbox": [3, 3, 0, 9]})
    path.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def trained(data, env_, common):
    """A run of two epochs on two devices, and what it has said; no test changes it."""

    def run(folder):
        options = ["--data", f"coco:{data}", "--run-dir", folder / "run", *OPTIONS]
        status, out, err = finish(train(*options, env=env_, devices=2))
        assert status == 0, err
        (folder / "said.json").write_text(json.dumps([out, err]))

    folder = made_once(common / "detection", run)
    return folder / "run", *json.loads((folder / "said.json").read_text())


def made_once(path, make):
    """What the first of the processes that run the tests makes at a path, and others wait for."""
    with filelock.FileLock(path.with_suffix(".lock")):
        done = path.with_suffix(".done")
        if not done.exists():
            make(path)
            done.touch()
    return path


def bits_of(run, step):
    """Sums over the bits of every array of a checkpoint."""
    about = json.loads((run / f"checkpoints/{step}/about/metadata").read_text())
    return json.loads(about["json"])["bits"]


def test_what_a_run_leaves(trained, data):
    run, out, err = trained
    assert "6 training images with 8 objects and 5 held-out images in 2 categories" in out
    assert "left out: 1 annotation with a box of no size" in err and "(id 99)" in err
    report = json.loads((run / "report.json").read_text())
    assert report["skipped_images"] == 2 and report["left_out"]
    assert [line.split(" ")[0] for line in sorted(report["skipped"])] == [
        "train/4.png",
        "val/4.png",
    ]
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [3, 6]
    metrics = json.loads((run / "evaluation.json").read_text())
    for kind in ("bbox", "segm"):
        assert metrics[kind].keys() == {"all", "rectangle", "disc"}
        assert metrics[kind]["all"]["AP50"] == rows[-1][f"{kind}_AP50"]
    results = COCO(str(data / "annotations/instances_val.json")).loadRes(
        str(run / "detections.json")
    )
    found = results.loadAnns(results.getAnnIds())
    assert found and 14 not in {result["image_id"] for result in found}  # it is broken
    for result in found:
        height, width = result["segmentation"]["size"]
        assert (height, width) == tiny_coco.SIZES[result["image_id"] % 2]
        x, y, w, h = result["bbox"]
        assert min(x, y) >= 0 and x + w <= width + 1e-4 and y + h <= height + 1e-4
    assert json.loads((run / "categories.json").read_text()) == [[7, "rectangle"], [90, "disc"]]
    for name in ("detections.png", "precision_recall.png", "guide_masks.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200


def test_going_on_in_the_midst_of_an_epoch_is_exact(trained, env_, tmp_path):
    whole, run = trained[0], tmp_path / "run"
    shutil.copytree(whole, run)
    for step in checkpoints_of(run):
        if step > 4:  # of 6, 3 an epoch
            shutil.rmtree(run / f"checkpoints/{step}")
    status, _, err = finish(train("--resume", run, env=env_, devices=2))
    assert status == 0, err
    assert rows_of(run) == rows_of(whole)
    assert bits_of(run, 6) == bits_of(whole, 6) != bits_of(whole, 5)
    assert (run / "detections.json").read_text() == (whole / "detections.json").read_text()


def test_two_processes_find_what_one_finds(trained, data, env_, tmp_path):
    run = tmp_path / "run"
    where = ["--coordinator", free_address(), "--processes", 2, "--process-id"]
    options = ["--data", f"coco:{data}", "--run-dir", run, *OPTIONS]
    for process in [train(*options, *where, i, env=env_) for i in range(2)]:
        status, _, err = finish(process)
        assert status == 0, err
    for row, other in zip(rows_of(run), rows_of(trained[0]), strict=True):
        for kind in ("bbox", "segm"):
            assert row.pop(f"{kind}_categories") == other.pop(f"{kind}_categories")
        assert row == pytest.approx(other, rel=1e-4)
    # So short a run finds nothing rightly, which the metrics alone would not tell from nothing.
    found, expected = (
        json.loads((folder / "detections.json").read_text()) for folder in (run, trained[0])
    )
    for name in ("image_id", "category_id"):
        assert [d[name] for d in found] == [d[name] for d in expected]
    for name, tolerance in (("score", 1e-4), ("bbox", 1e-2)):
        own, other = ([d[name] for d in results] for results in (found, expected))
        np.testing.assert_allclose(own, other, atol=tolerance)


@pytest.fixture
def shallow(monkeypatch):
    """Detectors of this process are shallow, as those of the others are."""
    monkeypatch.setattr(DetectorConfig, "build", DetectorConfig.build)  # to be put back
    tiny_coco.with_one_block_a_stage()


@pytest.fixture
def call(shallow, compiled_quickly, monkeypatch, capsys):
    """Calls a command in this process: its exit status, and what it says."""
    monkeypatch.setattr(mesh, "join_processes", lambda cluster: None)  # it is too late for that
    of_devices = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda *_, **__: of_devices(devices=jax.devices()[:1]))

    def command(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        status = 0
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            try:
                main()
            except SystemExit as stop:
                status = stop.code
        return status, *capsys.readouterr()

    return command


def test_objects_in_own_images(trained, data, call, tmp_path):
    run, out = trained[0], tmp_path / "out"
    lying = np.asarray(Image.open(data / "val/2.png"))
    turned, tags = Image.fromarray(np.rot90(lying)), Image.Exif()
    tags[ExifTags.Base.Orientation] = 6  # a quarter clockwise makes it upright again
    turned.save(tmp_path / "turned.png", exif=tags)
    Image.fromarray(lying).convert("L").resize((90, 60)).save(tmp_path / "grey.webp")
    images = [data / "val/2.png", tmp_path / "turned.png", tmp_path / "grey.webp"]
    broken = data / "val/4.png"
    status, said, err = call(
        predict.main, run, images[0], broken, *images[1:], "--score", 0.05, "--out", out
    )
    assert status == 0, err
    assert f"skipped {broken}: the file is empty\n" in err
    assert err.count("compiling for images of") == 1
    assert "in 3 images, 1 images skipped" in said
    found = json.loads((out / "detections.json").read_text())
    first, second, grey = ([d for d in found if d["file_name"] == str(path)] for path in images)
    expected = [d for d in json.loads((run / "detections.json").read_text()) if d["image_id"] == 12]
    assert len(first) == len(expected) > 0
    for own, other in zip(first, expected, strict=True):
        assert own["category"] == dict([(7, "rectangle"), (90, "disc")])[own["category_id"]]
        assert own["category_id"] == other["category_id"]
        np.testing.assert_allclose(own["bbox"], other["bbox"], atol=1e-3)
        assert own["score"] == pytest.approx(other["score"], abs=1e-4)
        assert own["segmentation"]["size"] == [32, 48]
        differ = codec.decode(own["segmentation"]) != codec.decode(other["segmentation"])
        assert differ.sum() <= 1  # where a probability is 0.5 up to rounding
    assert [d | {"file_name": ""} for d in second] == [d | {"file_name": ""} for d in first]
    assert {tuple(d["segmentation"]["size"]) for d in grey} == {(60, 90)}
    with Image.open(out / "detections.png") as picture:
        assert picture.width > 2 * picture.height


def test_objects_in_no_image(trained, data, call, tmp_path):
    run = trained[0]
    missing = tmp_path / "missing.jpg"
    status, _, err = call(predict.main, run, missing, data / "val/4.png")
    assert status == 2 and "none of the 2 images can be read" in err
    assert f"skipped {missing}: No such file or directory" in err
    assert not (run / "predictions").exists()
    status, _, err = call(predict.main, run, "--score", 1.5, missing)
    assert status == 2 and "--score must be from 0 to 1, got 1.5" in err
    status, _, err = call(predict.main, tmp_path, missing)
    assert status == 2 and "RUN-DIR: there is no run in" in err
    status, _, err = call(predict.main, run)
    assert status == 2 and "at least one image" in err

    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "categories.json").write_text('[[1, "a"], [2, "b"], [3, "c"]]')
    status, _, err = call(predict.main, other, data / "val/2.png")
    assert status == 2 and "is of another model" in err and "Traceback" not in err


LOAD = """
import sys, numpy as np
from jax import export
run = export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call
inputs = np.load(f"{sys.argv[2]}/inputs.npz")
for batch in (1, 3):
    found = run(inputs["images"][:batch], inputs["sizes"][:batch])
    np.savez(f"{sys.argv[2]}/{batch}.npz", **found)
assert not any(name.startswith(("drconv_jax", "flax")) for name in sys.modules)
"""


def test_a_file_that_finds_objects_without_this_package(trained, data, env_, call, tmp_path):
    run, path = trained[0], tmp_path / "model.stablehlo"
    status, said, err = call(export.main, run, "--out", path)
    assert status == 0, err
    same, count = map(int, re.search(r"it finds (\d+) of the (\d+) objects", said).groups())
    assert "images of 64 x 96" in said and same == count > 0
    images = np.zeros((3, 64, 96, 3), np.uint8)
    for number in (0, 1, 2):
        image = Image.open(data / f"train/{number}.png").resize((96, 64))
        images[number] = np.asarray(image)
    sizes = np.array([[64, 96], [64, 90], [50, 96]], np.int32)
    np.savez(tmp_path / "inputs.npz", images=images, sizes=sizes)
    process = [sys.executable, "-c", LOAD, path, tmp_path]
    subprocess.run(process, check=True, env={**os.environ, **env_})
    detector = read_detector("RUN-DIR", run)
    expected = jax.jit(Detection(detector.model, detector.config.preparation, ()).evaluate)(
        detector.variables, {"image": images, "size": sizes}
    )
    for batch in (1, 3):
        found = np.load(tmp_path / f"{batch}.npz")
        assert found["masks"].shape == (batch, 8, 28, 28)
        for name in expected:
            tolerance = 1e-3 if name in ("scores", "masks") else 0.05  # pixels
            np.testing.assert_allclose(
                found[name], expected[name][:batch], atol=tolerance, err_msg=name
            )
    for options, message in (
        (["--canvas", 64, 90], "multiples of 32, got 64 90"),
        (["--platforms", "foo"], "--platforms: platforms must be some of"),
        (["--score", -1], "--score must be from 0 to 1"),
        (["--format", "onnx"], "--format onnx: jax2onnx cannot convert"),
    ):
        status, _, err = call(export.main, run, *options)
        assert status == 2 and message in err
    status, _, err = call(export_of_classifiers.main, run)
    assert status == 2 and "python -m experiments.detection.export" in err


def test_a_file_that_finds_other_objects_is_removed(tmp_path):
    def run(corner, images, sizes):
        batch = images.shape[0]  # len wants a number
        boxes = jnp.stack([corner, corner, *sizes[0, ::-1]]).astype(jnp.float32)
        labels = jnp.ones((batch, 1), jnp.int32)
        return {"boxes": jnp.broadcast_to(boxes, (batch, 1, 4)), "labels": labels}

    path, canvas = tmp_path / "model.stablehlo", Canvas(64, 96)
    inputs = [
        jax.ShapeDtypeStruct((*canvas, 3), jnp.uint8),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    ]
    export_model(path, run, jnp.int32(0), inputs)
    assert export.check(path, run, jnp.int32(1), canvas) == (2, 2)
    with pytest.raises(UserError, match="would find 0 of 2 objects"):
        export.check(path, run, jnp.int32(30), canvas)
    assert not path.exists()


# --- What a network starts from, and what is not trained


def written(run, config, names, state):
    """A run's folder with a network as it is at the beginning."""
    run.mkdir()
    run_folder.write_config(run, config)
    for name, content in names.items():
        (run / name).write_text(json.dumps(content))
    checkpoints = Checkpoints(run, 1)
    checkpoints.save(1, state, {})
    checkpoints.close()


@pytest.mark.usefixtures("shallow", "compiled_quickly")
def test_what_a_backbone_starts_from(trained, data, call, monkeypatch, tmp_path):
    """The command tells what fits; the new network has the weights."""
    config = ClassifierConfig(model=ModelConfig(blocks=(1, 1, 1), conv="standard"))
    with jax.numpy_dtype_promotion("standard"):
        task = Classification(config.model.build(3), config.image_size)
        one = mesh.make_mesh(devices=jax.devices()[:1])
        state = training.program(task, config.train, one, steps_per_epoch=1).init()
    written(tmp_path / "classifier", config, {"classes.json": ["a", "b", "c"]}, state)
    save_weights(tmp_path / "weights.safetensors", state.variables)

    setups = []

    def stop(setup_task, *_, **__):
        setups.append(setup_task)
        raise SystemExit("begun")

    monkeypatch.setattr(experiment, "train", stop)
    for number, (source, whose) in enumerate(
        [
            (tmp_path / "classifier", state.variables),
            (tmp_path / "weights.safetensors", state.variables),
            (trained[0], None),
        ]
    ):
        conv = [] if whose is None else ["--model.conv", "standard"]
        status, out, err = call(
            detection.main, "--data", f"coco:{data}", *OPTIONS, *conv,
            "--init", source, "--run-dir", tmp_path / f"run{number}",
        )  # fmt: skip
        assert status == "begun", err
        assert f"--init {source}: " in out
        with jax.numpy_dtype_promotion("standard"):
            started = jax.jit(setups[-1].init)(jax.random.key(3))
        whose = whose or {
            name: tree.get("backbone", {})
            for name, tree in read_detector("", trained[0]).variables.items()
        }
        for name in ("params", "batch_stats"):
            own = flatten_dict(started[name]["backbone"])
            expected = flatten_dict(whose[name])
            assert len(own) > 10
            for path, array in own.items():
                np.testing.assert_array_equal(array, expected[path], err_msg=str(path))
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    save_weights(tmp_path / "alien.safetensors", {"params": {"x": {"kernel": jnp.ones((2, 2))}}})
    for source, message in (
        (tmp_path / "other.safetensors", "is neither the folder of a run nor a safetensors file"),
        (tmp_path / "alien.safetensors", "--init: "),
        (tmp_path, "--init: there is no run in"),
    ):
        run = tmp_path / "refused"
        status, _, err = call(
            detection.main, "--data", f"coco:{data}", *OPTIONS, "--init", source, "--run-dir", run
        )
        assert status == 2 and message in err and not run.exists(), err


def test_what_is_frozen_stays(shallow, compiled_quickly):
    """Parameters that are not trained, and the statistics of frozen batch norms."""
    config = DetectorConfig(
        "fasterrcnn_shufflenet_v2_x0_5_fpn", features=8, box_features=8, pre_nms=(16, 8),
        post_nms=(8, 8), anchors_per_image=8, regions_per_image=8, batch_norm="frozen",
        anchor_sizes=(8.0, 16.0, 32.0, 48.0, 64.0),
    )  # fmt: skip
    task = Detection(config.build(1), Preparation(64, 64, 2, 0), (), freeze=("backbone/stage2",))
    recipe = DetectorRecipe(batch_size=1, warmup_epochs=0.0, learning_rate=0.1)
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8),
        "size": np.array([[64, 64]], np.int32),
        "boxes": np.array([[[8, 8, 40, 40], [0, 0, 0, 0]]], np.float32),
        "labels": np.array([[1, 0]], np.int32),
    }
    one = mesh.make_mesh(devices=jax.devices()[:1])
    with jax.numpy_dtype_promotion("standard"):
        program = training.program(task, recipe, one, steps_per_epoch=1)
        before = jax.jit(program.init)()
        old = flatten_dict(jax.device_get(before.variables))
        after, _ = program.train_step(before, mesh.on_devices(batch, one))
    new = flatten_dict(jax.device_get(after.variables))
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    still = {path for path in old if path[0] == "batch_stats" or "stage2" in path[2]}
    assert len(still) > 20 and not changed & still
    # Only what no loss depends on may be as it was.
    assert {path[1] for path in changed} == {"backbone", "pyramid", "rpn", "box_head"}
    assert any("stage3" in path[2] for path in changed)


# --- What is refused


def edited(change):
    """Changes the json of training."""

    def edit(root):
        path = root / "annotations/instances_train.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return edit


def first_object(**changes):
    return edited(lambda document: document["annotations"][0].update(changes))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda root: shutil.rmtree(root), 'there is no "'),
        (
            lambda root: (root / "annotations/instances_train.json").unlink(),
            "has no annotations/instances_train*.json",
        ),
        (
            lambda root: (root / "annotations/instances_train.json").write_text("{"),
            "is not JSON, or damaged",
        ),
        (
            lambda root: (root / "annotations/instances_val.json").write_text("[]"),
            "is no COCO json of objects",
        ),
        (lambda root: (root / "train/3.png").unlink(), '"3.png" (id 13); add what is missing'),
        (first_object(category_id=8), "annotation 1 of"),
        (first_object(image_id=3), "which none of its \"images\" has"),
        (
            first_object(segmentation={"size": [9, 9], "counts": [81]}),
            "has a run-length mask of the size (height, width) [9, 9], but its image has [32, 48]",
        ),
        (first_object(segmentation=[1, 1, 9, 9]), "where polygons are due"),
        (
            edited(lambda d: [a.pop("segmentation") for a in d["annotations"]]),
            "has a mask (a \"segmentation\"); train a detector of boxes",
        ),
        (edited(lambda d: d["annotations"].clear()), "has no object to train on"),
        (
            edited(lambda d: d["categories"].append({"id": 91, "name": "star"})),
            'has the category 91, "star", which',
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_data(change, message, call, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, run = tiny_coco.write(tmp_path / "coco"), tmp_path / "run"
    change(root)
    status, _, err = call(detection.main, "--data", f"coco:{root}", *OPTIONS, "--run-dir", run)
    assert status == 2 and message in err and "Traceback" not in err, err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not run.exists()


def test_a_run_of_another_number_of_classes_does_not_go_on(trained, call, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, run = tiny_coco.write(tmp_path / "coco"), tmp_path / "run"
    shutil.copytree(trained[0], run)
    for path in (root / "annotations").iterdir():
        document = json.loads(path.read_text())
        document["categories"].append({"id": 91, "name": "star"})
        path.write_text(json.dumps(document))
    status, _, err = call(detection.main, "--resume", run, "--data", f"coco:{root}")
    assert status == 2 and "categories was 2 and is 3" in err
    (run / "data.json").unlink()  # as if it were of a version that did not record its data
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data": f"coco:{root}"}))
    status, _, err = call(detection.main, "--resume", run)
    assert status == 2 and "is of another model" in err and "Traceback" not in err


# --- On a pod


def test_the_gradients_are_the_only_large_message(env_, tmp_path):
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    process = train(
        *tiny_coco.SMALL, "--dry-run", "--topology", "v5e:2x2", "--run-dir", tmp_path, env=env_
    )
    status, _, err = finish(process)
    assert status == 0, err
    (report,) = json.loads((tmp_path / "dry_run.json").read_text())
    assert {message["kind"] for message in report["collectives"]} == {"all-reduce"}
    (gradients,) = (m for m in report["collectives"] if m["bytes"] >= 2**16)
    assert gradients["times"] == 1 and 0.9 < gradients["bytes"] / (4 * report["parameters"]) <= 1
