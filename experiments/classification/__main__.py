"""Trains a network, with DRConv or plain, to classify images.

Without arguments: a small DR-ShuffleNetV2 on scikit-learn's handwritten digits, in a few minutes on
a CPU. The run's folder gets config.json, metrics.jsonl, tensorboard/, checkpoints/, report.json and
guide_masks.png. Exit status: 0 when the run is done, 2 for a mistake that is the user's to mend, 75
when SIGTERM and 130 when Ctrl-C stopped the run; both save where it stands, for --resume, and end
at once where no step has been taken yet.
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
from experiments.runtime import commands, configs, data, dry_run, images, run_folder, sources
from experiments.runtime import mesh as meshes
from experiments.runtime.checkpoints import CheckpointConfig
from experiments.runtime.data import Hold
from experiments.runtime.errors import UserError
from experiments.runtime.files import replacing, write_text
from experiments.runtime.loop import steps_per_epoch, train
from experiments.runtime.pipeline import Loading
from experiments.runtime.recipes import RECIPES, Recipe, learning_rate
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


Preset = Literal["small", "imagenet", "mobilenet"]

# What may be other than before where a run goes on; the number of epochs as _check_epochs says.
_MAY_CHANGE = ("data", "train.epochs", "train.remat", "checkpoint.")


@dataclasses.dataclass(frozen=True)
class _Start:
    """Where all other options start from."""

    recipe: Preset | None = None
    resume: commands.Path | None = None


@dataclasses.dataclass(frozen=True)
class Pods:
    """A training step on TPUs that there need not be."""

    dry_run: bool = False
    """Only compile the training step for --topology, and tell what it takes of each chip."""
    topology: tuple[str, ...] = ("v5e:16x16",)
    """TPU slices, as v5e:16x16 or v5p:8x8x16."""
    chip_batch: int | None = None
    """Images on each chip in the dry run; default: the recipe's batch over the chips, or the next
    larger one that divides among them."""
    classes: int = 1000
    """Classes in the dry run, which reads no data."""

    def __post_init__(self) -> None:
        for name in ("chip_batch", "classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a network, with DRConv or plain, to classify images."""

    recipe: Preset = "small"
    """What all other options start from: "imagenet" trains as the ShuffleNetV2 paper does,
    "mobilenet" as torchvision trains MobileNetV2."""
    show: bool = False
    """Only print all options, and where they differ from the recipe's."""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    run_dir: commands.Path | None = None
    """Folder for this run, which must not hold one yet; default: runs/ and the time."""
    auto_resume: bool = False
    """If --run-dir holds a run already, continue it; options that --resume would refuse to change
    must be as they were."""
    resume: commands.Path | None = None
    """Continue the run in this folder, with its own options. These may be given anew: --data, if
    the same data is elsewhere now; --workers, --threads, --train.remat, --checkpoint.* and
    where to run; --train.epochs, if the learning rates of the steps behind it would have been the
    same: always with the exponential schedule, during warm-up with the others, which end at zero
    after the last epoch."""
    placement: Annotated[meshes.Placement, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=meshes.Placement
    )
    loading: Annotated[Loading, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Loading)
    pods: Annotated[Pods, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Pods)


def main() -> None:
    """The command."""
    with commands.running():
        arguments = _parse()
        if arguments.show:
            preset = arguments.recipe
            print(configs.shown(arguments.config, PRESETS[preset], preset))
            return
        if arguments.pods.dry_run:
            _dry_run(arguments)
            return
        meshes.join_processes(arguments.placement)
        mesh = meshes.make_mesh(arguments.placement.fsdp)
        with contextlib.ExitStack() as holding:
            with meshes.refusing_together():
                run_dir = _folder(arguments, holding)
            with meshes.refusing_together():
                before = _options_before(arguments, run_dir)
            run(arguments.config, run_dir, mesh, arguments.loading, before)


def run(
    config: Config,
    run_dir: pathlib.Path,
    mesh: Mesh,
    loading: Loading = Loading(),
    before: Config | None = None,
) -> None:
    """Trains by `config` in `run_dir`, and writes the report.

    Args:
      config: the options.
      run_dir: the run's folder, which no other run uses meanwhile.
      mesh: where to train.
      loading: how images come from a disk.
      before: the options so far of the run in the folder, which goes on; None for a new one.
    """
    leads = meshes.leads()
    with meshes.refusing_together():
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
            jax.eval_shape(
                model.init, jax.random.key(0), jnp.zeros((1, *[config.image_size] * 2, 3))
            )
        except (ValueError, ArithmeticError) as error:
            raise UserError(f"--model: {error}") from None
        steps = steps_per_epoch(dataset, config.train)
        meshes.check_batch(config.train.batch_size, mesh, config.train.accumulate)
        recorded = before is not None and run_folder.has_data_record(run_dir)
        if before is not None:
            _check_epochs(before.train, config.train, run_folder.newest_step(run_dir), steps)
            if not recorded:
                _take_the_data_for_the_same(before.data, config.data, run_dir)
        facts = {**dataset.identity(), "steps in an epoch": steps}
        if leads and not recorded:
            run_folder.record_data(run_dir, facts)
    with meshes.refusing_together():
        run_folder.check_data(run_dir, facts, new=before is None)
    if leads and before is not None:
        for name, (new, old) in configs.differences(config, before).items():
            print(f"{configs.option(name)} is {new} from now on; it was {old}")
    if leads:
        config_text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        try:
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
    write_text(run_dir / "report.json", json.dumps(report, indent=2) + "\n")
    if config.model.has_guide:
        try:
            _draw_guide_masks(model, variables, dataset, config, run_dir)
        except Exception as error:  # a picture is not worth a run's end
            reason = " ".join(str(error).split())[:200]
            print(
                f"warning: guide_masks.png is not drawn: {type(error).__name__}: {reason}",
                file=sys.stderr,
            )
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
        batch = reports[-1].images * reports[-1].chips
        if pods.chip_batch is None and batch != config.train.batch_size:
            print(
                f"the batch of {config.train.batch_size} does not divide among the "
                f"{reports[-1].chips} chips of {topology}: this is for one of {batch}, "
                f"{reports[-1].images} on each; choose with --chip-batch or --train.batch-size"
            )
    console = Console(width=max(100, Console().width), highlight=False)
    console.print(dry_run.table(reports))
    print(f"Collectives of {dry_run.LARGE:,} bytes and more on {reports[-1].topology}:")
    print(dry_run.large_collectives(reports[-1]))
    if arguments.run_dir is not None:
        arguments.run_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps([dataclasses.asdict(report) for report in reports], indent=2)
        write_text(arguments.run_dir / "dry_run.json", text + "\n")


def _parse() -> Arguments:
    """The arguments, whose defaults are those of a recipe, or of the run that --resume names."""
    program = "python -m experiments.classification"
    start, _ = tyro.cli(_Start, prog=program, return_unknown_args=True, add_help=False)
    preset = start.recipe or "small"
    config = PRESETS[preset] if start.resume is None else read_config("--resume", start.resume)
    arguments = tyro.cli(
        Arguments,
        prog=program,
        description=__doc__,
        default=Arguments(recipe=preset, config=config),
    )
    if start.resume is not None:
        for option, given in (
            ("--recipe", start.recipe),
            ("--run-dir", arguments.run_dir),
            ("--auto-resume", arguments.auto_resume),
        ):
            if given:
                raise UserError(
                    f"--resume {start.resume} names the run's folder, which has the run's options; "
                    f"leave out {option}."
                )
    config = dataclasses.replace(arguments.config, data=data.absolute(arguments.config.data))
    return dataclasses.replace(arguments, config=config)


def _folder(arguments: Arguments, holding: contextlib.ExitStack) -> pathlib.Path:
    """The run's folder, which the first process holds as long as the stack is open."""
    chosen, option = arguments.run_dir, "--run-dir"
    if arguments.resume is not None:
        chosen, option = arguments.resume, "--resume"
    if chosen is None:
        for needs_it, why in (
            (arguments.auto_resume, "--auto-resume, to say which run to continue"),
            (jax.process_count() > 1, "several processes, to be the same for all of them"),
        ):
            if needs_it:
                raise UserError(f"--run-dir must be given with {why}.")
        name = f"{arguments.config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        new = pathlib.Path("runs") / "classification" / name
        _check_pattern(new, option)
        return holding.enter_context(run_folder.held(new, option, new=True))
    if chosen.exists() and not chosen.is_dir():
        raise UserError(f'{option}: "{chosen}" is not a folder; name another.')
    _check_pattern(chosen, option)
    if meshes.leads():
        holding.enter_context(run_folder.held(chosen, option))
    return chosen


def _check_pattern(folder: pathlib.Path, option: str) -> None:
    """Refuses a folder whose path orbax, looking for a checkpoint's parts, takes for a pattern."""
    if found := set("*?[") & set(str(folder.absolute())):
        raise UserError(
            f'{option}: "{folder.absolute()}" has {" and ".join(sorted(found))} in it, and '
            "checkpoints written there cannot be read again; name another folder."
        )


def _options_before(arguments: Arguments, run_dir: pathlib.Path) -> Config | None:
    """The options of the run that the folder holds, None if it holds none.

    Raises:
      UserError: the run is not to go on, or not with these options.
    """
    config, option = arguments.config, "--resume" if arguments.resume else "--auto-resume"
    if not (run_dir / "config.json").exists() and arguments.resume is None:
        for name in ("checkpoints", "metrics.jsonl"):
            if (run_dir / name).exists():
                raise UserError(
                    f'--run-dir: "{run_dir}" holds the {name} of a run without its config.json; '
                    "name another folder."
                )
        return None
    if arguments.resume is None and not arguments.auto_resume:
        raise UserError(
            f'--run-dir: "{run_dir}" holds a run already; continue it with --resume {run_dir}, '
            "or name another folder."
        )
    before = read_config(option, run_dir)
    changed = configs.differences(config, before)
    fixed = [name for name in changed if not name.startswith(_MAY_CHANGE)]
    if fixed:
        options = ", ".join(
            f"{configs.option(name)} is {changed[name][1]}, not {changed[name][0]}"
            for name in fixed
        )
        raise UserError(
            f'{option}: the run in "{run_dir}" has other options: {options}; leave these as they '
            "are, or begin a run in another folder."
        )
    return before


def _check_epochs(before: Recipe, now: Recipe, step: int, steps_per_epoch: int) -> None:
    """Refuses a number of epochs with which the steps that were taken would have been others.

    Args:
      before, now: the recipes, which differ in the epochs at most.
      step: taken so far.
      steps_per_epoch: of both.

    Raises:
      UserError: their learning rates would have been others, or the run is longer already.
    """
    if now.epochs == before.epochs:
        return
    change = f"--train.epochs cannot be {now.epochs} instead of {before.epochs}"
    if step > now.epochs * steps_per_epoch:
        done = step / steps_per_epoch
        raise UserError(f"{change}: the run has {done:.3g} epochs behind it already.")
    taken = jnp.arange(step)
    so_far, anew = (np.asarray(learning_rate(r, steps_per_epoch)(taken)) for r in (before, now))
    if not np.array_equal(so_far, anew):
        raise UserError(
            f"{change}: with that, the {step} steps taken would have had other learning rates "
            f"(--train.schedule {now.schedule}, --train.warmup-epochs {now.warmup_epochs}). Begin "
            "a run in another folder; one with --train.schedule exponential that is longer than "
            "its warm-up can be continued for any number of epochs."
        )


def _take_the_data_for_the_same(before: str, now: str, run_dir: pathlib.Path) -> None:
    """Goes on with a run of a version that did not record its data, if --data is as it was."""
    if data.absolute(before) != now:
        raise UserError(
            f'--data: the run in "{run_dir}" has no data.json, which tells whether {now} is the '
            f"data that it is trained on; leave --data as it was, {before}."
        )
    if meshes.leads():
        print(
            f'note: the run in "{run_dir}" has no record of its data, being of an older version; '
            f"{now} is taken to be what it was, and recorded",
            file=sys.stderr,
        )


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
