import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax import export

from drconv_jax.export import export_model, load_exported
from drconv_jax.models import BlockGuide, ShuffleNetV2

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LOAD = """
import sys, jax, numpy as np
from jax import export
run = export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call
for batch in (1, 5):
    np.save(f"{sys.argv[2]}/{batch}.npy", run(np.load(f"{sys.argv[2]}/x.npy")[:batch]))
assert not any(name.startswith(("drconv_jax", "flax")) for name in sys.modules)
"""


def test_another_process_runs_the_file_at_any_batch_size(tmp_path):
    from test_models import DR

    model = ShuffleNetV2(num_classes=5, width=0.1, blocks=(1, 1, 1), conv=DR, guide=BlockGuide(3))
    x = jax.random.normal(jax.random.key(0), (5, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    path = tmp_path / "model.stablehlo"
    export_model(path, model.apply, variables, (32, 32, 3))
    assert export.deserialize(bytearray(path.read_bytes())).platforms == ("cpu", "tpu", "cuda")
    np.save(tmp_path / "x.npy", x)
    subprocess.run([sys.executable, "-c", LOAD, path, tmp_path], check=True)
    expected = jax.jit(model.apply)(variables, x)
    for batch in (1, 5):
        y = np.load(tmp_path / f"{batch}.npy")
        np.testing.assert_allclose(y, expected[:batch], atol=1e-5 * np.abs(expected).max())


def test_a_wrong_file_is_refused(tmp_path):
    path = tmp_path / "model.stablehlo"
    export_model(path, lambda w, x: x + w, jnp.ones(()), (3,))
    np.testing.assert_array_equal(load_exported(path)(jnp.ones((2, 3))), np.full((2, 3), 2))
    for bad in (b"", b"not a program", path.read_bytes()[:-100]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="model.stablehlo. is no network that jax.export"):
            load_exported(path)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.export", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def test_the_command_exports_a_run(tmp_path):
    process = runs.start(
        *runs.SMALL,
        "--train.epochs",
        1,
        "--run-dir",
        tmp_path / "run",
        env={"JAX_PLATFORMS": "cpu"},
    )
    assert runs.finish(process)[0] == 0
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == list("0123456789")
    done = command(tmp_path / "run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "its logits differ by at most" in done.stdout
    images = np.zeros((4, 8, 8, 3), np.uint8)
    in_onnx = command(tmp_path / "run", "--format", "onnx")
    assert in_onnx.returncode == 0, in_onnx.stderr
    assert "model.onnx" in in_onnx.stdout and "its logits differ by at most" in in_onnx.stdout
    assert load_exported(tmp_path / "out")(images).shape == (4, 10)


def test_the_command_names_what_is_wrong(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: RUN-DIR: there is no run in")
