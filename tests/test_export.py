import json
import re
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
from experiments.export import __main__ as experiment

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


def test_several_inputs(tmp_path):
    path = tmp_path / "model.stablehlo"
    inputs = [jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)]
    export_model(path, lambda w, x, n: {"y": w * x, "n": n + 1}, jnp.float32(2), inputs)
    found = load_exported(path)(jnp.ones((5, 3)), jnp.arange(5))
    np.testing.assert_array_equal(found["y"], np.full((5, 3), 2))
    assert found["n"].tolist() == [1, 2, 3, 4, 5]


def test_platforms(tmp_path):
    path = tmp_path / "model.stablehlo"
    export_model(path, lambda w, x: x + w, jnp.ones(()), (3,), platforms=["gpu", "cpu", "cuda"])
    assert export.deserialize(bytearray(path.read_bytes())).platforms == ("cuda", "cpu")
    for wrong, said in ((["cpu", "foo"], '"cpu", "foo"'), ([], "none"), (["GPU"], '"GPU"')):
        with pytest.raises(ValueError, match=f"some of cpu, tpu, cuda, rocm or gpu, got {said}"):
            export_model(path, lambda w, x: x + w, jnp.ones(()), (3,), platforms=wrong)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.export", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def in_process(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        experiment.main()


@pytest.mark.filterwarnings("ignore")  # jax2onnx's
def test_the_command_exports_a_run(tmp_path, monkeypatch, capfd):
    run, out = tmp_path / "run", tmp_path / "out"
    process = runs.start(
        *runs.SMALL, "--model.dtype", "bfloat16", "--train.epochs", 1, "--run-dir", run,
        env={"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert runs.finish(process)[0] == 0
    assert json.loads((run / "classes.json").read_text()) == list("0123456789")
    in_process(monkeypatch, run, "--out", out)
    assert "its logits differ by at most" in capfd.readouterr().out
    assert load_exported(out)(np.zeros((4, 8, 8, 3), np.uint8)).shape == (4, 10)
    pytest.importorskip("jax2onnx", reason="no jax2onnx")
    in_process(monkeypatch, run, "--format", "onnx")
    said = capfd.readouterr()
    assert re.fullmatch(r".*model.onnx: .* for ONNX; read back, its logits differ .*\n", said.out)
    assert said.err == ""
    in_process(monkeypatch, run, "--platforms", "gpu", "--no-fold")
    assert "for cuda; not read back, since this machine is none" in capfd.readouterr().out


def test_the_command_names_what_is_wrong(tmp_path, monkeypatch, capfd):
    done = command(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: RUN-DIR: there is no run in")
    with pytest.raises(SystemExit) as ended:
        in_process(monkeypatch, tmp_path, "--platforms", "foo")
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert re.fullmatch('error: --platforms: platforms must be .* or gpu, got "foo".\n', said)
