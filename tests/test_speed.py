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
from experiments.speed import cases, compiled, contenders, detection, mark, measure, results
from experiments.speed.measure import DIRECTIONS


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


def test_cases_that_an_implementation_declines_are_named_and_left_out(tmp_path):
    """ "experts_first" takes mixtures, and the cases of the operation alone give filters."""
    chosen = ("--suite", "smoke", "--rounds", "1", "--implementation", "experts_first")
    result = command(*chosen, "--select", "6x6", "--run-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {r["case"]["level"] for r in report["results"]} == {"layer"}
    assert sum("is left out" in note and "experts_first" in note for note in report["notes"]) == 2
    result = command(*chosen, "--select", "op", "--run-dir", tmp_path / "none")
    assert result.returncode == 2 and "nothing was measured" in result.stderr


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--select", "nothing"], 'no case of the suite "mark" contains "nothing"'),
        (["--implementation", "magic"], "one of reference, select, blocked, experts_first, cpu"),
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


def made_up(case):
    """Results of a case: one second for what is standard, two for ours, ten for PyTorch DRConv."""
    if case in cases.DETECTION:
        for direction in detection.directions(case):
            for name, seconds in ((detection.OURS[case.level], 2.0), ("torchvision", 4.0)):
                standard = name == "torchvision"
                yield results.Result(case, name, None, direction, standard, (seconds,) * 3, 0)
        return
    standard = {"op": "matmul", "layer": "nn.Conv", "network": "plain"}[case.level]
    times = {standard: 1.0, contenders.TORCH_NETWORK: 1.0, contenders.TORCH_DRCONV: 10.0}
    times[contenders.OURS[case.level]] = 2.0
    for direction in DIRECTIONS:
        for name, seconds in times.items():
            of_regions = name in (contenders.TORCH_DRCONV, contenders.OURS[case.level])
            for m in case.regions if of_regions else [None]:
                of_case = case, name, m, direction, name == standard
                yield results.Result(*of_case, (seconds,) * 3, 0)


def test_every_row_of_the_mark_is_measured_by_a_suite():
    suites = (cases.suite(name) for name in ("mark", "gpu", "detection"))
    chosen = list(dict.fromkeys(case for suite in suites for case in suite))
    timed = [r for case in chosen if case.level != "compiled" for r in made_up(case)]
    step = [results.StepBytes(c, 100, 80, 10) for c in cases.suite("mark") if c.level == "layer"]
    programs = [
        compiled.Compiled(case, target, direction, 3.0, 2.0, 7, 5, (), ())
        for case in chosen
        if case.level == "compiled"
        for target in compiled.TARGETS
        for direction in DIRECTIONS
    ]
    rows = mark.rows(results.Measured(timed, {}, step, programs, []))
    assert all(row.measured is not None for row in rows)
    values = {row.what: row.measured.value for row in rows}
    assert [row.measured.value for row in rows if row.at_least] == [5.0] * 12
    assert values["TPU v5e, bytes of DRConv / nn.Conv, forward, 128x28x28 58-58 1x1"] == 1.5
    gradient = "temporary memory of a gradient / (x + dy), 512x28x28 64-64 3x3"
    assert values[f"H100, {gradient}"] == 1.4
    plain = "shufflenet_v2_x0_5 plain / PyTorch's, forward, 16x224x224 3-1000"
    assert values[plain] == 1.0
    assert values[plain.replace("plain / PyTorch's", "DR / plain")] == 2.0
    assert values["nms / torchvision's, forward, 2000 boxes"] == 0.5
    on_gpu = "on a GPU, bfloat16, DRConv / nn.Conv, forward, 512x7x7 232-232 1x1"
    assert values[on_gpu] == 2.0
    for row in rows:
        value = row.measured.value
        assert row.met == (value >= row.limit if row.at_least else value <= row.limit)


def test_what_was_not_measured_is_open():
    rows = mark.rows(results.Measured([], {}, [], [], []))
    assert rows and all(row.met is None for row in rows)


def test_calls_in_one_program_wait_for_each_other():
    """Each call sees what the last one left: no call can be left out or moved."""
    seen = []

    def function(x, y):
        jax.debug.callback(lambda value: seen.append(float(value)), x.sum())
        return x * y, jnp.cos(y)

    x, y = jnp.ones((2, 3)), jnp.arange(3.0)[None]
    result = jax.jit(measure.repeated(function, 4))(x, y)
    jax.effects_barrier()
    np.testing.assert_array_equal(result, x)
    assert seen == [6.0] * 4
    spoiled = jax.jit(measure.repeated(lambda x: x * jnp.nan, 2))(x)
    assert jnp.isnan(spoiled[0, 0]) and not jnp.isnan(spoiled[0, 1])
    both = lambda y, x: (x @ x.T, y * x)  # noqa: E731  what does not depend on what is carried
    text = jax.jit(measure.repeated(both, 4)).lower(x, x).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "while" in entry and "dot" in text and "dot" not in entry


def test_a_contender_of_many_calls_is_timed_by_the_call(monkeypatch):
    monkeypatch.setattr(measure, "_turn", lambda run: 3.0)
    many = measure.Contender("many", None, "forward", lambda: None, calls=4)
    assert measure.time_rounds([many], 2, lambda: None) == [(0.75, 0.75)]


def test_time_that_is_up_leaves_cases_out(tmp_path, env):
    run = tmp_path / "run"
    arguments = ["--suite", "smoke", "--rounds", "1", "--minutes", "0.0001", "--run-dir", run]
    result = command(*arguments, env=env)
    assert result.returncode == 0, result.stderr
    report = json.loads((run / "results.json").read_text())
    assert {r["case"]["level"] for r in report["results"]} == {"op"}
    assert report["notes"][-1].startswith("Only 1 of 4 cases")


def test_selecting_cases():
    assert {case.level for case in cases.suite("full", "op ")} == {"op"}
    with pytest.raises(UserError, match="--select"):
        cases.suite("gpu", "float64")
