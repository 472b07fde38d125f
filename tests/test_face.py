"""Face recognition: who is trained on and who is judged, the task, the command."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import checkpoints_of, finish, rows_of
from test_hosts import free_address

from drconv_jax.margin_softmax import cosface
from experiments.face import __main__ as face
from experiments.face import faces, lfw
from experiments.face.config import PRESETS, Config, FaceRecipe
from experiments.face.feed import Decoded, FaceImages, in_memory
from experiments.face.model import EmbedderConfig
from experiments.face.pairs import Pairs
from experiments.face.task import FaceEvaluation, Recognition
from experiments.runtime import configs
from experiments.runtime.errors import DataLost, UserError
from experiments.runtime.pipeline import Loading, Share
from experiments.runtime.task import HostBatch

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


# --- Batches


@pytest.mark.parametrize("hold", ["memory", "disk"])
@pytest.mark.parametrize("per_person", [0, 2])
def test_batches_of_training(tree, hold, per_person):
    found, skipped = faces.load(config(tree, fold=0)), []
    recipe = FaceRecipe(batch_size=8, images_per_person=per_person, seed=3)
    train = in_memory(found.train, SIZE, hold, "reading", skipped)
    assert isinstance(train, Decoded) == (hold == "memory") and not skipped

    def feed(process, processes):
        share = Share(8, process, processes)
        labels = found.train.labels
        return FaceImages(train, train, labels, share, SIZE, recipe, Loading())

    alone, steps = feed(0, 1), feed(0, 1).steps_per_epoch
    assert steps == len(found.train) // 8
    batches = [b for b, _ in zip(alone.training(0), range(2 * steps), strict=False)]
    for epoch in (batches[:steps], batches[steps:]):
        index = np.concatenate([b.index for b in epoch])
        if per_person:
            for batch in epoch:
                assert set(np.bincount(batch.arrays["label"]).tolist()) <= {0, 2, 4}
        else:
            assert len(set(index.tolist())) == len(index)
    assert batches[0].index.tolist() != batches[steps].index.tolist()
    for batch in batches:
        np.testing.assert_array_equal(batch.arrays["label"], found.train.labels[batch.index])
    place = int(batches[1].index[5])
    with Image.open(io.BytesIO(found.train[place].content)) as image:
        np.testing.assert_array_equal(batches[1].arrays["image"][5], np.asarray(image))
    later = next(alone.training(steps + 1))
    assert later.index.tolist() == batches[steps + 1].index.tolist()
    shares = [next(feed(process, 2).training(1)) for process in range(2)]
    assert np.concatenate([s.index for s in shares]).tolist() == batches[1].index.tolist()


def test_a_broken_image_is_left_out(tmp_path):
    for person in range(3):
        (tmp_path / name(person)).mkdir()
        for number in (1, 2):
            file = tmp_path / name(person) / f"{name(person)}_{number:04}.jpg"
            file.write_bytes(b"torn" if (person, number) == (1, 2) else jpeg(person, number))
    (tmp_path / "pairs.txt").write_text(
        f"{name(2)}\t1\t2\n{name(0)}\t1\t{name(1)}\t1\n{name(1)}\t1\t2\n"
    )
    skipped = []
    found = faces.labelled(f"folder:{tmp_path}")
    chosen = faces.Chosen(found.images, np.arange(6), found.labels)
    held = in_memory(chosen, SIZE, "auto", "reading", skipped)
    assert skipped == [
        f"{name(1)}/{name(1)}_0002.jpg: it is not an image of a format that Pillow reads"
    ]
    assert held.places.tolist() == [0, 1, 2, 4, 5] and held.labels.tolist() == [0, 0, 1, 2, 2]
    assert held.name_of(3) == f"{name(2)}/{name(2)}_0001.jpg"


# --- The task


def evaluated(first, second, same, folds, judged, embeddings, index, held_out):
    pairs = Pairs(np.array(first), np.array(second), np.array(same), np.array(folds))
    evaluation = FaceEvaluation(np.array(held_out), pairs, np.array(judged), lambda _: None)
    evaluation.add(HostBatch({}, np.array(index), {}), np.array(embeddings, np.float32))
    return evaluation, evaluation.row()


def test_a_threshold_is_chosen_by_others():
    angle = np.radians([0, 10, 0, 40, 0, 50, 0, 80])  # of the two images of four pairs
    embeddings = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    order = [7, 2, 3, 0, 1, 6, 5, 4]
    index = [*order, -1]
    rows = [*embeddings[order], [np.nan, np.nan]]
    first, second, same = [0, 2, 4, 6], [1, 3, 5, 7], [True, True, False, False]
    # The second and third pair, of 40 and 50 degrees, choose; the others are easy.
    evaluation, row = evaluated(
        first, second, same, [0, 1, 1, 0], [True, False, False, True], rows, index, range(8)
    )
    assert row["accuracy"] == 1 and row["pairs"] == 2 and row["equal_error_rate"] == 0
    assert np.cos(np.radians(50)) < row["threshold"] <= np.cos(np.radians(40))
    np.testing.assert_allclose(
        evaluation.similarities, np.cos(np.radians([10, 40, 50, 80])), atol=1e-6
    )
    # Chosen by pairs of 10 and 80 degrees, the smallest threshold that tells them apart takes all
    # others for different people.
    _, row = evaluated(
        first, second, same, [0, 1, 1, 0], [False, True, True, False], rows, index, range(8)
    )
    assert row["accuracy"] == 0.5 and row["equal_error_rate_of_others"] == 0


def test_pairs_of_a_broken_image_do_not_count():
    embeddings = np.eye(6)[[0, 0, 1, 2, 3]]
    evaluation, row = evaluated(
        [0, 2, 4, 0], [1, 3, 5, 3], [True, False, True, False], [0, 0, 1, 1], [True] * 4,
        embeddings, range(5), [0, 1, 2, 3, 4],
    )  # fmt: skip
    assert row["pairs"] == 3 and np.isnan(evaluation.similarities).tolist() == [
        False,
        False,
        True,
        False,
    ]
    with pytest.raises(DataLost, match="no pairs are left"):
        evaluated([0], [1], [True], [0], [True], embeddings[:1], [0], [0])


def test_the_margin_grows_and_centres_are_padded():
    task = Recognition(
        EmbedderConfig("mobilefacenet", width=0.1, blocks=(1, 0, 0, 0), embedding_size=8).build(),
        SIZE, people=5, margin=cosface(8.0, 0.5), grow_steps=4, flip=False,
    )  # fmt: skip
    variables = task.init(jax.random.key(0))
    variables["params"]["centres"] = jnp.pad(variables["params"]["centres"], ((0, 3), (0, 0)))
    batch = {
        "image": jax.random.randint(jax.random.key(1), (6, *SIZE, 3), 0, 256).astype(jnp.uint8),
        "label": jnp.arange(6) % 5,
    }

    @jax.jit
    def both(step):
        loss = lambda v: task.loss(v, batch, jax.random.key(2), step)[0]  # noqa: E731
        return jax.value_and_grad(loss)(variables)

    losses = [float(both(jnp.int32(step))[0]) for step in (0, 2, 4, 100)]
    assert losses[0] < losses[1] < losses[2] == losses[3]
    gradient = both(jnp.int32(1))[1]["params"]["centres"]
    assert (gradient[5:] == 0).all() and (jnp.abs(gradient[:5]).max(1) > 0).all()


# --- The command

SMALL = [
    "--image-size", 32, 32, "--model.name", "dr_mobilefacenet_all", "--model.width", 0.1,
    "--model.blocks", 1, 1, 0, 0, "--model.regions", 2, "--model.embedding-size", 16,
    "--train.epochs", 2, "--train.batch-size", 8, "--checkpoint.every-steps", 1,
    "--checkpoint.keep", 9, "--margin.grow-epochs", 1, "--fold", 1,
    "--train.learning-rate", 0.003,  # at which rounding does not grow from step to step
]  # fmt: skip


def start(*arguments, env, devices=1):
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.face", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env, **flags},
    )


def test_a_run_on_other_devices_and_processes(tree, env, tmp_path):
    run, data = tmp_path / "run", ["--data", f"folder:{tree}"]
    status, out, err = finish(start(*data, "--run-dir", run, *SMALL, env=env, devices=4))
    assert status == 0, err
    found = faces.load(config(tree, fold=1))
    assert f"{len(found.train)} training images of {len(found.people)} people and 4 pairs" in out
    rows, report = rows_of(run), json.loads((run / "report.json").read_text())
    assert json.loads((run / "people.json").read_text()) == list(found.people)
    assert report["accuracy"] == rows[-1]["accuracy"] and -1 <= report["threshold"] <= 1
    for picture in ("roc", "similarities", "hardest_pairs", "guide_masks"):
        with Image.open(run / f"{picture}.png") as drawn:
            assert min(drawn.size) > 200
    assert set(rows[0]) >= {"accuracy", "equal_error_rate", "train_cosine", "train_accuracy"}

    assert len(found.people) == 11  # whose centres lie in 4 parts, then in 2
    again = tmp_path / "again"
    shutil.copytree(run, again)
    steps = checkpoints_of(again)
    for step in steps[len(steps) // 2 :]:
        shutil.rmtree(again / f"checkpoints/{step}")
    status, _, err = finish(start("--resume", again, env=env, devices=2))
    assert status == 0, err
    for row, other in zip(rows_of(again), rows, strict=True):
        assert row == pytest.approx(other, rel=2e-3, abs=1e-3)

    two = tmp_path / "two"
    where = ["--coordinator", free_address(), "--processes", 2, "--process-id"]
    options = [*data, "--run-dir", two, *SMALL]
    for process in [start(*options, *where, i, env=env) for i in range(2)]:
        status, _, err = finish(process)
        assert status == 0, err
    for row, other in zip(rows_of(two), rows, strict=True):
        assert row == pytest.approx(other, rel=2e-3, abs=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--data must be given"),
        (["--data", "folder:/nowhere"], '--data: there is no "/nowhere"'),
        (["--data", "TREE", "--pairs", "/nowhere.txt"], '--pairs: "/nowhere.txt" cannot be read'),
        (["--data", "TREE", "--model.name", "vgg"], '--model.name must be one of list_models("f'),
        (["--data", "TREE", "--model.blocks", 1, 1], "--model.blocks must be four numbers"),
        (["--data", "TREE", "--margin.sample", 0], "--margin.sample must be positive and at most"),
        (
            ["--data", "TREE", "--train.images-per-person", 3],
            "--train.images-per-person must be 0 or a number that --train.batch-size 64",
        ),
        (["--data", "TREE", "--train.batch-size", 512], "--train.batch-size 512 is more than the"),
        (["--data", "TREE", "--fold", 1, "--pairs-data", "folder:x"], "leave out --pairs-data"),
        (["--people", 1], "--people must be at least 2, got 1"),
    ],
)
def test_what_is_refused(tree, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr("experiments.runtime.mesh.join_processes", lambda cluster: None)
    options = [f"folder:{tree}" if option == "TREE" else str(option) for option in options]
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["face", "--run-dir", str(run), *options])
    with pytest.raises(SystemExit) as refused:
        face.main()
    assert refused.value.code == 2 and not run.exists()
    assert message in capsys.readouterr().err


# --- LFW's protocol


def test_the_runs_of_the_protocol(tmp_path):
    arguments = lfw.Arguments("folder:/lfw.zip", folds=(3, 4), runs=tmp_path)
    jobs = lfw.jobs_of(arguments)
    assert len(jobs) == 4 * 2 * 2
    recipes = set()
    for job, (case, found) in jobs.items():
        plain = dataclasses.replace(found, model=PRESETS["lfw"].model, fold=0)
        recipes.add(dataclasses.replace(plain, train=dataclasses.replace(plain.train, seed=0)))
        assert job.name == f"{case}-fold{found.fold}-seed{found.train.seed}"
        assert configs.arguments(found, PRESETS["lfw"]) == list(job.command[2:])
    assert len(recipes) == 1  # but for the network, the fold and the seed


def test_differences_are_to_the_plain_network_of_the_same_fold_and_seed():
    accuracies = {
        "plain": {(0, 0): 0.60, (0, 1): 0.70, (1, 0): 0.65},
        "dr": {(0, 0): 0.61, (0, 1): 0.73, (1, 1): 0.99},
    }
    runs = [
        lfw.Run(case, fold, seed, {"accuracy": accuracy, "equal_error_rate": 1 - accuracy})
        for case, values in accuracies.items()
        for (fold, seed), accuracy in values.items()
    ]
    plain, dr = lfw.table(runs).splitlines()[2:]
    assert plain == "| `nn.Conv` | 65.00 ± 5.00 |  | 35.00 ± 5.00 |  | 3 |"
    assert "| +2.00 ± 1.00 | 22.33 ± 19.43 | -2.00 ± 1.00 | 3 |" in dr


def test_a_run_with_other_options_is_not_taken_for_done(tmp_path):
    arguments = lfw.Arguments("folder:/lfw.zip", cases=("dr",), folds=(0,), runs=tmp_path)
    job, wanted = next(iter(lfw.jobs_of(arguments).items()))
    assert not lfw._is_done(job, wanted)
    job.folder.mkdir()
    (job.folder / "report.json").write_text("{}")
    longer = dataclasses.replace(wanted[1].train, epochs=99)
    for change, outcome in (
        ({"data": "folder:/elsewhere"}, None),
        ({"fold": 1}, "--fold"),
        ({"train": longer}, "--train.epochs"),
    ):
        there = dataclasses.replace(wanted[1], **change)
        (job.folder / "config.json").write_text(json.dumps(dataclasses.asdict(there)))
        if outcome is None:
            assert lfw._is_done(job, wanted)
        else:
            with pytest.raises(UserError, match=f"is a run with other options .{outcome}"):
                lfw._is_done(job, wanted)
