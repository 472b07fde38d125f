import dataclasses
import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from drconv_jax import DRConv, cost
from experiments.ablation import __main__ as ablation
from experiments.ablation import report, study
from experiments.ablation.results import Results, Run
from experiments.classification import guides
from experiments.classification.__main__ import Arguments
from experiments.classification.config import PRESETS
from experiments.runtime import configs, jobs
from experiments.runtime.errors import UserError

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", study.CASES)
def test_a_cases_command_is_its_config(name):
    config = study.config_of(name, 3, "folder:x", 7)
    options = configs.arguments(config, PRESETS["small"])
    assert tyro.cli(Arguments, args=options, default=Arguments()).config == config


@pytest.mark.parametrize("name", ["dr", "grid", "random", "straight-through", "local", "m1"])
def test_cases_build(name):
    model = study.CASES[name].model.build(10)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, KEY, x)
    assert logits.shape == (2, 10)


def test_the_wide_twin_has_drconvs_multiply_adds():
    dr, wide = (
        cost.multiply_adds(study.CASES[name].model.build(10), (1, 32, 32, 3)).total
        for name in ("dr", "wide")
    )
    assert dr <= wide <= 1.02 * dr


def test_the_claim_comes_first():
    order = study.order(("m2", "dr", "plain"), 2)
    assert order == [("dr", 0), ("plain", 0), ("dr", 1), ("plain", 1), ("m2", 0), ("m2", 1)]


@pytest.mark.parametrize("kind", ["grid", "random"])
def test_fixed_regions_are_those_of_every_sample(kind):
    layer = guides.Guided(5, (3, 3), 2, padding=1, kind=kind, regions=4)
    x = jax.random.normal(KEY, (2, 9, 8, 3))
    y, variables = layer.init_with_output(KEY, x)
    assert y.shape == (2, 5, 4, 5) and set(variables["params"]["conv"]) == {"filters", "bias"}
    _, sown = layer.apply(variables, x, mutable="intermediates")
    index = sown["intermediates"]["conv"]["region_index"][0]
    np.testing.assert_array_equal(index[0], index[1])
    assert len(np.unique(index)) == 4


def test_a_straight_through_layer_takes_its_blocks_guide():
    layer = guides.Guided(5, (1, 1), kind="straight-through", regions=3)
    x, guide = jax.random.normal(KEY, (2, 4, 4, 6)), jax.random.normal(KEY, (2, 8, 8, 3))
    variables = layer.init(KEY, x, guide)
    assert set(variables["params"]) == {"conv"}
    _, sown = layer.apply(variables, x, guide, mutable="intermediates")
    nearest = guide.argmax(-1)[:, ::2, ::2]  # PyTorch's rule
    np.testing.assert_array_equal(sown["intermediates"]["conv"]["region_index"][0], nearest)


def test_the_straight_through_gradient():
    """Every region's score but for their mean, which moves all guide features alike."""
    m, features = 3, 5
    guide = jax.random.normal(KEY, (2, 4, 4, m))
    layer = DRConv(features, (1, 1), regions=m, implementation="blocked")
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 6))
    variables = layer.init(KEY, x, guide)
    # Regions' filters are alike at first.
    variables["params"]["filters"]["mixing_bias"] += jax.random.normal(
        KEY, variables["params"]["filters"]["mixing_bias"].shape
    )
    dy = jax.random.normal(jax.random.key(2), (2, 4, 4, features))
    y, vjp = jax.vjp(lambda g: layer.apply(variables, x, guides.straight_through(g)), guide)
    np.testing.assert_allclose(y, layer.apply(variables, x, guide), rtol=1e-6)
    everywhere = [  # the output where all positions are in one region
        layer.apply(variables, x, jnp.zeros_like(guide).at[..., j].set(1.0)) for j in range(m)
    ]
    scores = jnp.stack([(dy * y).sum(-1) for y in everywhere], axis=-1)
    expected = scores - scores.mean(-1, keepdims=True)
    np.testing.assert_allclose(vjp(dy)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """Runs that leave a report at once; gives the list of those that were done."""
    done, images = [], [40]

    def start(job, cores):
        case, seed = job.name.split("/")
        job.folder.mkdir(parents=True)
        accuracy = 0.5 + 0.1 * int(seed)
        (job.folder / "report.json").write_text(json.dumps({"test_accuracy": accuracy}))
        (job.folder / "data.json").write_text(json.dumps({"training images": images[0]}))
        done.append((case, int(seed)))
        status = 1 if case == "m16" else 0
        process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])
        return jobs._Process(job, process, cores)

    monkeypatch.setattr(jobs, "_start", start)
    arguments = functools.partial(
        ablation.Arguments, "folder:x", runs=tmp_path / "runs", out=tmp_path / "out"
    )
    return done, arguments, images


def test_finished_runs_are_skipped(faked, tmp_path):
    done, arguments, images = faked
    ablation._run_all(arguments(cases=("plain", "dr"), seeds=2), Results(tmp_path / "out"))
    assert sorted(done) == [("dr", 0), ("dr", 1), ("plain", 0), ("plain", 1)]
    results = Results(tmp_path / "out")
    assert "| nn.Conv | 55.00 ± 7.07 |  | 2 |" in report.text(results.runs)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "accuracy.png",
        "results.json",
        "results.md",
    }
    done.clear()
    ablation._run_all(arguments(cases=("plain", "m2"), seeds=2), results)
    assert sorted(done) == [("m2", 0), ("m2", 1)]
    images[0] = 41
    with pytest.raises(UserError, match="was trained on other data than plain with seed 0"):
        ablation._run_all(arguments(cases=("plain", "m4"), seeds=2), results)
    with pytest.raises(UserError, match="has plain with seed 0 done by other options"):
        ablation._run_all(arguments(cases=("plain",), epochs=9), Results(tmp_path / "out"))


def test_the_data_may_lie_elsewhere(faked, tmp_path):
    done, *_ = faked
    for data in ("folder:x", "folder:../y z/cifar10.zip"):
        arguments = ablation.Arguments(
            data, cases=("plain",), seeds=1, runs=tmp_path / "runs", out=tmp_path / "out"
        )
        ablation._run_all(arguments, Results(tmp_path / "out"))
    assert done == [("plain", 0)]
    for data in ("arrayrecord:x", "hf:x", "digits"):
        with pytest.raises(UserError, match="done by other options"):
            other = dataclasses.replace(arguments, data=data)
            ablation._run_all(other, Results(tmp_path / "out"))


def test_readmes_command_finds_the_published_results():
    """A fresh clone has its results, whatever the path of the data."""
    root = pathlib.Path(__file__).parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8")
    options = re.search(r"-m experiments\.ablation (--data [^`]*)`", readme)[1].split()
    arguments = tyro.cli(ablation.Arguments, args=options)
    results = Results(root / "docs" / "ablation")
    wanted = study.order(arguments.cases, arguments.seeds)
    assert len(wanted) >= 18
    for name, seed in wanted:
        assert results.has(Run(name, seed, ablation._command(name, seed, arguments)))


def test_a_run_that_fails_stops_the_study(faked, tmp_path):
    _, arguments, _ = faked
    with pytest.raises(UserError, match="m16-seed0 ended with status 1; see"):
        ablation._run_all(arguments(cases=("m16",), seeds=1, jobs=1), Results(tmp_path / "out"))


def test_results_of_something_else(tmp_path):
    (tmp_path / "results.json").write_text('[{"case": 1}]')
    with pytest.raises(UserError, match="holds no results of this command"):
        Results(tmp_path)
    with pytest.raises(UserError, match='--cases must be among plain, .* got "m3"'):
        ablation.Arguments("folder:x", cases=("m3",))
