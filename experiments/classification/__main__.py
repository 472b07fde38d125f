"""Trains a network, with DRConv or plain, to classify images.

Without arguments: a small DR-ShuffleNetV2 on scikit-learn's handwritten digits, in a few minutes on
a CPU. The run's folder gets config.json, metrics.jsonl, checkpoints/, report.json and
guide_masks.png.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn

from drconv_jax import viz
from experiments.classification.model import ModelConfig
from experiments.runtime import data
from experiments.runtime.errors import UserError, exit_on_user_error
from experiments.runtime.files import replacing, write_text
from experiments.runtime.loop import TrainConfig, TrainState, normalize, steps_per_epoch, train


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a network, with DRConv or plain, to classify images."""

    data: str = "digits"
    """"digits" (embedded), or folder:PATH, a tree train/CLASS/x.jpg and test|val/CLASS/x.jpg or a
    zip of one."""
    image_size: int = 32
    """Images are resized to this many pixels a side."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a network, with DRConv or plain, to classify images."""

    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    run_dir: pathlib.Path | None = None
    """Folder for this run, which must not hold one yet; default: runs/ and the time."""
    resume: pathlib.Path | None = None
    """Continue the run in this folder, with the options it was started with."""


def main() -> None:
    """The command."""
    with exit_on_user_error():
        arguments = tyro.cli(
            Arguments, prog="python -m experiments.classification", description=__doc__
        )
        if arguments.resume is None:
            run(arguments.config, _new_folder(arguments))
        else:
            run(_resumed_config(arguments), arguments.resume)


def run(config: Config, run_dir: pathlib.Path) -> None:
    """Trains by `config` in `run_dir`, continuing what is there, and writes the report."""
    dataset = data.load(config.data, config.image_size)
    for line in dataset.skipped[:5]:
        print(f"skipped {line}", file=sys.stderr)
    if len(dataset.skipped) > 5:
        print(f"skipped {len(dataset.skipped)} images in all; see report.json", file=sys.stderr)
    model = config.model.build(len(dataset.classes))
    try:
        jax.eval_shape(model.init, jax.random.key(0), dataset.test.images[:1].astype(np.float32))
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"--model: {error}") from None
    steps_per_epoch(dataset, config.train)
    config_text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "config.json", config_text)
    except OSError as error:
        raise UserError(
            f'--run-dir: "{run_dir}" cannot be written to: {error.strerror or error}.'
        ) from None
    print(
        f"{len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images in "
        f"{len(dataset.classes)} classes; run folder {run_dir}"
    )
    start = time.time()
    state, metrics = train(model, dataset, config.train, run_dir)
    report = {
        **metrics,
        "seconds": time.time() - start,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "skipped_images": len(dataset.skipped),
        "skipped": list(dataset.skipped),
    }
    if config.model.has_guide:
        _draw_guide_masks(model, state, dataset, config.model.regions, run_dir)
    write_text(run_dir / "report.json", json.dumps(report, indent=2) + "\n")
    print(
        f"test accuracy {metrics['test_accuracy']:.4f} after {metrics['epoch']} epochs, "
        f"{report['parameters']:,} parameters, {len(dataset.skipped)} images skipped; "
        f"see {run_dir}"
    )


def _new_folder(arguments: Arguments) -> pathlib.Path:
    config = arguments.config
    name = f"{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = arguments.run_dir or pathlib.Path("runs") / "classification" / name
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f'--run-dir: "{run_dir}" is not a folder; name another.')
    if (run_dir / "config.json").exists():
        raise UserError(
            f'--run-dir: "{run_dir}" holds a run already; continue it with --resume {run_dir}, or '
            "name another folder."
        )
    for name in ("checkpoints", "metrics.jsonl"):
        if (run_dir / name).exists():
            raise UserError(
                f'--run-dir: "{run_dir}" holds the {name} of a run without its config.json; name '
                "another folder."
            )
    return run_dir


def _resumed_config(arguments: Arguments) -> Config:
    if arguments != Arguments(resume=arguments.resume):
        raise UserError("--resume takes the run's own options; give no other option with it.")
    path = pathlib.Path(str(arguments.resume)) / "config.json"
    if not path.exists():
        raise UserError(f'--resume: there is no run in "{arguments.resume}" (no config.json).')
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model = dict(values.pop("model"))
        model = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}
        return Config(
            model=ModelConfig(**model), train=TrainConfig(**values.pop("train")), **values
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'--resume: "{path}" is not the config of a run of this version: {error}.'
        ) from None


def _draw_guide_masks(
    model: nn.Module, state: TrainState, dataset: data.Dataset, regions: int, run_dir: pathlib.Path
) -> None:
    chosen = np.unique(dataset.test.labels, return_index=True)[1][:6]
    images, labels = dataset.test.images[chosen], dataset.test.labels[chosen]
    _, intermediates = model.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        normalize(jnp.asarray(images)),
        train=False,
        mutable="intermediates",
    )
    with replacing(run_dir / "guide_masks.png") as temporary:
        viz.save_guide_masks(
            temporary,
            images / 255,
            viz.region_indices(intermediates["intermediates"]),
            regions,
            [dataset.classes[label] for label in labels],
        )


if __name__ == "__main__":
    main()
