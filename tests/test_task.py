"""A task that is no classifier: the runtime knows nothing of what it trains."""

import dataclasses
import functools
import json
import os
import pickle
import re
import signal
import sys
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from runs import checkpoints_of, rows_of

from experiments.runtime import experiment, loop, mesh, pipeline, training
from experiments.runtime.checkpoints import CheckpointConfig
from experiments.runtime.errors import Preempted
from experiments.runtime.mesh import from_all_processes, make_mesh
from experiments.runtime.pipeline import OrderByEpoch, Share
from experiments.runtime.recipes import Recipe

CANVASES = (4, 6), (6, 4)
COUNT, BROKEN = 43, 8  # an image in two is upright
# 21 upright ones and 22 others make two batches of each canvas, of 8, on 8 devices.
RECIPE = Recipe(
    epochs=3,
    batch_size=8,
    learning_rate=0.3,
    momentum=0.5,
    weight_decay=0.01,
    warmup_epochs=0.0,
    ema=0.5,
)


program = functools.cache(training.program)  # compiling takes most of the time


@pytest.fixture(autouse=True)
def standard_promotion():  # optax's
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def compiled_once(compiled_quickly, monkeypatch):
    monkeypatch.setattr(loop, "program", program)


@dataclasses.dataclass(frozen=True)
class Regression:
    """Learns the mean brightness of images of two shapes."""

    best = "test_score"
    reduces = False

    def init(self, key):
        slope = jax.random.uniform(key)
        return {"params": {"backbone": {"kernel": jnp.array(2.0)}, "head": {"slope": slope}}}

    def trained(self, params):
        return {"backbone": {"kernel": False}, "head": {"slope": True}}

    def parted(self, params):
        return jax.tree.map(lambda _: False, params)

    def batch_shapes(self, batch_size):
        targets = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
        return tuple({**b, "target": targets} for b in self.evaluation_batch_shapes(batch_size))

    def evaluation_batch_shapes(self, batch_size):
        return tuple(
            {"image": jax.ShapeDtypeStruct((batch_size, *canvas), jnp.float32)}
            for canvas in CANVASES
        )

    def loss(self, variables, batch, key, step):
        noise = 0.01 * jax.random.normal(key, batch["target"].shape)
        errors = self.evaluate(variables, batch) + noise - batch["target"]
        parts = {"bias": errors.mean(), "square": (errors**2).mean()}
        return parts["square"], ({}, parts)

    def evaluate(self, variables, batch):
        params = variables["params"]
        slope = params["backbone"]["kernel"] * params["head"]["slope"]
        return slope * batch["image"].mean((1, 2))

    def evaluation(self):
        return Errors()


class Errors:
    """Keeps every prediction, by the image that it is for."""

    def __init__(self):
        self.index, self.predictions = [], []

    def add(self, batch, results):
        self.index.append(batch.index)
        self.predictions.append(results)

    def row(self):
        index, predictions = (
            from_all_processes(np.concatenate(parts)) for parts in (self.index, self.predictions)
        )
        real = index >= 0
        assert sorted(index[real]) == list(range(COUNT))
        errors = predictions[real] - [brightness(i) for i in index[real]]
        return {"test_score": -float(np.abs(errors).max()), "images": int(real.sum())}


def brightness(index):
    return 0.02 * index


def canvas_of(index):
    return CANVASES[index % 2]


@dataclasses.dataclass(frozen=True)
class Images:
    """Both splits: in training one image is broken."""

    training: bool

    def name_of(self, index):
        return f"image {index}"

    def read(self, index, generator=None):
        if self.training and index == BROKEN:
            raise ValueError("it is torn")
        image = np.full(canvas_of(index), brightness(index), np.float32)
        return {"image": image, "target": np.float32(brightness(index))} if self.training else {
            "image": image
        }  # fmt: skip

    def stand_ins(self, index):
        return range(index % 2, COUNT, 2)

    def blank(self, index):
        return {"image": np.zeros(canvas_of(index), np.float32)}


def batches_by_canvas(batch_size, epoch):
    """An epoch's batches, each of one canvas."""
    generator = np.random.default_rng((RECIPE.seed, epoch))
    full = [
        generator.permutation(np.arange(canvas, COUNT, 2))[: 16 // batch_size * batch_size]
        for canvas in range(2)
    ]
    return generator.permutation(np.concatenate(full).reshape(-1, batch_size)).ravel()


@dataclasses.dataclass
class Feed:
    share: Share = dataclasses.field(default_factory=lambda: Share(8))
    stop_before: int = -1  # the batch before which SIGTERM comes

    train, test = Images(training=True), Images(training=False)
    steps_per_epoch = 4

    def training(self, step):
        order = functools.partial(batches_by_canvas, self.share.batch_size)
        order = OrderByEpoch(32, order).seed(RECIPE.seed)
        order = pickle.loads(pickle.dumps(order))  # as for worker processes
        batches = pipeline.training(self.train, order, 0, step, self.share)
        for number, batch in enumerate(batches, step):
            if number == self.stop_before:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def evaluation(self):
        turns = []
        for canvas in range(2):
            images = np.arange(canvas, COUNT, 2)
            places, real = pipeline.padded(len(images), self.share.batch_size)
            turns.append((images[places], real))
        places, real = map(np.concatenate, zip(*turns, strict=True))
        return pipeline.evaluation(self.test, places, real, self.share)


def train(folder, recipe=RECIPE, *, task=None, devices=None, **feed):
    when, where = CheckpointConfig(keep=1), make_mesh(devices=devices)
    return loop.train(
        task or Regression(), Feed(**feed), recipe, folder, mesh=where, checkpoint=when
    )


def test_it_trains_what_is_to_be_trained_and_is_judged_by_its_own_metric(tmp_path, capsys):
    state, metrics, skipped = train(tmp_path)
    assert skipped == ["image 8: it is torn"]
    params = state.variables["params"]
    assert params["backbone"]["kernel"] == 2.0  # neither an update nor weight decay
    assert abs(params["head"]["slope"] - 0.5) < 0.02
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    assert shapes == [(), ()]  # the momentum of one parameter, and the schedule's count
    assert state.average["params"]["backbone"]["kernel"] == 2.0
    rows = rows_of(tmp_path)
    assert metrics["images"] == metrics["average_images"] == COUNT
    assert metrics["test_score"] > -0.03  # of brightnesses from 0 to 0.84
    assert rows[-1]["step"] == 12 and set(rows[0]) == {
        *("epoch", "step", "train_loss", "train_bias", "train_square"),
        *("test_score", "images", "average_test_score", "average_images"),
    }
    scores = {row["step"]: row["average_test_score"] for row in rows}
    assert set(checkpoints_of(tmp_path)) == {12, max(scores, key=scores.get)}
    out = capsys.readouterr().out
    last = rows[-1]
    assert (
        f"epoch   3  loss {last['train_loss']:.3f}  bias {last['train_bias']:.3f}  "
        f"square {last['train_square']:.3f}  test score {last['test_score']:.4f}  "
        f"average {last['average_test_score']:.4f}  "
    ) in out


def test_it_goes_on_as_if_it_had_never_been_stopped(tmp_path):
    whole, *_ = train(tmp_path / "whole")
    for stop_before in (2, 5):  # in the first epoch and in the second
        folder = tmp_path / f"stopped{stop_before}"
        with pytest.raises(Preempted):
            train(folder, stop_before=stop_before)
        assert len(rows_of(folder)) == stop_before // 4
        state, *_ = train(folder)
        jax.tree.map(np.testing.assert_array_equal, state, whole)
        assert rows_of(folder) == rows_of(tmp_path / "whole")


@dataclasses.dataclass(frozen=True)
class InParts(Regression):
    """Its slope is the sum of seven numbers, of which no device has more than its part."""

    def init(self, key):
        seven = jax.random.uniform(key, (7,)) / 7
        return {"params": {"backbone": {"kernel": jnp.array(2.0)}, "slopes": seven}}

    def trained(self, params):
        return {"backbone": {"kernel": False}, "slopes": True}

    def parted(self, params):
        return {"backbone": {"kernel": False}, "slopes": True}

    def evaluate(self, variables, batch):
        slopes = variables["params"]["slopes"]
        slope = jnp.where(jnp.arange(len(slopes)) < 7, slopes, 0).sum()
        return 2 * slope * batch["image"].mean((1, 2))


def test_what_lies_in_parts_goes_on_on_another_number_of_devices(tmp_path):
    whole, rows = train(tmp_path / "whole", task=InParts())[:2]
    with pytest.raises(Preempted):
        train(tmp_path / "run", task=InParts(), stop_before=3)
    with pytest.raises(Preempted):
        train(tmp_path / "run", task=InParts(), stop_before=6, devices=jax.devices()[:2])
    state, metrics, _ = train(tmp_path / "run", task=InParts(), devices=jax.devices()[:4])
    assert metrics["test_score"] == pytest.approx(rows["test_score"], rel=1e-4)
    for tree in (state.variables, state.average, state.opt_state):
        lengths = {shard.data.shape for leaf in jax.tree.leaves(tree) if leaf.ndim == 1
                   for shard in leaf.addressable_shards}  # fmt: skip
        assert lengths == {(2,)}  # of 8, the last of which is no slope
    found, expected = (s.variables["params"]["slopes"] for s in (state, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[7] == 0


@dataclasses.dataclass(frozen=True)
class Network:
    name: str = "line"


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = "grey"
    model: Network = dataclasses.field(default_factory=Network)
    train: Recipe = RECIPE
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)


@dataclasses.dataclass(frozen=True)
class Arguments(experiment.Arguments):
    recipe: Literal["long", "short"] = "long"
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


EXPERIMENT = experiment.Experiment(
    name="regression",
    description="Learns to see how bright it is.",
    arguments=Arguments,
    presets={"long": Config(), "short": Config(train=dataclasses.replace(RECIPE, epochs=1))},
    set_up=lambda config, loading: experiment.Setup(
        Regression(),
        Feed(),
        facts={"images": COUNT},
        summary=f"{COUNT} images that are {config.data}",
        files={"units.json": ["candela"]},
        pictures={"slope.txt": lambda path, v: path.write_text(str(v["params"]["head"]["slope"]))},
    ),
    task_without_data=lambda arguments: Regression(),
    absolute=lambda config: config,
)


def test_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mesh, "join_processes", lambda cluster: None)  # it is too late for that

    def command(*options):
        monkeypatch.setattr(sys, "argv", ["regression", *options])
        experiment.main(EXPERIMENT)
        return capsys.readouterr().out

    run = tmp_path / "run"
    out = command("--recipe", "short", "--run-dir", str(run))
    assert f"43 images that are grey; run folder {run}\n" in out
    report, config, facts, units = (
        json.loads((run / f"{name}.json").read_text())
        for name in ("report", "config", "data", "units")
    )
    assert f"test score {report['test_score']:.4f} after 1 epochs, 2 parameters, 1 images" in out
    assert config["train"]["epochs"] == 1 and facts == {"images": COUNT, "steps in an epoch": 4}
    assert units == ["candela"] and report["skipped"] == ["image 8: it is torn"]
    assert 0 < float((run / "slope.txt").read_text()) < 1
    for options, shown in (
        (("--recipe", "short"), "1"),
        (("--train.epochs", "2"), r"2  \(long: 3\)"),
    ):
        assert re.search(rf"^train.epochs +{shown}$", command("--show", *options), re.MULTILINE)
    with pytest.raises(SystemExit) as refused:
        command("--resume", str(run), "--data", "green", "--model.name", "curve")
    assert refused.value.code == 2
    assert "--model.name is line, not curve; leave" in capsys.readouterr().err


def test_a_step_for_each_shape_of_batches():
    compiled = program(Regression(), RECIPE, make_mesh(), steps_per_epoch=4)
    state, seen = compiled.init(), set()
    for batch, _ in zip(Feed().training(0), range(4), strict=False):
        shape = batch.arrays["image"].shape
        state, results = compiled.steps.train(state, batch.arrays)
        assert set(results) == {"loss", "bias", "square", "gradient_norm", "learning_rate"}
        seen.add(shape)
    assert seen == {(8, *canvas) for canvas in CANVASES}
    with pytest.raises(KeyError):  # nothing is compiled on the way
        compiled.steps.train(state, {name: a[:4] for name, a in batch.arrays.items()})


def test_parts_of_a_batch_have_keys_of_their_own():
    recipe = dataclasses.replace(RECIPE, batch_size=16, accumulate=2, ema=0.0)
    compiled = program(Regression(), recipe, make_mesh(), steps_per_epoch=4)
    images = {"image": np.zeros((16, *CANVASES[0]), np.float32)}
    batch = {**images, "target": np.zeros(16, np.float32)}
    _, results = compiled.train_step(compiled.init(), batch)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), 0), 2)
    noise = np.stack([0.01 * jax.random.normal(key, (8,)) for key in keys])
    np.testing.assert_allclose(results["bias"], noise.mean(), rtol=1e-5)
    np.testing.assert_allclose(results["loss"], (noise**2).mean(), rtol=1e-5)


def test_processes_read_batches_of_one_canvas_among_them():
    alone = Feed().training(3)
    feeds = [Feed(Share(8, process, 2)) for process in range(2)]
    for whole, *shares in zip(alone, *(feed.training(3) for feed in feeds), strict=False):
        assert np.concatenate([s.index for s in shares]).tolist() == whole.index.tolist()
        assert {s.arrays["image"].shape for s in shares} == {(4, *whole.arrays["image"].shape[1:])}
        for share in shares:
            expected = [brightness(i) for i in share.index]
            np.testing.assert_allclose(share.arrays["target"], expected, rtol=1e-6)
        if BROKEN in {key for share in shares for key in share.broken}:
            assert len(set(whole.index)) in (7, 8) and (whole.index % 2 == BROKEN % 2).all()
            break
    turns = list(zip(*(feed.evaluation() for feed in feeds), strict=True))
    assert len(turns) == 6
    seen = np.concatenate([share.index for shares in turns for share in shares])
    assert sorted(seen[seen >= 0]) == list(range(COUNT))
