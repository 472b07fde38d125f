"""The command of an experiment: its options, its run's folder, training, the report.

`python -m experiments.NAME` is `main` with what makes the experiment one of its own, an
`Experiment`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.runtime import commands, configs, dry_run, run_folder
from experiments.runtime import mesh as meshes
from experiments.runtime.checkpoints import CheckpointConfig
from experiments.runtime.errors import UserError
from experiments.runtime.files import write_text
from experiments.runtime.loop import train
from experiments.runtime.pipeline import Loading
from experiments.runtime.recipes import Recipe, learning_rate
from experiments.runtime.run_folder import Facts
from experiments.runtime.task import Feed, Task


class NetworkConfig(Protocol):
    """Which network."""

    @property
    def name(self) -> str:
        """By which a run's folder is called."""


class Config(Protocol):
    """What a run is, as a frozen dataclass that is saved with it; experiments have more options."""

    @property
    def data(self) -> str:
        """What to train on."""

    @property
    def model(self) -> NetworkConfig:
        """Which network to train."""

    @property
    def train(self) -> Recipe:
        """How to train it."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """When to save."""


C = TypeVar("C", bound=Config)


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

    def __post_init__(self) -> None:
        if self.chip_batch is not None and self.chip_batch < 1:
            raise UserError(f"--chip-batch must be at least 1, got {self.chip_batch}.")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What every experiment's command takes; an experiment's own has a preset and a config too."""

    recipe: str
    """What all other options start from."""
    config: Any
    """The run's options."""
    show: bool = False
    """Only print all options, and where they differ from the recipe's."""
    run_dir: commands.Path | None = None
    """Folder for this run, which must not hold one yet; default: runs/ and the time."""
    auto_resume: bool = False
    """If --run-dir holds a run already, continue it; options that --resume would refuse to change
    must be as they were."""
    resume: commands.Path | None = None
    """Continue the run in this folder, with its own options. These may be given anew: --data, if
    the same data is elsewhere now; --workers, --threads, --train.remat, --checkpoint.* and
    where to run; --train.epochs, if the learning rates of the steps behind it would have been the
    same: always with the schedules "exponential" and "steps", during warm-up with the others, which
    end at zero after the last epoch."""
    cluster: Annotated[meshes.Cluster, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=meshes.Cluster
    )
    loading: Annotated[Loading, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Loading)
    pods: Annotated[Pods, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Pods)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run needs besides its options, once its data is found.

    Attributes:
      task: what is trained.
      feed: its batches.
      facts: what tells this data from other data, by short names.
      summary: the data in a few words.
      skipped: samples that could not be read, as "path: reason".
      left_out: what of the data is not used and why, a line for each kind.
      files: by name, what is written into the run's folder as JSON beside its options.
      pictures: by name, what draws a picture into the run's folder in the end; each is called with
        the path and the variables, without parameters that lie in parts for good.
    """

    task: Task
    feed: Feed
    facts: Facts
    summary: str
    skipped: Sequence[str] = ()
    left_out: Sequence[str] = ()
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, Callable[[pathlib.Path, Any], None]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[C]):
    """What makes an experiment's command.

    Attributes:
      name: the command is `python -m experiments.NAME`.
      description: for --help.
      arguments: its own dataclass, whose defaults are those of a preset.
      presets: what options start from, by name.
      set_up: reads the data and builds the network. It raises UserError for options that do not
        fit.
      task_without_data: what a dry run compiles.
      absolute: the options with paths that hold in any working folder.
      may_change: how the options begin that may be other than before where a run goes on; the
        number of epochs as `_check_epochs` says.
    """

    name: str
    description: str
    arguments: type[Arguments]
    presets: Mapping[str, C]
    set_up: Callable[[C, Loading], Setup]
    task_without_data: Callable[[Any], Task]
    absolute: Callable[[C], C]
    may_change: tuple[str, ...] = ("data", "train.epochs", "train.remat", "checkpoint.")


@dataclasses.dataclass(frozen=True)
class _Start:
    """Where all other options start from."""

    recipe: str | None = None
    resume: commands.Path | None = None


def main(experiment: Experiment[Any]) -> None:
    """The command."""
    with commands.running():
        arguments = _parse(experiment)
        if arguments.show:
            preset = arguments.recipe
            print(configs.shown(arguments.config, experiment.presets[preset], preset))
            return
        if arguments.pods.dry_run:
            _dry_run(experiment, arguments)
            return
        meshes.join_processes(arguments.cluster)
        mesh = meshes.make_mesh(arguments.cluster.fsdp)
        with contextlib.ExitStack() as holding:
            with meshes.refusing_together():
                run_dir = _folder(experiment, arguments, holding)
            with meshes.refusing_together():
                before = _options_before(experiment, arguments, run_dir)
            run(experiment, arguments.config, run_dir, mesh, arguments.loading, before)


def run(
    experiment: Experiment[C],
    config: C,
    run_dir: pathlib.Path,
    mesh: jax.sharding.Mesh,
    loading: Loading = Loading(),
    before: C | None = None,
) -> None:
    """Trains by `config` in `run_dir`, and writes the report.

    Args:
      experiment: what is trained.
      config: the options.
      run_dir: the run's folder, which no other run uses meanwhile.
      mesh: where to train.
      loading: how images come from a disk.
      before: the options so far of the run in the folder, which goes on; None for a new one.
    """
    leads = meshes.leads()
    with meshes.refusing_together():
        setup = experiment.set_up(config, loading)
        for line in setup.left_out:
            print(f"left out: {line}", file=sys.stderr)
        for line in setup.skipped[:5]:
            print(f"skipped {line}", file=sys.stderr)
        if len(setup.skipped) > 5:
            print(f"skipped {len(setup.skipped)} images in all; see report.json", file=sys.stderr)
        steps = setup.feed.steps_per_epoch
        meshes.check_batch(config.train.batch_size, mesh, config.train.accumulate)
        recorded = before is not None and run_folder.has_data_record(run_dir)
        if before is not None:
            _check_epochs(before.train, config.train, run_folder.newest_step(run_dir), steps)
            if not recorded:
                _take_the_data_for_the_same(experiment.absolute(before).data, config.data, run_dir)
        facts = {**setup.facts, "steps in an epoch": steps}
        if leads and not recorded:
            run_folder.record_data(run_dir, facts)
    with meshes.refusing_together():
        run_folder.check_data(run_dir, facts, new=before is None)
    if leads and before is not None:
        for name, (new, old) in configs.differences(config, before).items():
            print(f"{configs.option(name)} is {new} from now on; it was {old}")
    if leads:
        run_folder.write_config(run_dir, config)
        for name, content in setup.files.items():
            write_text(run_dir / name, json.dumps(content) + "\n")
        print(f"{setup.summary}; run folder {run_dir}")
    meshes.meet("the run's folder is there")
    start = time.time()
    state, metrics, skipped = train(
        setup.task, setup.feed, config.train, run_dir, mesh=mesh, checkpoint=config.checkpoint
    )
    skipped = [*setup.skipped, *skipped]
    whole = {**state.variables, "params": _put_together(setup.task, state.variables["params"])}
    variables = meshes.on_host(whole, mesh)
    if not leads:
        return
    report = {
        **metrics,
        "seconds": time.time() - start,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.variables["params"])),
        "skipped_images": len(skipped),
        "skipped": skipped,
        "left_out": setup.left_out,
    }
    write_text(run_dir / "report.json", json.dumps(report, indent=2) + "\n")
    for name, draw in setup.pictures.items():
        try:
            draw(run_dir / name, variables)
        except Exception as error:  # a picture is not worth a run's end
            reason = " ".join(str(error).split())[:200]
            print(
                f"warning: {name} is not drawn: {type(error).__name__}: {reason}", file=sys.stderr
            )
    best = setup.task.best
    print(
        f"{best.replace('_', ' ')} {metrics[best]:.4f} after {metrics['epoch']} epochs, "
        f"{report['parameters']:,} parameters, {len(skipped)} images skipped; see {run_dir}"
    )


def _put_together(task: Task, params: Any) -> Any:
    """The parameters, but for those that lie in parts for good, in whose place is None."""
    return jax.tree.map(
        lambda leaf, is_parted: None if is_parted else leaf, params, task.parted(params)
    )


def _dry_run(experiment: Experiment[Any], arguments: Arguments) -> None:
    """Prints what a training step takes, and writes it to dry_run.json in --run-dir."""
    jax.config.update("jax_platforms", "cpu")  # a TPU that is there is left alone
    recipe, pods = arguments.config.train, arguments.pods
    task = experiment.task_without_data(arguments)
    reports = []
    for topology in pods.topology:
        reports.append(
            dry_run.compile_step(
                task, recipe, topology, chip_batch=pods.chip_batch, fsdp=arguments.cluster.fsdp
            )
        )
        print(f"compiled for {topology} in {reports[-1].seconds:.0f} s", file=sys.stderr)
        batch = reports[-1].images * reports[-1].chips
        if pods.chip_batch is None and batch != recipe.batch_size:
            print(
                f"the batch of {recipe.batch_size} does not divide among the "
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


def _parse(experiment: Experiment[Any]) -> Arguments:
    """The arguments, whose defaults are those of a recipe, or of the run that --resume names."""
    program, presets = f"python -m experiments.{experiment.name}", experiment.presets
    start, _ = tyro.cli(_Start, prog=program, return_unknown_args=True, add_help=False)
    # A recipe that is none is refused where all arguments are read.
    preset = next((name for name in presets if name == start.recipe), next(iter(presets)))
    config = presets[preset]
    if start.resume is not None:
        config = run_folder.read_config(type(config), "--resume", start.resume)
    arguments = tyro.cli(
        experiment.arguments,
        prog=program,
        description=experiment.description,
        default=experiment.arguments(recipe=preset, config=config),
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
    return dataclasses.replace(arguments, config=experiment.absolute(arguments.config))


def _folder(
    experiment: Experiment[Any], arguments: Arguments, holding: contextlib.ExitStack
) -> pathlib.Path:
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
        new = pathlib.Path("runs") / experiment.name / name
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


def _options_before(
    experiment: Experiment[C], arguments: Arguments, run_dir: pathlib.Path
) -> C | None:
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
    before = run_folder.read_config(type(config), option, run_dir)
    changed = configs.differences(config, before)
    fixed = [name for name in changed if not name.startswith(experiment.may_change)]
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
            "a run in another folder; one with --train.schedule exponential or steps that is "
            "longer than its warm-up can be continued for any number of epochs."
        )


def _take_the_data_for_the_same(before: str, now: str, run_dir: pathlib.Path) -> None:
    """Goes on with a run of a version that did not record its data, if --data is as it was."""
    if before != now:
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
