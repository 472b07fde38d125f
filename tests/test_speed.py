import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from drconv_jax import DRConv
from drconv_jax.interop import import_torch
from experiments.runtime.errors import UserError
from experiments.speed import cases, contenders, mark, results


def command(*arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "experiments.speed", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {}),
    )


def test_a_run_of_tiny_cases(tmp_path, env):
    run = tmp_path / "run"
    result = command(
        "--suite", "smoke", "--rounds", "2", "--guide", "blocky", "--run-dir", run, env=env
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((run / "results.json").read_text())
    assert {r["case"]["level"] for r in report["results"]} == {"op", "layer", "network"}
    for row in report["results"]:
        assert len(row["seconds"]) == 2
        figures = (row["median"], *row["quartiles"], *row["ratio_to_best_standard"].values())
        assert all(math.isfinite(f) and f > 0 for f in figures)
        if row["case"]["level"] != "network":
            assert row["fraction_of_peak"] > 0
    names = {(r["contender"], r["direction"]) for r in report["results"]}
    for name in ("convolution", "matmul", "reference", "region_conv", "nn.Conv", "DRConv"):
        assert {(name, "forward"), (name, "forward+backward")} <= names
    assert [s["case"]["level"] for s in report["training_step_bytes"]] == ["layer"]
    assert report["machine"]["cores"] == os.cpu_count() and "--suite smoke" in report["command"]
    assert "| op 2x6x6 8-8 1x1 float32 | region_conv | 3 | forward |" in (
        run / "results.md"
    ).read_text(encoding="utf-8")
    for name in ("ratio_op", "ratio_layer", "ratio_network", "time_by_regions"):
        with Image.open(run / f"{name}.png") as picture:
            assert picture.size[0] > 300

    again = command("--suite", "smoke", "--run-dir", run)
    assert again.returncode == 2 and "holds a run already" in again.stderr


def test_a_run_that_ends_early_leaves_the_cases_it_measured(tmp_path):
    run = tmp_path / "run"
    labels = [case.label for case in cases.suite("smoke")]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "experiments.speed", "--suite", "smoke", "--run-dir", run],
        stdout=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ) as process:
        for line in process.stdout:
            if line.strip() == labels[1]:
                break
        process.kill()
    report = json.loads((run / "results.json").read_text())
    assert {r["case"]["level"] for r in report["results"]} == {"op"}
    note = f"Only 1 of {len(labels)} cases: the run ended before the others."
    assert report["notes"][-1] == note
    assert note in (run / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--select", "nothing"], 'no case of the suite "mark" contains "nothing"'),
        (["--implementation", "magic"], "one of reference, select, blocked, cpu"),
        (["--suite", "huge"], "--suite"),
    ],
)
def test_bad_options(arguments, message, tmp_path):
    result = command(*arguments, "--run-dir", tmp_path / "run")
    assert result.returncode == 2 and message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_pytorch_drconv_is_our_layer(kernel):
    torch = pytest.importorskip("torch")
    from experiments.speed.torch_drconv import DRConv2d

    torch.manual_seed(0)
    theirs = DRConv2d(5, 6, kernel, 3)
    state = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    ours = DRConv(6, (kernel, kernel), regions=3, filter_generator="pooled", use_bias=False)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 4, 5), np.float32)
    dy = rng.standard_normal((2, 7, 4, 6), np.float32)

    image = torch.tensor(np.moveaxis(x, -1, 1).copy(), requires_grad=True)
    y = theirs(image)
    y.backward(torch.tensor(np.moveaxis(dy, -1, 1).copy()))
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    our_y, pull = jax.vjp(ours.apply, import_torch(ours, state), x)
    our_gradients, our_dx = pull(jnp.asarray(dy))
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(our_y, np.moveaxis(y.detach().numpy(), 1, -1), **close)
    np.testing.assert_allclose(our_dx, np.moveaxis(image.grad.numpy(), 1, -1), **close)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **close),
        our_gradients,
        import_torch(ours, gradients),
    )


def test_every_row_of_the_mark_is_measured_by_its_suite():
    """With made-up times: one second for what is standard, two for all else, ten for PyTorch."""
    made_up = []
    for case in cases.suite("mark"):
        names = {"op": ["matmul"], "layer": ["nn.Conv", contenders.TORCH_DRCONV]}
        seconds = {contenders.TORCH_DRCONV: 10.0, contenders.OURS.get(case.level): 2.0}
        for direction in ("forward", "forward+backward"):
            for name in [*names.get(case.level, []), contenders.OURS.get(case.level, "")]:
                standard = name in ("matmul", "nn.Conv")
                for m in [None] if standard else case.regions:
                    times = (seconds.get(name, 1.0),) * 3
                    made_up.append(results.Result(case, name, m, direction, standard, times, 0))
    step = [results.StepBytes(c, 100, 80, 10) for c in cases.suite("mark") if c.level == "layer"]
    rows = mark.rows(results.Measured(made_up, {}, step, [], []))
    measured = [row for row in rows if "TPU" not in row.what]
    assert len(rows) == len(measured) + 3
    assert [row.measured.value for row in measured if row.at_least] == [5.0] * 12
    assert all(row.met for row in measured if row.at_least or row.limit >= 2)
    assert not any(row.met for row in measured if row.limit == 1.5 and "m=32" not in row.what)
    assert all(row.met is None for row in rows if "TPU" in row.what)


def test_selecting_cases():
    assert {case.level for case in cases.suite("full", "op ")} == {"op"}
    with pytest.raises(UserError, match="--select"):
        cases.suite("gpu", "float64")
