import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
import types
import zipfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image
from rich.console import Console

from experiments.classification.__main__ import EXPERIMENT, Arguments, main, task_and_feed
from experiments.classification.config import ClassifierRecipe, Config
from experiments.classification.model import ModelConfig
from experiments.runtime import data, experiment, loop, mesh, sources
from experiments.runtime.checkpoints import CheckpointConfig
from experiments.runtime.errors import UserError
from experiments.runtime.experiment import Pods
from experiments.runtime.files import replacing
from experiments.runtime.pipeline import Loading

TINY = [
    "--model.blocks",
    "1",
    "1",
    "1",
    "--model.regions",
    "2",
    "--train.epochs",
    "1",
    "--image-size",
    "16",
    "--train.batch-size",
    "4",
]


def command(*arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "experiments.classification", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **(env or {})},
    )


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 255, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_a_run_from_a_zip_with_a_broken_image_and_its_resumption(tree, tmp_path, env):
    (tree / "train" / "cat" / "0.png").write_bytes(b"not an image")
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in tree.rglob("*.png"):
            target.write(path, path.relative_to(tmp_path))
    run = tmp_path / "run"
    options = *TINY, "--train.schedule", "exponential", "--train.warmup-epochs", "0"
    result = command("--data", f"folder:{archive}", "--run-dir", run, *options, env=env)
    assert result.returncode == 0, result.stderr
    assert "images/train/cat/0.png" in result.stderr
    report = json.loads((run / "report.json").read_text())
    assert report["skipped_images"] == 1 and "cat/0.png" in report["skipped"][0]
    with Image.open(run / "guide_masks.png") as picture:
        assert picture.size[0] > 100
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1] and rows[0]["step"] == 11 // 4

    again = command("--data", f"folder:{archive}", "--run-dir", run, *options, env=env)
    assert again.returncode == 2 and "holds a run already" in again.stderr

    moved = archive.rename(tmp_path / "moved.zip")
    longer = "--resume", run, "--data", f"folder:{moved}", "--train.epochs", "2"
    resumed = command(*longer, env=env)
    assert resumed.returncode == 0, resumed.stderr
    assert "--train.epochs is 2 from now on; it was 1\n" in resumed.stdout
    config = json.loads((run / "config.json").read_text())
    assert (config["data"], config["train"]["epochs"]) == (f"folder:{moved}", 2)
    resumed_rows = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(resumed_rows[0]) == rows[0] and len(resumed_rows) == 2

    config["model"]["regions"] = 3
    (run / "config.json").write_text(json.dumps(config))
    other = command("--resume", run, env=env)
    assert other.returncode == 2 and "is of another model" in other.stderr


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--data", "mnist"], 'or "hf:NAME_OR_PATH", got "mnist"'),
        (["--data", "folder:/nowhere"], 'there is no "/nowhere"'),
        (["--colour", "red"], "--colour"),
        (["--model.regions", "0"], "regions must be at least 1, got 0"),
        (["--train.batch-size", "5000"], "at most the 1438 training images, got 5000"),
        (["--train.epochs", "0"], "--train.epochs must be at least 1, got 0"),
        (["--resume", "/nowhere"], 'there is no run in "/nowhere"'),
    ],
)
def test_bad_options(arguments, message, tmp_path):
    extra = [] if "--resume" in arguments else ["--run-dir", tmp_path / "run"]
    result = command(*arguments, *extra)
    assert result.returncode == 2 and message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_a_class_in_one_split_only(tree):
    (tree / "val" / "dog").rename(tree / "val" / "wolf")
    with pytest.raises(UserError, match='class "dog".*only in the train split'):
        data.load(f"folder:{tree}", 16)


def test_a_zip_that_is_none(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        data.load(f"folder:{path}", 16)


def test_no_image_can_be_read(tree):
    for path in (tree / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no image of the test split"):
        data.load(f"folder:{tree}", 16)


def test_broken_members_of_a_zip_are_skipped(tree, tmp_path, monkeypatch):
    (tree / "train" / "dog" / "4.png").write_bytes(b"")
    Image.new("RGB", (400, 400)).save(tree / "train" / "dog" / "5.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 5.png is a "decompression bomb"
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as target:
        for file in sorted(tree.rglob("*.png")):
            name = str(file.relative_to(tree))
            deflated = name == "train/cat/1.png"
            target.write(file, name, zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED)
        starts = {
            info.filename: info.header_offset + 30 + len(info.filename)
            for info in target.infolist()
        }
    content = bytearray(path.read_bytes())
    content[starts["train/cat/0.png"] + 60] ^= 255  # a bad CRC
    content[starts["train/cat/1.png"]] = 255  # a bad stream
    for signature, name_at, flag_at in ((b"PK\x03\x04", 30, 6), (b"PK\x01\x02", 46, 8)):
        name = b"train/cat/2.png"
        at = content.index(name, 0 if name_at == 30 else content.index(b"PK\x01\x02")) - name_at
        assert content[at : at + 4] == signature
        content[at + flag_at] |= 1  # encrypted
    path.write_bytes(content)
    dataset = data.load(f"folder:{path}", 16)
    broken = [line.split(":")[0] for line in dataset.skipped]
    assert broken == [f"train/{x}.png" for x in ("cat/0", "cat/1", "cat/2", "dog/4", "dog/5")]
    assert len(dataset.train.labels) == 7 and len(dataset.test.labels) == 12


def test_a_file_that_cannot_be_read_is_skipped(tree):
    path = tree / "train" / "cat" / "0.png"
    whole = type(path).read_bytes

    def read_bytes(self):
        if self == path:
            raise PermissionError("not yours")
        return whole(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(path), "read_bytes", read_bytes)
        dataset = data.load(f"folder:{tree}", 16)
    assert dataset.skipped == ("train/cat/0.png: not yours",)


def test_a_picture_that_fails_costs_nothing_else(tmp_path, monkeypatch, capsys):
    trained = loop.Trained(
        SimpleNamespace(variables={"params": {}}),  # of which no picture can be drawn
        {"epoch": 1, "test_accuracy": 0.5},
        [],
    )
    monkeypatch.setattr(experiment, "train", lambda *args, **kwargs: trained)
    experiment.run(EXPERIMENT, Config(), tmp_path, mesh.make_mesh())
    assert json.loads((tmp_path / "report.json").read_text())["test_accuracy"] == 0.5
    out, err = capsys.readouterr()
    assert "test accuracy 0.5000 after 1 epochs" in out
    assert re.fullmatch("warning: guide_masks.png is not drawn: .+\n", err)
    assert not (tmp_path / "guide_masks.png").exists()


def test_a_class_without_a_readable_image(tree):
    for path in (tree / "val" / "dog").glob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match='no image of class "dog" in the test split'):
        data.load(f"folder:{tree}", 16)


@pytest.mark.parametrize(
    "name,option,value,numbers",
    [
        ("small", "blocks", (1, 1), "3 numbers"),
        ("small", "blocks", (1, 1, 1, 1), "3 numbers"),
        ("small", "blocks", (), "3 numbers"),
        ("small", "stem_strides", (1,), "2 numbers"),
        ("shufflenet_v2_x1_0", "channels", (8, 8), "5 numbers"),
        ("dr_mobilenet_v2_x1_0", "stem_strides", (1, 2), "one number"),
        ("mobilenet_v1_x1_0", "stem_strides", (), "one number"),
        ("mobilefacenet", "blocks", (1, 1, 1), "4 numbers"),
    ],
)
def test_an_option_of_several_numbers(name, option, value, numbers):
    with pytest.raises(UserError) as refused:
        ModelConfig(name, **{option: value})
    assert str(refused.value) == (
        f'--model.{option.replace("_", "-")} must be {numbers} in the network "{name}", got '
        f"{' '.join(map(str, value)) or 'none'}."
    )


@pytest.mark.parametrize(
    "config,option,value",
    [
        (ClassifierRecipe, "seed", -1),
        (ClassifierRecipe, "seed", 2**32),
        (ClassifierRecipe, "learning_rate", 0.0),
        (ClassifierRecipe, "learning_rate", float("nan")),
        (ClassifierRecipe, "learning_rate", float("inf")),
        (ClassifierRecipe, "warmup_epochs", -1.0),
        (ClassifierRecipe, "momentum", 1.0),
        (ClassifierRecipe, "weight_decay", -0.1),
        (ClassifierRecipe, "label_smoothing", 1.0),
        (ClassifierRecipe, "decay_rate", 0.0),
        (ClassifierRecipe, "ema", 1.0),
        (ClassifierRecipe, "accumulate", 0),
        (CheckpointConfig, "every_steps", -1),
        (CheckpointConfig, "every_minutes", float("inf")),
        (CheckpointConfig, "keep", 0),
        (ModelConfig, "width", float("nan")),
        (ModelConfig, "blocks", (1, 0, 1)),
        (ModelConfig, "channels", (8, 8, 0, 8, 8)),
        (ModelConfig, "stem_strides", (0, 2)),
        (ModelConfig, "regions", 0),
        (ModelConfig, "guide_pool", 0),
    ],
)
def test_a_value_out_of_range(config, option, value):
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    group = {ClassifierRecipe: "train", ModelConfig: "model", CheckpointConfig: "checkpoint"}[
        config
    ]
    message = f"--{group}.{option.replace('_', '-')} must be .* got {shown}\\.$"
    with pytest.raises(UserError, match=message):
        config(**{option: value})


@pytest.mark.parametrize("fields", [{"guide_pool": 2}, {"guide_start": "grid"}])
@pytest.mark.parametrize(
    "without",
    [{}, {"shared_guide": True, "guide": "grid"}, {"shared_guide": True, "conv": "local"}],
)
def test_a_guide_option_without_a_guide_that_blocks_share(fields, without):
    ModelConfig(shared_guide=True, **fields)
    with pytest.raises(UserError, match="--model.shared-guide or leave them out, got [12] and"):
        ModelConfig(**fields, **without)


def test_the_ends_of_the_ranges():
    ClassifierRecipe(seed=2**32 - 1, warmup_epochs=0, momentum=0, weight_decay=0, label_smoothing=0)
    ClassifierRecipe(seed=0)
    ModelConfig(blocks=(1, 1, 1), stem_strides=(1, 1), regions=1)


@pytest.fixture
def in_process(monkeypatch, capsys):
    monkeypatch.setattr(mesh, "join_processes", lambda cluster: None)  # it is too late for that

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["classification", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr().err

    return call


class Begun(SystemExit):
    """A run would train now."""


@pytest.fixture
def begin(in_process, monkeypatch):
    """Runs the command up to the training itself."""

    def stop(*_, **__):
        raise Begun("begun")

    monkeypatch.setattr(experiment, "train", stop)
    return in_process


def test_runs_that_start_in_the_same_second(begin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock = types.SimpleNamespace(strftime=lambda _: "now", time=time.time)
    monkeypatch.setattr(experiment, "time", clock)
    for seed in range(3):
        assert begin(*TINY, "--train.batch-size", 8, "--train.seed", seed)[0] == "begun"
    folder = tmp_path / "runs" / "classification"
    seeds = {
        p.parent.name: json.loads(p.read_text())["train"]["seed"] for p in folder.glob("*/c*g.json")
    }
    assert seeds == {"small-now": 0, "small-now-2": 1, "small-now-3": 2}


def test_what_may_change_where_a_run_goes_on(tree, begin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    options = *TINY, "--train.batch-size", 8

    def config():
        return json.loads((run / "config.json").read_text())

    assert begin("--run-dir=~/run", "--data", "folder:images", *options)[0] == "begun"
    assert config()["data"] == f"folder:{tree}"
    tree.rename(tmp_path / "moved")
    changes = "--data=folder:~/moved", "--checkpoint.keep=3", "--train.remat"
    assert begin("--resume=~/run", *changes, "--workers=1")[0] == "begun"
    assert config()["data"] == f"folder:{tmp_path / 'moved'}"
    assert config()["checkpoint"]["keep"] == 3 and config()["train"]["remat"]
    again = "--auto-resume", "--run-dir", run, *options, *changes[1:]
    assert begin(*again, "--data=folder:moved")[0] == "begun"

    saved = (run / "config.json").read_text()
    for refused, message in (
        (["--model.regions=3"], "--model.regions is 2, not 3; leave"),
        (["--train.seed=1", "--image-size=8"], "--image-size is 16, not 8, --train.seed is 0, not"),
        (["--run-dir", run], "has the run's options; leave out --run-dir."),
        (["--recipe=small"], "has the run's options; leave out --recipe."),
    ):
        code, error = begin("--resume", run, *refused)
        assert code == 2 and message in error
    assert (run / "config.json").read_text() == saved


def test_a_run_does_not_go_on_with_other_data(tree, begin, tmp_path, monkeypatch):
    run, facts = tmp_path / "run", {"training images": 12}
    monkeypatch.setattr(sources.Dataset, "identity", lambda _: facts, raising=False)
    data = "--data", f"folder:{tree}"
    assert begin("--run-dir", run, *data, *TINY, "--train.batch-size", 8)[0] == "begun"
    assert json.loads((run / "data.json").read_text()) == {**facts, "steps in an epoch": 1}
    facts["training images"] = 13
    code, error = begin("--resume", run)
    assert code == 2 and "other data: training images was 12 and is 13. Continue it with" in error
    (run / "data.json").unlink()  # as of an older version
    code, error = begin("--resume", run)
    assert code == "begun" and "has no record of its data, being of an older version" in error
    assert json.loads((run / "data.json").read_text())["training images"] == 13
    (run / "data.json").unlink()
    code, error = begin("--resume", run, "--data", f"folder:{tree.rename(tmp_path / 'moved')}")
    assert code == 2 and "has no data.json, which tells whether" in error


@pytest.mark.usefixtures("standard_promotion")
def test_the_number_of_epochs_changes_only_where_no_learning_rate_does():
    def refusal(step, epochs, **options):
        before = ClassifierRecipe(epochs=10, warmup_epochs=2.0, **options)
        try:
            experiment._check_epochs(
                before, dataclasses.replace(before, epochs=epochs), step, steps_per_epoch=5
            )
        except UserError as error:
            return str(error)

    for schedule in ("cosine", "linear"):
        assert refusal(50, 10, schedule=schedule) is None
        assert refusal(10, 20, schedule=schedule) is None  # the warm-up's last step
        assert re.match(
            "--train.epochs cannot be 20 instead of 10: with that, the 12 steps taken would have "
            rf"had other learning rates \(--train.schedule {schedule}, --train.warmup-epochs 2.0\)",
            refusal(12, 20, schedule=schedule),
        )
    for step, epochs in ((50, 20), (25, 5), (24, 5)):
        assert refusal(step, epochs, schedule="exponential") is None
    assert "the run has 5.2 epochs behind it already" in refusal(26, 5, schedule="exponential")


def test_a_folder_from_which_checkpoints_cannot_be_read(begin, tmp_path):
    code, error = begin("--run-dir", tmp_path / "run[1]", *TINY)
    assert code == 2 and 'run[1]" has [ in it, and checkpoints written there cannot be' in error
    assert not list(tmp_path.iterdir())


def test_auto_resume_needs_a_folder(begin):
    code, error = begin("--auto-resume", *TINY)
    assert code == 2
    assert error == (
        "error: --run-dir must be given with --auto-resume, to say which run to continue.\n"
    )


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_a_run_folder_without_its_config(name, tmp_path, in_process):
    (tmp_path / name).mkdir()
    code, error = in_process("--run-dir", tmp_path, *TINY)
    assert code == 2 and f"holds the {name} of a run without its config.json" in error


def test_a_run_folder_that_is_a_file_or_cannot_be_made(tree, tmp_path, in_process):
    (tmp_path / "file").write_text("mine")
    code, error = in_process("--run-dir", tmp_path / "file", *TINY)
    assert code == 2 and "is not a folder" in error
    options = "--data", f"folder:{tree}", *TINY, "--train.batch-size", 8
    code, error = in_process("--run-dir", tmp_path / "file" / "run", *options)
    assert code == 2 and "cannot be written to: " in error
    assert (tmp_path / "file").read_text() == "mine"


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(2)(jnp.mean(x, (1, 2)))


@pytest.fixture
def standard_promotion():  # optax's
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kept", ["first and a half", "nothing", "no file"])
def test_resuming_with_lost_metrics(kept, tree, tmp_path):
    dataset = data.load(f"folder:{tree}", 8)
    recipe = ClassifierRecipe(epochs=2, batch_size=8, augment="none")

    def train():
        task, feed = task_and_feed(Linear(), dataset, recipe, 8)
        return loop.train(task, feed, recipe, tmp_path, mesh=mesh.make_mesh())

    whole = train().metrics
    path = tmp_path / "metrics.jsonl"
    text = path.read_text()
    if kept == "no file":
        path.unlink()
    else:
        path.write_text(text[: text.index("\n") + 20] if kept != "nothing" else "")
    resumed = train().metrics
    assert resumed == whole and path.read_text() == text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("old")

    def stopped():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_progress_line_fits_80_columns():
    console = Console(width=80, file=io.StringIO())
    progress = loop._progress(console)
    means = {name: 12.3456 for name in ("loss", "box", "class", "mask", "rpn_box")}
    shown = loop._shown(means, 12345.0)
    assert shown == "loss 12.346  box 12.346  12,345 img/s"
    progress.add_task("epoch 100/100", total=9000, completed=4000, shown=shown)
    console.print(progress.get_renderable())
    line = console.file.getvalue().rstrip("\n")
    assert "\n" not in line and "\u2026" not in line
    assert line.startswith("epoch 100/100") and shown in line and line.rstrip().endswith("left")


def test_help_explains_every_option():
    shown = command("--help")
    assert shown.returncode == 0
    text = " ".join(line.strip("│ ") for line in shown.stdout.splitlines())
    explained = {}
    for part in text.split("and exit")[1].split("(default:")[:-1]:
        option, *_ = re.findall(r"--[a-z][a-z.-]+", part)
        words = re.sub(r".*--[a-z.-]+ (\{\S+\}\S*|[A-Z]+ )*", "", part)
        explained[option] = words.split()
    groups = {
        "": (Config, Arguments, Pods, Loading, mesh.Cluster),
        "model.": (ModelConfig,),
        "train.": (ClassifierRecipe,),
        "checkpoint.": (CheckpointConfig,),
    }
    names = {
        f"--{prefix}{field.name.replace('_', '-')}"
        for prefix, kinds in groups.items()
        for kind in kinds
        for field in dataclasses.fields(kind)
        if prefix
        or (not dataclasses.is_dataclass(field.default_factory) and field.name != "config")
    }
    assert set(explained) == names
    assert all(len(words) >= 2 for words in explained.values())
