import dataclasses
import functools
import gc
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from PIL import Image
from runs import checkpoints_of, rows_of, tensorboard

from drconv_jax import DRConv
from experiments.classification.__main__ import task_and_feed
from experiments.classification.config import PRESETS, ClassifierRecipe, Config
from experiments.classification.feed import LabelledImages
from experiments.classification.model import ModelConfig
from experiments.classification.task import Classification
from experiments.runtime import configs, data, loop, preemption, regions, sources, training
from experiments.runtime.checkpoints import CheckpointConfig, Checkpoints
from experiments.runtime.errors import DataLost, Preempted, UserError
from experiments.runtime.images import normalize
from experiments.runtime.mesh import Cluster, check_batch, make_mesh, on_devices
from experiments.runtime.recipes import Recipe, learning_rate, optimizer

SIZE = 8

pytestmark = pytest.mark.usefixtures("standard_promotion", "compiled_once")


program = functools.cache(training.program)  # compiling takes most of the time


@pytest.fixture(scope="module")
def compiled_once():
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "program", program)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def standard_promotion():  # optax's
    with jax.numpy_dtype_promotion("standard"):
        yield


class Net(nn.Module):
    """Has all that a run keeps or watches: batch norm, a guide, a large array."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(8, (3, 3), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = DRConv(8, (1, 1), regions=2, implementation="blocked", name="dynamic")(x)
        x = nn.relu(nn.Dense(2048)(x.mean((1, 2))))
        return nn.Dense(4)(x)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(4)(jnp.mean(x, (1, 2)))


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)

    def split(count):
        labels = rng.integers(0, 4, count).astype(np.int32)
        images = rng.integers(0, 120, (count, SIZE, SIZE, 3)) + 40 * labels[:, None, None, None]
        return sources.ArraySplit(images.astype(np.uint8), labels)

    return sources.Dataset(split(40), split(21), ("a", "b", "c", "d"))


def train(dataset, folder, recipe, model=None, devices=None, fsdp=1, **checkpoint):
    task, feed = task_and_feed(model or Net(), dataset, recipe, SIZE)
    mesh, when = make_mesh(fsdp, devices), CheckpointConfig(**checkpoint)
    return loop.train(task, feed, recipe, folder, mesh=mesh, checkpoint=when)


def program_of(model=None, recipe=None, fsdp=1):
    recipe = recipe or RECIPE
    crops, smoothing = recipe.augment == "crop", recipe.label_smoothing
    task = Classification(model or Net(), SIZE, crops, label_smoothing=smoothing)
    return program(task, recipe, make_mesh(fsdp), steps_per_epoch=5)


def first(count, split, mesh):
    """The first images of a split as a batch."""
    return on_devices({"image": split.images[:count], "label": split.labels[:count]}, mesh)


def assert_same(state, other):
    paths = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), twin in zip(paths, jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, twin, err_msg=jax.tree_util.keystr(path))


@pytest.fixture
def signal_at(monkeypatch):
    """Sends this process a signal when the given batch is asked for, counted over both splits."""

    def install(number, sent=signal.SIGTERM):
        count = 0

        placed = loop._Run._placed

        def counted(run, split, batches):
            nonlocal count
            for batch in placed(run, split, batches):
                count += 1
                if count == number:
                    os.kill(os.getpid(), sent)
                yield batch

        monkeypatch.setattr(loop._Run, "_placed", counted)

    return install


# An epoch is 5 steps, and an evaluation 3 batches.
RECIPE = ClassifierRecipe(epochs=3, batch_size=8, learning_rate=0.05, ema=0.9)


@pytest.fixture(scope="module")
def uninterrupted(compiled_once, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with jax.numpy_dtype_promotion("standard"):
        state, *_ = train(dataset, folder, RECIPE)
    return jax.device_get(state), rows_of(folder)


# An epoch is 5 training batches and, for the weights and their average, 3 and 3 of evaluation:
# in the midst of the first, at the last step of the second, in the last evaluation of the third.
@pytest.mark.parametrize(
    "batch,sent,status,name",
    [
        (2, signal.SIGTERM, 75, "SIGTERM"),
        (16, signal.SIGINT, 130, "Ctrl-C"),
        (31, signal.SIGTERM, 75, "SIGTERM"),
    ],
)
def test_a_run_that_a_signal_stopped_ends_as_if_it_never_had(
    batch, sent, status, name, dataset, tmp_path, signal_at, uninterrupted, capsys
):
    signal_at(batch, sent)
    with pytest.raises(Preempted) as stopped:
        train(dataset, tmp_path, RECIPE)
    assert stopped.value.code == status
    line = rf"stopped by {name} at step (\d+); continue with --resume {re.escape(str(tmp_path))}\n"
    (step,) = re.findall(line, capsys.readouterr().out)
    assert checkpoints_of(tmp_path)[-1] == int(step)
    assert len(rows_of(tmp_path)) == (batch - 1) // 11
    state, *_ = train(dataset, tmp_path, RECIPE)
    assert_same(state, uninterrupted[0])
    assert rows_of(tmp_path) == uninterrupted[1]


DAMAGES = {
    "a byte of the arrays": lambda folder: flip(largest(folder / "state")),
    "arrays cut short": lambda folder: os.truncate(largest(folder / "state"), 100),
    "no metadata of arrays": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "a record of another step": lambda folder: replace(
        folder / "about" / "metadata", "rows", "row"
    ),
    "an empty record": lambda folder: (folder / "about" / "metadata").write_text(""),
}


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def state_like(scale):
    return {"kernel": jnp.arange(4000.0).reshape(40, 100) * scale, "step": jnp.array(scale, int)}


def shapes_of(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


# Orbax leaves coroutines behind where arrays cannot be read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state_like(step), {"rows": [step]})
    checkpoints.close()
    DAMAGES[damage](tmp_path / "checkpoints" / "3")
    checkpoints = Checkpoints(tmp_path, keep=2)
    state, record = checkpoints.restore(shapes_of(state_like(0)))
    said = capfd.readouterr().err
    gc.collect()
    assert re.fullmatch(
        rf'warning: the checkpoint "{tmp_path}/checkpoints/3" is damaged and now '
        r'"damaged-checkpoint-3": .+\n',
        said,
    )
    assert_same(state, state_like(2))
    assert record == {"rows": [2]} and checkpoints.newest == tmp_path / "checkpoints" / "2"
    checkpoints.save(3, state_like(3), {"rows": [3]})  # the run comes by again
    checkpoints.close()
    state, record = Checkpoints(tmp_path, keep=2).restore(shapes_of(state_like(0)))
    assert_same(state, state_like(3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_that_are_all_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, state_like(step), {})
    checkpoints.close()
    for step in (1, 2):
        flip(largest(tmp_path / "checkpoints" / str(step) / "state"))
    message = (
        '^the checkpoint ".*checkpoints/2" cannot be read: its arrays are not what was written; '
        'the checkpoint ".*checkpoints/1" cannot be read: its arrays are not what was written; '
        "put a copy of a checkpoint back, or begin a new run with another --run-dir.$"
    )
    with pytest.raises(UserError, match=message):
        Checkpoints(tmp_path, keep=2).restore(shapes_of(state_like(0)))
    assert (tmp_path / "checkpoints" / "2").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_only_checkpoint_is_damaged(damage, tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state_like(1), {"rows": [1]})
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "1"
    DAMAGES[damage](folder)
    with pytest.raises(UserError) as refused:
        Checkpoints(tmp_path, keep=1).restore(shapes_of(state_like(0)))
    said = str(refused.value)
    assert said.startswith(f'the checkpoint "{folder}" cannot be read: ')
    assert said.endswith(
        "; put a copy of a checkpoint back, or begin a new run with another --run-dir."
    )
    assert len(said) < 3 * len(str(folder)) + 250 and "\n" not in said
    assert "tensorstore_spec" not in said.lower() and "{" not in said
    assert capfd.readouterr().err == ""


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    def kept():
        return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())

    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, None)):
        checkpoints.save(step, state_like(step), {}, score)
    checkpoints.close()
    assert kept() == [2, 4, 5]
    checkpoints = Checkpoints(tmp_path, keep=2)  # which of them is the best is known to the run
    checkpoints.restore(shapes_of(state_like(0)))
    for step, score in ((6, 0.8), (7, 0.6)):
        checkpoints.save(step, state_like(step), {}, score)
    checkpoints.close()
    assert kept() == [2, 6, 7]


def test_a_disk_without_room_for_a_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state_like(1), {})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=16003))
    with pytest.raises(UserError, match="the disk is full: .*; checkpoint 1 is whole. Free some"):
        checkpoints.save(2, state_like(2), {})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=16004))
    checkpoints.save(3, state_like(3), {})  # 4000 numbers and one, of four bytes each
    checkpoints.close()
    assert checkpoints_of(tmp_path) == [1, 3]


@pytest.mark.parametrize("sent,other", [("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")])
def test_a_second_signal_of_a_kind_kills(sent, other):
    sent, other = signal.Signals[sent], signal.Signals[other]
    before = signal.getsignal(sent)
    with preemption.noticed() as came:
        assert came() is None
        os.kill(os.getpid(), sent)
        assert came() == sent and signal.getsignal(sent) == signal.SIG_DFL
        os.kill(os.getpid(), other)  # the ablation sends its runs SIGTERM after a Ctrl-C
        assert came() == sent
    assert signal.getsignal(sent) == before


ENDING = """
import hashlib, threading, time
from experiments.runtime.preemption import ending_at_once
with ending_at_once():
    threading.Timer(0.5, print, ["started"], {{"flush": True}}).start()
    try:
        {}
    finally:
        print("tidied")
"""


@pytest.mark.parametrize("sent,status", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize(
    "busy,said",
    [("time.sleep(1000)", "tidied\n"), ("hashlib.pbkdf2_hmac('md5', b'x', b'y', 2**31 - 1)", "")],
    ids=["in Python", "in compiled code"],
)
def test_where_nothing_is_to_save_a_signal_ends_the_process_at_once(busy, said, sent, status):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDING.format(busy)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    name = "Ctrl-C" if sent == signal.SIGINT else "SIGTERM"
    assert (process.returncode, out, err) == (status, said, f"\nstopped by {name}\n")


@pytest.mark.parametrize("mine", [{}, {"TPU_ACCELERATOR_TYPE": "v5p-8", "JAX_PLATFORMS": "cpu"}])
def test_libtpu_is_quiet_where_there_is_no_tpu(mine):
    """By itself it prints errors to stderr, where it is installed and JAX looks for a TPU."""
    code = (
        "import jax, os; from experiments.runtime import commands\n"
        "with commands.running(): print(jax.devices(), os.environ['TPU_ACCELERATOR_TYPE'])"
    )
    env = {
        k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES")
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env={**env, **mine}, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == ""
    assert mine.get("TPU_ACCELERATOR_TYPE", "v5litepod-4") in result.stdout


class Gone:
    """Batches of which the last are lost."""

    def __init__(self, batches, count):
        self.batches = itertools.islice(batches, count)

    def __iter__(self):
        yield from self.batches
        raise DataLost('"/images" cannot be read any more: it is gone')


# An epoch is 5 training batches and 3 of evaluation. What is on the devices, but not yet trained
# with, is read again.
@pytest.mark.parametrize("split,count,saved", [("training", 3, 2), ("evaluation", 1, 5)])
def test_data_that_is_lost_stops_a_run_that_can_go_on(
    split, count, saved, dataset, tmp_path, monkeypatch, uninterrupted
):
    batches = getattr(LabelledImages, split)
    with monkeypatch.context() as patch:
        patch.setattr(LabelledImages, split, lambda *args: iter(Gone(batches(*args), count)))
        with pytest.raises(UserError) as stopped:
            train(dataset, tmp_path, RECIPE)
    assert str(stopped.value) == (
        f'"/images" cannot be read any more: it is gone. The run stopped at step {saved}, and '
        f"{saved} steps are saved; when the data can be read again, continue with --resume "
        f"{tmp_path}"
    )
    assert checkpoints_of(tmp_path) == [saved]
    state, *_ = train(dataset, tmp_path, RECIPE)
    assert_same(state, uninterrupted[0])
    assert rows_of(tmp_path) == uninterrupted[1]


def test_no_steps_time_has_compiling_in_it(dataset, tmp_path, monkeypatch, capsys):
    now = itertools.count()  # a clock on which everything takes a second but compiling
    compiling = 10_000

    class Slow(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            nonlocal now
            now = itertools.count(next(now) + compiling)  # whenever it is traced
            return nn.Dense(4)(jnp.mean(x, (1, 2)))

    clock = types.SimpleNamespace(perf_counter=lambda: next(now), monotonic=time.monotonic)
    monkeypatch.setattr(loop, "time", clock)
    train(dataset, tmp_path, ClassifierRecipe(epochs=1, batch_size=8, augment="none"), Slow())
    assert next(now) > 2 * compiling
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["images_per_second"] > 40 / compiling
    out = capsys.readouterr().out
    assert out.index("compiling the training step and the evaluation\n") < out.index("epoch   1")


def test_a_checkpoint_holds_the_state_at_the_time_of_saving(dataset, tmp_path):
    """Though the next step takes the state's memory while it is being written."""
    program = program_of(Linear())
    batch = first(8, dataset.train, program.mesh)
    state, checkpoints = program.init(), Checkpoints(tmp_path, keep=10)
    saved = []
    for step in range(1, 9):
        state, _ = program.train_step(state, batch)
        saved.append(jax.tree.map(np.array, state))
        checkpoints.save(step, state, {})
    checkpoints.close()
    for step in range(8, 0, -1):
        restored, _ = Checkpoints(tmp_path, keep=10).restore(program.state)
        assert_same(restored, saved[step - 1])
        shutil.rmtree(tmp_path / "checkpoints" / str(step))


def assert_close(rows, others):
    for row, other in zip(rows, others, strict=True):
        assert row["step"] == other["step"]
        for name in ("train_loss", "test_loss", "average_test_loss"):
            np.testing.assert_allclose(row[name], other[name], rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("devices,fsdp", [(4, 1), (8, 4)])
def test_a_run_goes_on_with_other_devices_or_other_parts(
    devices, fsdp, dataset, tmp_path, signal_at, uninterrupted
):
    signal_at(4)
    with pytest.raises(Preempted):
        train(dataset, tmp_path, RECIPE)
    state, *_ = train(dataset, tmp_path, RECIPE, devices=jax.devices()[:devices], fsdp=fsdp)
    assert_close(rows_of(tmp_path), uninterrupted[1])
    kernel = state.variables["params"]["Dense_0"]["kernel"]
    assert kernel.shape == (8, 2048) and len(kernel.sharding.device_set) == devices
    assert kernel.addressable_shards[0].data.shape == (8, 2048 // fsdp)


def test_parameters_and_all_that_goes_with_them_lie_in_parts():
    leaves = jax.tree_util.tree_leaves_with_path(program_of(fsdp=4).state)
    assert [
        jax.tree_util.keystr(path) for path, leaf in leaves if not leaf.sharding.is_fully_replicated
    ] == [
        ".variables['params']['Dense_0']['kernel']",
        ".opt_state[1][0].trace['Dense_0']['kernel']",
        ".average['params']['Dense_0']['kernel']",
    ]


@pytest.mark.parametrize(
    "batch_size,parts,would_do", [(12, 1, "8 or 16"), (4, 1, "8"), (24, 2, "16 or 32")]
)
def test_a_batch_that_does_not_divide(batch_size, parts, would_do):
    with pytest.raises(UserError, match=rf"multiple of {8 * parts} for 8 .* {would_do} would do"):
        check_batch(batch_size, make_mesh(), parts)
    check_batch(16, make_mesh(), parts)


@pytest.mark.parametrize(
    "cluster,message",
    [
        ({"fsdp": 0}, "--fsdp must be at least 1"),
        ({"coordinator": "a:1", "processes": 2}, "go together, got a:1, 2, None"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "from 0 to 1 with --processes 2"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "must be HOST:PORT, got a"),
    ],
)
def test_a_cluster_that_is_none(cluster, message):
    with pytest.raises(UserError, match=message):
        Cluster(**cluster)


def test_parts_that_the_devices_do_not_make():
    with pytest.raises(UserError, match="--fsdp must divide the 8 devices, got 3"):
        make_mesh(3)


@pytest.mark.parametrize("option", [{"accumulate": 2}, {"remat": True}])
def test_saving_memory_changes_no_gradient(option, dataset):
    recipe = ClassifierRecipe(batch_size=16, warmup_epochs=0.0, augment="none")
    model = Net() if "remat" in option else Linear()  # batch norm sees the parts one by one

    def after_a_step(recipe):
        program = program_of(model, recipe)
        return program.train_step(program.init(), first(16, dataset.train, program.mesh))

    state, results = after_a_step(recipe)
    other, its_results = after_a_step(dataclasses.replace(recipe, **option))
    start = program_of(model, recipe).init()
    variables = zip(
        jax.tree_util.tree_leaves_with_path(start.variables),
        jax.tree.leaves(state.variables),
        jax.tree.leaves(other.variables),
        strict=True,
    )
    for (path, before), leaf, twin in variables:
        moved = np.abs(leaf - before).max()
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, twin, rtol=1e-6, atol=1e-5 * moved, err_msg=name)
    for name in results:
        np.testing.assert_allclose(results[name], its_results[name], rtol=1e-5, err_msg=name)


class Normed(nn.Module):
    """Keeps the statistics of the last batch as they are."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.0)(x)
        return nn.Dense(2)(x.mean((1, 2)))


def save_images(folder, counts, colour=100):
    """Classes of images of one colour, of which the first of each is broken."""
    for split, count in counts.items():
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                path = folder / split / label / f"{i}.png"
                Image.new("RGB", (SIZE, SIZE), (colour,) * 3).save(path)
            (folder / split / label / "0.png").write_bytes(b"broken")


@pytest.mark.parametrize("augment", ["none", "resized-crop"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_statistics_are_those_of_real_images(augment, accumulate, tmp_path):
    save_images(tmp_path / "images", {"train": 8, "test": 4})
    dataset = data.load(f"folder:{tmp_path / 'images'}", SIZE, hold="disk")
    recipe = ClassifierRecipe(epochs=1, batch_size=16, augment=augment, accumulate=accumulate)
    state, metrics, skipped = train(dataset, tmp_path / "run", recipe, Normed())
    statistics = state.variables["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], (100 - 127.5) / 64, rtol=1e-6)
    np.testing.assert_allclose(statistics["var"], 0, atol=1e-6)
    assert len(skipped) == 4  # of both splits, each once
    # All features are zero, so every image has the loss of even odds.
    np.testing.assert_allclose(metrics["train_loss"], np.log(2), rtol=1e-6)


def test_nothing_is_evaluated_on_no_images(tmp_path):
    save_images(tmp_path / "images", {"train": 4, "test": 1})
    dataset = data.load(f"folder:{tmp_path / 'images'}", SIZE, hold="disk")
    with pytest.raises((DataLost, UserError), match="none of the test images can be read"):
        train(dataset, tmp_path / "run", ClassifierRecipe(epochs=1, batch_size=8), Normed())


@pytest.mark.parametrize("mirror,flips", [("auto", False), ("yes", True), ("no", False)])
def test_whether_images_are_mirrored(mirror, flips, dataset, tmp_path, monkeypatch):
    given = []

    def program(task, *arguments, **options):
        given.append(task.flips)
        raise UserError("enough")

    monkeypatch.setattr(loop, "program", program)
    with pytest.raises(UserError, match="enough"):
        train(dataset, tmp_path, ClassifierRecipe(epochs=1, batch_size=8, mirror=mirror))
    assert given == [flips]


def test_what_is_not_finite_stops_the_run(tmp_path, dataset):
    recipe = ClassifierRecipe(
        epochs=5, batch_size=8, learning_rate=1e30, warmup_epochs=1.0, augment="none"
    )
    with pytest.raises(UserError) as refused:
        train(dataset, tmp_path, recipe, Linear(), every_steps=1, keep=1)
    found = json.loads((tmp_path / "non_finite.json").read_text())
    batches = task_and_feed(Linear(), dataset, recipe, SIZE)[1].training(0)
    for _ in range(found["step"]):
        batch = next(batches)
    assert found["samples"] == [dataset.train.name_of(i) for i in batch.index]
    assert not np.isfinite(found["loss"] + found["gradient_norm"])
    (last,) = (tmp_path / "checkpoints").iterdir()
    assert int(last.name) == found["step"] - 1
    message = str(refused.value)
    assert f"at step {found['step']} (epoch 1), on {', '.join(found['samples'][:3])}" in message
    assert f"last good checkpoint is {last};" in message and "(now 1e+30)" in message


def test_how_regions_are_used():
    even = regions.use(np.array([25.0, 25.0, 25.0, 25.0]))
    assert even == {"used": 4, "of": 4, "entropy": 2.0}
    uneven = regions.use(np.array([500.0, 496.0, 4.0, 0.0]))
    share = np.array([0.5, 0.496, 0.004])
    assert uneven["used"] == 2 and uneven["entropy"] == pytest.approx(-(share @ np.log2(share)))
    one = regions.use(np.array([0.0, 7.0]))
    assert one == {"used": 1, "of": 2, "entropy": 0.0}
    alone = regions.use(np.array([7.0]))
    assert regions.collapsed({"a": even, "b": uneven, "c": one, "d": alone}) == ["c"]


def test_positions_of_real_images_are_counted_by_region(dataset):
    program = program_of()
    variables = program.init().variables
    images = dataset.test.images[:8]
    labels = np.where(np.arange(8) < 5, 0, -1).astype(np.int32)
    batch = on_devices({"image": images, "label": labels}, program.mesh)
    sums = program.eval_step(variables, batch)
    apply = jax.jit(functools.partial(Net().apply, mutable="intermediates"))
    _, sown = apply(variables, normalize(jnp.asarray(images)))
    index = np.asarray(sown["intermediates"]["dynamic"]["region_index"][0])[:5]
    np.testing.assert_array_equal(
        sums["regions"]["dynamic"], np.bincount(index.ravel(), minlength=2)
    )


def test_a_collapsed_guide_is_said(dataset, tmp_path, capsys):
    class Collapsed(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            guide = jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0]), (*x.shape[:-1], 3))
            x = DRConv(4, (1, 1), regions=3, implementation="blocked", name="dynamic")(x, guide)
            return x.mean((1, 2))

    train(dataset, tmp_path, ClassifierRecipe(epochs=1, batch_size=8), Collapsed())
    assert (
        "guide of dynamic has collapsed: one of its 3 regions is in use" in capsys.readouterr().out
    )
    assert rows_of(tmp_path)[0]["regions"] == {"dynamic": {"used": 1, "of": 3, "entropy": 0.0}}


def test_tensorboard_gets_every_epoch_once(dataset, tmp_path, signal_at):
    recipe = ClassifierRecipe(epochs=3, batch_size=8, augment="none")
    signal_at(15)  # in the second epoch's evaluation; an epoch is 5 and 3 batches
    with pytest.raises(Preempted):
        train(dataset, tmp_path, recipe, Linear())
    train(dataset, tmp_path, recipe, Linear())
    curves, begun = tensorboard(tmp_path)
    assert begun == [1, 11]
    for name in ("train_loss", "test_accuracy"):
        expected = [(row["step"], pytest.approx(row[name])) for row in rows_of(tmp_path)]
        assert curves[name] == expected and [step for step, _ in expected] == [5, 10, 15]


@pytest.mark.parametrize(
    "recipe,expected",
    [
        (Recipe(epochs=4, learning_rate=1.0), {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 25: 0.5, 40: 0.0}),
        (PRESETS["imagenet"].train, {0: 0.5, 1200: 0.25, 2400: 0.0}),
        (
            Recipe(
                epochs=12,
                batch_size=8,
                learning_rate=0.02,
                reference_batch=16,
                schedule="steps",
                decay_rate=0.1,
                decay_epochs=(8, 11),
                warmup_steps=5,
                warmup_start=0.001,
            ),
            {0: 1e-5, 2: 0.01 * 0.5005, 4: 0.01, 5: 0.01, 79: 0.01, 80: 1e-3, 109: 1e-3, 110: 1e-4},
        ),
        (PRESETS["mobilenet"].train, {9: 0.045, 10: 0.045 * 0.98, 2999: 0.045 * 0.98**299}),
    ],
)
def test_schedules(recipe, expected):
    rate = learning_rate(recipe, steps_per_epoch=10)
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, 1e-5, 1e-6)


def test_a_schedule_in_steps_says_when():
    for options in ({"schedule": "steps"}, {"decay_epochs": (8.0,)}):
        with pytest.raises(UserError, match="--train.decay-epochs says when --train.schedule ste"):
            Recipe(**options)
    with pytest.raises(UserError, match="decay-epochs must be positive and rising, got 11 8"):
        Recipe(schedule="steps", decay_epochs=(11, 8))


def test_gradients_are_clipped_by_the_norm_of_all_of_them():
    params = {"kernel": jnp.zeros(2), "bias": jnp.zeros(1)}
    recipe = Recipe(gradient_clip=6.5, learning_rate=1.0, momentum=0.0, warmup_epochs=0.0)
    update = optimizer(recipe, 10)
    for scale, expected in ((1.0, 0.5), (0.5, 0.5), (0.1, 0.1)):  # of the norm 13
        gradients = {"kernel": scale * jnp.array([3.0, 4.0]), "bias": scale * jnp.array([12.0])}
        changes, _ = update.update(gradients, update.init(params), params)
        np.testing.assert_allclose(changes["kernel"], -expected * np.array([3.0, 4.0]), rtol=1e-6)
        np.testing.assert_allclose(changes["bias"], -expected * np.array([12.0]), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "exponential"])
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.1, 0.5, 1.0, 9.0])
def test_every_step_moves_and_the_peak_is_reached(schedule, warmup_epochs):
    recipe = Recipe(2, learning_rate=0.3, schedule=schedule, warmup_epochs=warmup_epochs)
    rates = np.asarray(jax.vmap(learning_rate(recipe, steps_per_epoch=10))(jnp.arange(20)))
    assert (rates > 0).all() and rates.max() == pytest.approx(0.3)
    warmup = min(int(10 * warmup_epochs), 19)
    rising = 0.3 * np.arange(1, warmup + 1) / max(warmup, 1)
    np.testing.assert_allclose(rates[:warmup], rising, rtol=1e-5)
    assert rates[warmup] == pytest.approx(0.3) and (np.diff(rates[warmup:]) <= 0).all()


def test_sgd_by_hand():
    """The update of PyTorch's and TensorFlow's papers: momentum over decayed gradients."""
    params = {"kernel": jnp.array(2.0), "norm": {"scale": jnp.array(2.0), "bias": jnp.array(2.0)}}
    gradients = jax.tree.map(lambda _: jnp.array(1.0), params)
    recipe = Recipe(
        schedule="exponential", decay_rate=1.0, learning_rate=0.1, weight_decay=0.5,
        momentum=0.9, nesterov=False, warmup_epochs=0.0,
    )  # fmt: skip
    update = optimizer(recipe, 10)
    state = update.init(params)
    for _ in range(2):
        changes, state = update.update(gradients, state, params)
        params = optax.apply_updates(params, changes)
    # kernel: 2 - 0.1 (1 + 0.5 2) = 1.8; velocity 0.9 2 + 1 + 0.5 1.8 = 3.7; 1.8 - 0.37 = 1.43
    expected = {"kernel": 1.43, "norm": {"scale": 1.71, "bias": 1.71}}
    assert jax.tree.map(float, params) == jax.tree.map(lambda v: pytest.approx(v, 1e-5), expected)


def test_the_average_of_the_weights(dataset):
    program = program_of(Linear())
    batch = first(8, dataset.train, program.mesh)
    state = program.init()
    average = np.asarray(state.variables["params"]["Dense_0"]["kernel"])
    for step in range(3):
        state, _ = program.train_step(state, batch)
        decay = min(0.9, (1 + step) / (10 + step))
        kernel = np.asarray(state.variables["params"]["Dense_0"]["kernel"])
        average = decay * average + (1 - decay) * kernel
    np.testing.assert_allclose(state.average["params"]["Dense_0"]["kernel"], average, rtol=1e-5)


def test_the_imagenet_recipe_is_that_of_the_shufflenet_v2_paper():
    recipe = PRESETS["imagenet"].train
    assert (recipe.batch_size, recipe.learning_rate, recipe.schedule) == (1024, 0.5, "linear")
    assert (recipe.momentum, recipe.weight_decay, recipe.label_smoothing) == (0.9, 4e-5, 0.1)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.nesterov) == (240, 0.0, False)


def test_configurations_are_saved_compared_and_shown():
    config = Config(model=ModelConfig(blocks=(1, 2, 3)), train=ClassifierRecipe(epochs=7))
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert configs.from_json(Config, saved) == config
    assert configs.differences(config, PRESETS["small"]) == {
        "model.blocks": ((1, 2, 3), None),
        "train.epochs": (7, 15),
    }
    lines = configs.shown(config, PRESETS["small"], "small").splitlines()
    assert len(lines) == len(configs.flat(config))
    assert [line.split(None, 1) for line in lines if "(small:" in line] == [
        ["model.blocks", "(1, 2, 3)  (small: None)"],
        ["train.epochs", "7  (small: 15)"],
    ]
    del saved["train"]["epochs"]
    assert configs.from_json(Config, saved).train.epochs == Recipe().epochs
    with pytest.raises(TypeError, match="colour"):
        configs.from_json(Config, {"colour": "red"})
