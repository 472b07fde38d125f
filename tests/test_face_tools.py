"""What a person does with a run of experiments.face: compare, embed, export, look at pictures."""

import dataclasses
import json
import re
import shutil
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

from drconv_jax.export import load_exported
from drconv_jax.onnx import quiet_session
from experiments.export import __main__ as export_of_classifiers
from experiments.face import compare, embed, export, pictures
from experiments.face.config import Config, FaceRecipe
from experiments.face.embeddings import compiled, read_gallery
from experiments.face.model import EmbedderConfig
from experiments.face.task import task_of
from experiments.face.trained import read_embedder
from experiments.runtime import mesh, run_folder, training
from experiments.runtime.checkpoints import Checkpoints
from experiments.runtime.images import squashed

SIZE = (32, 24)
PEOPLE = ["Ada", "Bob", "Cyd"]


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """As `compiled_quickly`, but for what other fixtures of this module compile too."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def written(run, **network):
    """A run's folder with a network as it is at the beginning."""
    small = EmbedderConfig(width=0.1, blocks=(1, 0, 0, 0), regions=3, embedding_size=8)
    config = Config(
        image_size=SIZE,
        model=dataclasses.replace(small, **network),
        train=FaceRecipe(batch_size=2, epochs=1),
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        task = task_of(config, len(PEOPLE))
        one = mesh.make_mesh(devices=jax.devices()[:1])
        state = training.program(task, config.train, one, steps_per_epoch=1).init()
    run.mkdir()
    run_folder.write_config(run, config)
    (run / "people.json").write_text(json.dumps(PEOPLE))
    checkpoints = Checkpoints(run, 1)
    checkpoints.save(1, state, {})
    checkpoints.close()
    return run


@pytest.fixture(scope="module")
def dr(tmp_path_factory):
    """A run with DRConv, which has chosen a threshold; no test changes it."""
    run = written(tmp_path_factory.mktemp("dr") / "run")
    (run / "report.json").write_text('{"threshold": 0.25}')
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without DRConv, that is not over, with larger embeddings and no mirror images."""
    return written(
        tmp_path_factory.mktemp("plain") / "run", name="mobilefacenet", embedding_size=12
    )


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A tree of images of several formats, with one that is broken and a file that is no image."""
    root = tmp_path_factory.mktemp("faces") / "tree"
    generator = np.random.default_rng(0)
    for name in ("a/1.png", "a/b/2.webp", "3.jpg", "c/4.png", "c/5.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = generator.integers(0, 256, (5, 4, 3), np.uint8)
        Image.fromarray(cells.repeat(9, axis=0).repeat(9, axis=1)).save(path)
    (root / "c/0.png").write_bytes(b"no image")
    (root / "pairs.txt").write_text("1 1")
    return root


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls a command in this process: its exit status, and what it says."""

    def command(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        status = 0
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            try:
                module.main()
            except SystemExit as stop:
                status = stop.code
        return status, *capsys.readouterr()

    return command


def refused(outcome, message):
    """Whether a command has ended with one sentence."""
    status, out, err = outcome
    *_, sentence = err.splitlines()
    return (
        status == 2 and not out and sentence.startswith("error: ") and bool(re.search(message, err))
    )


def embeddings_by(run, *paths):
    embedder = read_embedder("RUN-DIR", run)
    images = np.stack([squashed(path.read_bytes(), SIZE) for path in paths])
    return np.asarray(compiled(embedder)(images))


def test_embeddings_are_those_of_image_and_mirror_image(dr, faces):
    embedder = read_embedder("RUN-DIR", dr)
    images = np.stack(
        [squashed((faces / name).read_bytes(), SIZE) for name in ("3.jpg", "a/1.png")]
    )
    found = np.asarray(compiled(embedder)(images))
    apply = jax.jit(embedder.model.apply)
    normalized = (jnp.asarray(images, jnp.float32) - 127.5) / 64
    total = apply(embedder.network, normalized) + apply(embedder.network, normalized[:, :, ::-1])
    expected = total / np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    single = apply(embedder.network, normalized)
    one = embedder._replace(
        config=dataclasses.replace(embedder.config, train=FaceRecipe(flip=False))
    )
    expected = single / np.linalg.norm(single, axis=1, keepdims=True)
    np.testing.assert_allclose(compiled(one)(images), expected, atol=1e-5)
    assert np.abs(found - expected).max() > 1e-3


def test_embeddings_of_a_folder_and_of_a_zip(dr, faces, call, monkeypatch, tmp_path):
    monkeypatch.setattr(embed, "_BATCH", 2)
    out = tmp_path / "out"  # no .npz, which numpy would write behind it
    status, said, err = call(embed, dr, faces, "--out", out)
    assert status == 0, err
    assert "5 images embedded in 8 numbers each, 1 skipped" in said
    assert "left out: 1 file of other kinds than images (.txt 1)" in err
    assert "skipped c/0.png: it is not an image" in err
    with np.load(out) as arrays:
        names, embeddings = arrays["names"].tolist(), arrays["embeddings"]
    assert names == ["3.jpg", "a/1.png", "a/b/2.webp", "c/4.png", "c/5.png"]
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    expected = embeddings_by(dr, *(faces / name for name in names))
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)

    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for name in names:
            archive.write(faces / name, f"top/{name}")
        archive.writestr("__MACOSX/top/._3.jpg", b"for a program's own use")
    status, said, err = call(embed, dr, tmp_path / "faces.zip", "--out", out)
    assert status == 0 and "0 skipped" in said, err
    zipped = read_gallery("", out)
    assert zipped.names == [f"top/{name}" for name in names]
    np.testing.assert_allclose(zipped.embeddings, embeddings, atol=1e-5)


def test_what_cannot_be_embedded(dr, faces, call, tmp_path):
    out = tmp_path / "e.npz"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.png").write_bytes(b"")
    for arguments, message in (
        ([dr, tmp_path / "empty"], '"[^"]*empty" holds no images'),
        ([dr, tmp_path / "none"], 'there is no "'),
        ([tmp_path, faces], "RUN-DIR: there is no run in"),
        ([dr, faces, "--threads", 0], "--threads must be at least 1, got 0"),
    ):
        assert refused(call(embed, *arguments, "--out", out), message)
    status, _, err = call(embed, dr, tmp_path / "broken", "--out", out)
    assert status == 2 and "skipped x.png: the file is empty" in err
    assert "none of the 1 images can be read" in err
    assert refused(call(embed, dr, faces, "--out", tmp_path / "a/e.npz"), "--out: there is no fold")
    assert not out.exists()


def test_two_images_are_compared(dr, faces, call, tmp_path):
    lying, out = faces / "3.jpg", tmp_path / "out"
    with Image.open(faces / "a/1.png") as image:
        tags = Image.Exif()
        tags[ExifTags.Base.Orientation] = 6  # a quarter clockwise makes it upright again
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=tags)
    first, second = embeddings_by(dr, lying, faces / "a/1.png")
    cosine = float(first @ second)
    for threshold, decision in ((cosine + 1e-3, "two people"), (cosine - 1e-3, "the same person")):
        status, said, err = call(
            compare, dr, lying, tmp_path / "turned.png", "--out", out, "--threshold", threshold
        )
        assert status == 0, err
        shown, printed = re.match(r"cosine (\S+): (.*), by the threshold", said).groups()
        assert printed == decision and float(shown) == pytest.approx(cosine, abs=1e-4)
    with Image.open(out / "comparison.png") as picture:
        tall = picture.height
    status, said, err = call(compare, dr, lying, lying)
    assert status == 0 and "cosine 1.0000: the same person, by the threshold 0.2500" in said, err
    assert len(list((dr / "comparisons").glob("*/comparison.png"))) == 1
    shutil.rmtree(dr / "comparisons")
    assert tall > 500


def test_without_guide_masks(plain, faces, call, tmp_path):
    first, second = faces / "3.jpg", faces / "a/1.png"
    outcome = call(compare, plain, first, second, "--out", tmp_path)
    assert refused(outcome, "RUN-DIR: the run in .* has chosen no threshold yet, .* --threshold")
    status, _, err = call(compare, plain, first, second, "--out", tmp_path, "--threshold", 0.5)
    assert status == 0, err
    with Image.open(tmp_path / "comparison.png") as picture:
        assert 300 < picture.height < 500  # there is nothing below the images


def test_the_nearest_in_a_gallery(dr, plain, faces, call, tmp_path):
    names = [f"n{i}" for i in range(12)]
    own = embeddings_by(dr, faces / "3.jpg")[0]
    others = np.linalg.qr(np.stack([own, *np.eye(7, 8)]).T)[0].T[1:]  # at right angles to it
    cosines = np.linspace(-0.9, 0.9, 12)
    embeddings = cosines[:, None] * own + np.sqrt(1 - cosines**2)[:, None] * others[0]
    gallery = tmp_path / "gallery.npz"
    np.savez(gallery, names=names, embeddings=embeddings.astype(np.float32))
    status, said, err = call(compare, dr, faces / "3.jpg", "--gallery", gallery)
    assert status == 0, err
    title, *lines = said.splitlines()
    assert "of the nearest 10 of 12 images" in title
    assert [line.split()[1] for line in lines] == names[:1:-1]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(cosines[:1:-1], abs=2e-4)

    size = "has embeddings of 8 numbers, but the run's have 12"
    assert refused(call(compare, plain, faces / "3.jpg", "--gallery", gallery), size)
    np.savez(gallery, names=names, embeddings=embeddings, network="of another")
    other = "--gallery: .* has embeddings by another network"
    assert refused(call(compare, dr, faces / "3.jpg", "--gallery", gallery), other)
    np.savez(gallery, names=names[1:], embeddings=embeddings)
    none = "--gallery: .* is no file of embeddings and names"
    assert refused(call(compare, dr, faces / "3.jpg", "--gallery", gallery), none)
    for content in (b"", b"nothing", gallery.read_bytes()[:300]):
        gallery.write_bytes(content)
        assert refused(call(compare, dr, faces / "3.jpg", "--gallery", gallery), none)
    gallery.unlink()
    assert refused(
        call(compare, dr, faces / "3.jpg", "--gallery", gallery), "--gallery: there is n"
    )


def test_a_gallery_of_the_same_network(dr, faces, call, tmp_path):
    gallery = tmp_path / "gallery.npz"
    status, _, err = call(embed, dr, faces, "--out", gallery)
    assert status == 0, err
    status, said, err = call(compare, dr, faces / "c/4.png", "--gallery", gallery)
    assert status == 0 and said.splitlines()[1] == " 1.0000  c/4.png", err


def test_what_cannot_be_compared(dr, faces, call, tmp_path):
    good, broken = faces / "3.jpg", faces / "c/0.png"
    for arguments, message in (
        ([good, broken], f'"{broken}" cannot be read: it is not an image'),
        ([tmp_path / "none.jpg", good], r'none.jpg" cannot be read: No such file'),
        ([good], "two images must be given behind the run's folder, got 1"),
        ([good, good, good], "two images must be given"),
        ([good, good, "--gallery", "x"], "one image must be given with --gallery"),
        ([good, "--gallery", "x", "--threshold", 0], "--threshold is for two images"),
        ([good, "--gallery", "x", "--out", "y"], "--out is for two images"),
        ([good, good, "--threshold", 1.5], "--threshold must be from -1 to 1, got 1.5"),
        ([good, good, "--out", good], "--out: nothing can be written there"),
    ):
        assert refused(call(compare, dr, *arguments), message)
    assert refused(call(compare, tmp_path, good, good), "RUN-DIR: there is no run in")


def test_a_network_that_has_diverged(dr, faces, call, monkeypatch, tmp_path):
    nothing = np.full((2, 8), np.nan, np.float32)
    monkeypatch.setattr(compare, "compiled", lambda _: lambda images: nothing[: len(images)])
    monkeypatch.setattr(
        embed, "compiled", lambda _: lambda images: nothing[:1].repeat(len(images), 0)
    )
    message = "RUN-DIR: embeddings by the run in .* are no numbers"
    assert refused(call(compare, dr, faces / "3.jpg", faces / "3.jpg"), message)
    status, _, err = call(embed, dr, faces, "--out", tmp_path / "e.npz")
    assert status == 2 and re.search(message, err) and not (tmp_path / "e.npz").exists()


def test_export(dr, faces, call, tmp_path):
    paths = [faces / name for name in ("3.jpg", "a/1.png", "c/4.png")]
    images = np.stack([squashed(path.read_bytes(), SIZE) for path in paths])
    expected = embeddings_by(dr, *paths)
    for fold in ([], ["--no-fold"]):
        out = tmp_path / "model.stablehlo"
        status, said, err = call(export, dr, "--out", out, *fold)
        assert status == 0, err
        assert "for cpu, tpu, cuda; read back, its embeddings differ by at most" in said
        for batch in (1, 3):
            found = load_exported(out)(images[:batch])
            np.testing.assert_allclose(found, expected[:batch], atol=1e-5)
    assert refused(call(export, dr, "--platforms", "x"), "--platforms: platforms must be some of")
    assert refused(call(export, dr, "--out", tmp_path / "a/b"), "--out: .* cannot be written")
    assert refused(call(export, tmp_path), "RUN-DIR: there is no run in")
    other = "is of face recognition; export it with python -m experiments.face.export"
    assert refused(call(export_of_classifiers, dr), other)


@pytest.mark.filterwarnings("ignore")  # jax2onnx's
def test_export_to_onnx_computes_in_float32(faces, call, tmp_path):
    pytest.importorskip("jax2onnx", reason="no jax2onnx")
    run = written(tmp_path / "run", dtype="bfloat16")
    status, said, err = call(export, run, "--format", "onnx")
    assert status == 0, err
    assert "for ONNX; read back, its embeddings differ by at most" in said
    paths = [faces / name for name in ("3.jpg", "a/1.png", "c/4.png")]
    images = np.stack([squashed(path.read_bytes(), SIZE) for path in paths])
    (found,) = quiet_session(run / "model.onnx").run(None, {"inputs": images})
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    rounded = embeddings_by(run, *paths)  # by bfloat16
    assert (found * rounded).sum(axis=1).min() > 0.9


# --- Pictures


def test_the_hardest_pairs_first():
    similarities = np.array([0.9, 0.1, 0.3, 0.8, 0.2, 0.7])
    same = np.array([True, True, True, False, False, False])
    of_one, of_two = pictures.hardest_pairs(similarities, same, 2)
    assert (of_one.tolist(), of_two.tolist()) == ([1, 2], [3, 5])
    of_one, of_two = pictures.hardest_pairs(similarities, same)
    assert (of_one.tolist(), of_two.tolist()) == ([1, 2, 0], [3, 5, 4])


def curve_of(draw, monkeypatch, *arguments):
    """What a picture's axis has, instead of the picture."""
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    draw(None, *arguments)
    return figures[0].axes[0]


def test_roc(monkeypatch):
    """Pairs of the same cosine are one step; what no pair of two people reaches is at the edge."""
    similarities = np.array([0.9, 0.5, 0.5, 0.1, 0.5, 0.4, 0.3, 0.2])
    same = np.arange(8) < 4
    axis = curve_of(pictures.draw_roc, monkeypatch, similarities, same, 0.5)
    curve, point, _ = axis.lines
    far, tar = curve.get_data()
    assert tar.tolist() == [0, 0.25, 0.75, 0.75, 0.75, 0.75, 1]
    assert far.tolist() == [0.125, 0.125, 0.25, 0.5, 0.75, 1, 1]
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([0.25], [0.75])
    assert axis.get_xscale() == "log"


def test_similarities(monkeypatch):
    similarities = np.array([0.9, 0.5, 0.5, 0.1, 0.5, 0.4, 0.3, 0.2])
    same = np.arange(8) < 4
    axis = curve_of(pictures.draw_similarities, monkeypatch, similarities, same, 0.5)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "one person (4 pairs): 25.0% below",
        "two people (4 pairs): 25.0% above",
        "threshold 0.500",
    ]
    heights = [bar.get_height() for bar in axis.patches]
    assert sum(heights[:60]) == pytest.approx(100) and sum(heights[60:]) == pytest.approx(100)


def test_guide_masks_in_order_of_the_call(faces):
    config = EmbedderConfig(width=0.1, blocks=(1, 1, 0, 0), regions=3, embedding_size=8)
    model = config.build()
    network = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    images = np.stack(
        [squashed((faces / name).read_bytes(), SIZE) for name in ("3.jpg", "a/1.png")]
    )
    masks = pictures.guide_masks(model, network, images)
    assert {layer: mask.shape for layer, mask in masks.items()} == {
        "stage1_down/expand": (2, 16, 12),
        "stage1_down/project": (2, 8, 6),
        "stage1_block0": (2, 8, 6),  # whose convolutions share a guide
        "stage2_down/expand": (2, 8, 6),
        "stage2_down/project": (2, 4, 3),
        "stage3_down/expand": (2, 4, 3),
        "stage3_down/project": (2, 2, 2),
    }
    some = pictures.guide_masks(model, network, images, most=3)
    assert list(some) == ["stage1_down/expand", "stage2_down/expand", "stage3_down/project"]


def test_pictures_are_drawn(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, *SIZE, 3), np.uint8)
    similarities = generator.uniform(-1, 1, 40).astype(np.float32)
    same = similarities > 0  # all are told apart, so that FAR is 0
    pair = pictures.Pair((images[0], images[1]), ("$x_{", "日本/" + 99 * "x"), 0.5)
    masks = {"a/b": generator.integers(0, 3, (2, 4, 3))}
    names = ("roc", "similarities", "hardest", "masks")
    paths = [tmp_path / f"{name}.png" for name in names]
    pictures.draw_roc(paths[0], similarities, same, 0.0)
    pictures.draw_similarities(paths[1], similarities, same, 0.0)
    pictures.draw_hardest_pairs(paths[2], [pair, pair], [pair], 0.4)
    pictures.draw_guide_masks(paths[3], images, masks, pair.names, 3)
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5
