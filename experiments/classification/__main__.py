"""Trains a network, with DRConv or plain, to classify images.

Without arguments: a small DR-ShuffleNetV2 on scikit-learn's handwritten digits, in a few minutes on
a CPU. The run's folder gets config.json, metrics.jsonl, tensorboard/, checkpoints/, report.json and
guide_masks.png. Exit status: 0 when the run is done, 2 for a mistake that is the user's to mend, 75
when SIGTERM stopped the run and it can be resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import UInt8
from rich.console import Console

from drconv_jax import viz
from experiments.classification.model import ModelConfig
from experiments.runtime import configs, data, dry_run, images, sources
from experiments.runtime import mesh as meshes
from experiments.runtime.checkpoints import CheckpointConfig
from experiments.runtime.data import Hold
from experiments.runtime.errors import UserError, exit_on_user_error
from experiments.runtime.files import replacing, write_text
from experiments.runtime.loop import steps_per_epoch, train
from experiments.runtime.pipeline import Loading
from experiments.runtime.recipes import RECIPES, Recipe
from experiments.runtime.training import normalize


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is; saved with it."""

    data: str = "digits"
    """"digits" (embedded); folder:PATH, a tree train/CLASS/x.jpg and test|val/CLASS/x.jpg or a zip
    of one; arrayrecord:PATH, what experiments.convert makes of that; hf:NAME_OR_PATH, a data set of
    Hugging Face's datasets; idx:PATH, a folder of MNIST's or Fashion-MNIST's four files."""
    image_size: int = 32
    """Images are resized to this many pixels a side."""
    hold: Hold = "auto"
    """Where images are kept: in memory, resized, or on disk, and read in every epoch; default: in
    memory, if that takes 4 GiB at most and --train.augment is not resized-crop."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: Recipe = dataclasses.field(default_factory=Recipe)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)


PRESETS = {
    "small": Config(train=RECIPES["small"]),
    "imagenet": Config(
        image_size=224, model=ModelConfig("dr_shufflenet_v2_x0_5"), train=RECIPES["imagenet"]
    ),
    "mobilenet": Config(
        image_size=224, model=ModelConfig("dr_mobilenet_v2_x1_0"), train=RECIPES["mobilenet"]
    ),
}


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The preset that all other options start from."""

    recipe: Literal["small", "imagenet", "mobilenet"] = "small"
    """What all other options start from: "imagenet" trains as the ShuffleNetV2 paper does,
    "mobilenet" as torchvision trains MobileNetV2."""


@dataclasses.dataclass(frozen=True)
class Pods:
    """A training step on TPUs that there need not be."""

    dry_run: bool = False
    """Only compile the training step for --topology, and tell what it takes of each chip."""
    topology: tuple[str, ...] = ("v5e:16x16",)
    """TPU slices, as v5e:16x16 or v5p:8x8x16."""
    chip_batch: int | None = None
    """Images on each chip in the dry run; default: the recipe's batch over the chips."""
    classes: int = 1000
    """Classes in the dry run, which reads no data."""

    def __post_init__(self) -> None:
        for name in ("chip_batch", "classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class Arguments(_Chosen):
    """Trains a network, with DRConv or plain, to classify images."""

    show: bool = False
    """Only print all options, and where they differ from the recipe's."""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    run_dir: pathlib.Path | None = None
    """Folder for this run, which must not hold one yet; default: runs/ and the time."""
    auto_resume: bool = False
    """If --run-dir holds a run of these very options, continue it."""
    resume: pathlib.Path | None = None
    """Continue the run in this folder, with the options it was started with."""
    placement: Annotated[meshes.Placement, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=meshes.Placement
    )
    loading: Annotated[Loading, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Loading)
    pods: Annotated[Pods, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Pods)


def main() -> None:
    """The command."""
    with meshes.leaving_at_once(), exit_on_user_error():
        arguments = _parse()
        if arguments.show:
            preset = arguments.recipe
            print(configs.shown(arguments.config, PRESETS[preset], preset))
            return
        if arguments.pods.dry_run:
            _dry_run(arguments)
            return
        meshes.join_processes(arguments.placement)
        if arguments.resume is None:
            config, run_dir = arguments.config, _folder(arguments)
        else:
            config, run_dir = _resumed_config(arguments), arguments.resume
        run(config, run_dir, meshes.make_mesh(arguments.placement.fsdp), arguments.loading)


def run(config: Config, run_dir: pathlib.Path, mesh: Mesh, loading: Loading = Loading()) -> None:
    """Trains by `config` in `run_dir`, continuing what is there, and writes the report."""
    dataset = data.load(
        config.data,
        config.image_size,
        hold=config.hold,
        whole_images=config.train.augment == "resized-crop",
    )
    for line in dataset.left_out:
        print(f"left out: {line}", file=sys.stderr)
    for line in dataset.skipped[:5]:
        print(f"skipped {line}", file=sys.stderr)
    if len(dataset.skipped) > 5:
        print(f"skipped {len(dataset.skipped)} images in all; see report.json", file=sys.stderr)
    model = config.model.build(len(dataset.classes))
    try:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *[config.image_size] * 2, 3)))
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"--model: {error}") from None
    steps_per_epoch(dataset, config.train)
    meshes.check_batch(config.train.batch_size, mesh, config.train.accumulate)
    meshes.meet("all processes have looked at the run's folder")
    leads = meshes.leads()
    if leads:
        config_text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_text(run_dir / "config.json", config_text)
            write_text(run_dir / "classes.json", json.dumps(list(dataset.classes)) + "\n")
        except OSError as error:
            raise UserError(
                f'--run-dir: "{run_dir}" cannot be written to: {error.strerror or error}.'
            ) from None
        print(
            f"{len(dataset.train):,} training and {len(dataset.test):,} test images in "
            f"{len(dataset.classes)} classes; run folder {run_dir}"
        )
    meshes.meet("the run's folder is there")
    start = time.time()
    state, metrics, skipped = train(
        model,
        dataset,
        config.train,
        run_dir,
        mesh=mesh,
        image_size=config.image_size,
        checkpoint=config.checkpoint,
        loading=loading,
    )
    skipped = [*dataset.skipped, *skipped]
    variables = meshes.on_host(state.variables, mesh)
    if not leads:
        return
    report = {
        **metrics,
        "seconds": time.time() - start,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "skipped_images": len(skipped),
        "skipped": skipped,
        "left_out": dataset.left_out,
    }
    if config.model.has_guide:
        _draw_guide_masks(model, variables, dataset, config, run_dir)
    write_text(run_dir / "report.json", json.dumps(report, indent=2) + "\n")
    print(
        f"test accuracy {metrics['test_accuracy']:.4f} after {metrics['epoch']} epochs, "
        f"{report['parameters']:,} parameters, {len(skipped)} images skipped; "
        f"see {run_dir}"
    )


def _dry_run(arguments: Arguments) -> None:
    """Prints what a training step takes, and writes it to dry_run.json in --run-dir."""
    jax.config.update("jax_platforms", "cpu")  # a TPU that is there is left alone
    config, pods = arguments.config, arguments.pods
    reports = []
    for topology in pods.topology:
        reports.append(
            dry_run.compile_step(
                config.model.build(pods.classes),
                config.train,
                topology,
                image_size=config.image_size,
                chip_batch=pods.chip_batch,
                fsdp=arguments.placement.fsdp,
            )
        )
        print(f"compiled for {topology} in {reports[-1].seconds:.0f} s", file=sys.stderr)
    console = Console(width=max(100, Console().width), highlight=False)
    console.print(dry_run.table(reports))
    print(f"Collectives of {dry_run.LARGE:,} bytes and more on {reports[-1].topology}:")
    print(dry_run.large_collectives(reports[-1]))
    if arguments.run_dir is not None:
        arguments.run_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps([dataclasses.asdict(report) for report in reports], indent=2)
        write_text(arguments.run_dir / "dry_run.json", text + "\n")


def _parse() -> Arguments:
    """The arguments, whose defaults are those of the recipe among them."""
    program = "python -m experiments.classification"
    chosen, _ = tyro.cli(_Chosen, prog=program, return_unknown_args=True, add_help=False)
    default = Arguments(recipe=chosen.recipe, config=PRESETS[chosen.recipe])
    return tyro.cli(Arguments, prog=program, description=__doc__, default=default)


def _folder(arguments: Arguments) -> pathlib.Path:
    """The folder of a run that begins, or of one that --auto-resume continues."""
    config, run_dir = arguments.config, arguments.run_dir
    if run_dir is None:
        if arguments.auto_resume or jax.process_count() > 1:
            raise UserError("--run-dir must be given with --auto-resume and several processes.")
        name = f"{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        return pathlib.Path("runs") / "classification" / name
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f'--run-dir: "{run_dir}" is not a folder; name another.')
    if (run_dir / "config.json").exists():
        if not arguments.auto_resume:
            raise UserError(
                f'--run-dir: "{run_dir}" holds a run already; continue it with --resume {run_dir}, '
                "or name another folder."
            )
        if changed := configs.differences(config, read_config("--auto-resume", run_dir)):
            options = ", ".join(f"{k} is {old}, not {new}" for k, (new, old) in changed.items())
            raise UserError(
                f'--auto-resume: the run in "{run_dir}" has other options: {options}; give these, '
                "or name another folder."
            )
        return run_dir
    for name in ("checkpoints", "metrics.jsonl"):
        if (run_dir / name).exists():
            raise UserError(
                f'--run-dir: "{run_dir}" holds the {name} of a run without its config.json; name '
                "another folder."
            )
    return run_dir


def _resumed_config(arguments: Arguments) -> Config:
    where = {name: getattr(arguments, name) for name in ("resume", "placement", "loading")}
    if arguments != Arguments(**where):
        raise UserError(
            "--resume takes the run's own options; give no other option with it but where to run."
        )
    return read_config("--resume", pathlib.Path(str(arguments.resume)))


def read_config(option: str, run_dir: pathlib.Path) -> Config:
    """The options of the run in a folder.

    Args:
      option: that named the folder, for errors.
      run_dir: the folder.

    Raises:
      UserError: there is no run, or not of this version.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(f'{option}: there is no run in "{run_dir}" (no config.json).')
    try:
        return configs.from_json(Config, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'{option}: "{path}" is not the config of a run of this version: {error}.'
        ) from None


def _draw_guide_masks(
    model: nn.Module,
    variables: dict[str, Any],
    dataset: sources.Dataset,
    config: Config,
    run_dir: pathlib.Path,
) -> None:
    pixels, labels = _examples(dataset.test, config, count=6)
    apply = jax.jit(functools.partial(model.apply, train=False, mutable="intermediates"))
    _, intermediates = apply(variables, normalize(jnp.asarray(pixels)))
    with replacing(run_dir / "guide_masks.png") as temporary:
        viz.save_guide_masks(
            temporary,
            pixels / 255,
            jax.device_get(viz.region_indices(intermediates["intermediates"])),
            config.model.regions,
            [dataset.classes[label] for label in labels],
        )


def _examples(
    split: sources.Split, config: Config, count: int
) -> tuple[UInt8[np.ndarray, "count size size 3"], Sequence[int]]:
    """Some images of several classes, and their labels."""
    if isinstance(split, sources.ArraySplit):
        chosen = np.unique(split.labels, return_index=True)[1][:count]
        return split.images[chosen], split.labels[chosen].tolist()
    decode = images.centre_crop if config.train.augment == "resized-crop" else images.squashed
    found: list[tuple[np.ndarray, int]] = []
    for index in np.random.default_rng(0).permutation(len(split)).tolist():
        if len(found) == count:
            break
        with contextlib.suppress(Exception):  # a broken image, which the run has named
            sample = split[index]
            found.append((decode(sample.content, config.image_size), sample.label))
    return np.stack([pixels for pixels, _ in found]), [label for _, label in found]


if __name__ == "__main__":
    main()
