"""Trains torchvision's detector as experiments.detection trains ours, to compare the two.

The options are those of experiments.detection, for a plain network. It starts from the same
weights, takes the same steps on the same batches in the same order, by the same recipe, and is
evaluated by the same code. Which anchors and proposals are drawn is left to PyTorch's random
numbers. The run's folder gets config.json, metrics.jsonl, tensorboard/ and report.json.
PyTorch and torchvision must be installed (pip install '.[compare]'); OMP_WAIT_POLICY=PASSIVE keeps
their idle threads off the cores that read images meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Annotated

import jax
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from drconv_jax.interop import export_torch
from experiments.detection import torchvision_network
from experiments.detection.__main__ import EXPERIMENT, set_up
from experiments.detection.config import PRESETS, Config, Preset
from experiments.detection.feed import CocoImages
from experiments.detection.task import Detection
from experiments.runtime import commands, run_folder
from experiments.runtime.errors import UserError
from experiments.runtime.files import write_text
from experiments.runtime.metrics import Metrics, Row
from experiments.runtime.pipeline import Loading
from experiments.runtime.recipes import Recipe, learning_rate
from experiments.runtime.task import HostBatch, Variables

_PROGRAM = "python -m experiments.detection.torchvision_twin"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains torchvision's detector as experiments.detection trains ours, to compare the two."""

    recipe: Preset = "small"
    """What all other options start from."""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    run_dir: commands.Path | None = None
    """Folder for this run, which must not hold one yet; default: runs/ and the time."""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Loading)


@dataclasses.dataclass(frozen=True)
class _Start:
    """Where all other options start from."""

    recipe: str = "small"


def main() -> None:
    """The command."""
    with commands.running():
        arguments = _parse()
        config = EXPERIMENT.absolute(arguments.config)
        check(config)
        name = f"torchvision-{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        default = pathlib.Path("runs") / "detection" / name
        with run_folder.held_without("config.json", arguments.run_dir, default) as run_dir:
            run(config, run_dir, arguments.loading)


def check(config: Config) -> None:
    """Refuses options that torchvision's detector has no counterpart of.

    Raises:
      UserError: there is one.
    """
    model, recipe = config.model, config.train
    for option, fits, wanted in (
        ("model.name", model.is_plain, "a network without DRConv"),
        ("model.name", "mobilenet_v1" not in model.name, "on shufflenet_v2 or mobilenet_v2"),
        ("model.group-norm", not model.group_norm, "off"),
        ("model.dtype", model.dtype == "float32", "float32"),
        ("train.ema", not recipe.ema, "0"),
        ("train.accumulate", recipe.accumulate == 1, "1"),
    ):
        if not fits:
            raise UserError(f"--{option} must be {wanted} for torchvision's detector.")


def run(config: Config, run_dir: pathlib.Path, loading: Loading = Loading()) -> None:
    """Trains by `config` in `run_dir`, and writes the report.

    Args:
      config: the options.
      run_dir: the run's folder, which no other run uses meanwhile.
      loading: how images come from a disk.
    """
    setup = set_up(config, loading)
    for what in setup.left_out:
        print(f"left out: {what}", file=sys.stderr)
    task, feed, recipe = setup.task, setup.feed, config.train
    assert isinstance(task, Detection) and isinstance(feed, CocoImages)
    training = Training(task, recipe, feed.steps_per_epoch)
    run_folder.write_config(run_dir, config)
    console = Console(markup=False, emoji=False)
    console.print(f"{setup.summary}; run folder {run_dir}", soft_wrap=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=8),
        TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    start, batches = time.time(), feed.training(0)
    skipped: set[str] = set()
    with Metrics(run_dir, [], 0) as metrics, Progress(*columns, console=console) as progress:
        line = progress.add_task("", total=recipe.epochs * feed.steps_per_epoch, loss=math.nan)
        for epoch in range(1, recipe.epochs + 1):
            begun, sums = time.perf_counter(), dict[str, float]()
            for _ in range(feed.steps_per_epoch):
                batch = next(batches)
                skipped.update(f"{feed.train.name_of(i)}: {why}" for i, why in batch.broken.items())
                values = training.step(batch.arrays, _scales(feed, batch))
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
                progress.update(
                    line, advance=1, description=f"epoch {epoch}/{recipe.epochs}",
                    loss=values["loss"],
                )  # fmt: skip
            seconds = time.perf_counter() - begun
            row: Row = {
                "epoch": epoch,
                "step": training.steps,
                **{f"train_{name}": total / feed.steps_per_epoch for name, total in sums.items()},
                "images_per_second": recipe.batch_size * feed.steps_per_epoch / seconds,
                **evaluate(task, feed, training.network),
            }
            metrics.epoch(row)
            console.print(
                f"epoch {epoch:3d}  loss {row['train_loss']:.3f}  {task.best.replace('_', ' ')} "
                f"{row[task.best]:.4f}  {row['images_per_second']:,.1f} images/s",
                soft_wrap=True,
            )
    report = {
        **row,
        "seconds": time.time() - start,
        "parameters": sum(p.numel() for p in training.network.parameters()),
        "skipped_images": len(skipped),
        "skipped": sorted(skipped),
        "left_out": setup.left_out,
    }
    write_text(run_dir / "report.json", json.dumps(report, indent=2) + "\n")
    console.print(f"see {run_dir}", soft_wrap=True)


class Training:
    """torchvision's detector in training, from the weights that ours starts from.

    Attributes:
      network: the detector.
      steps: taken so far.
    """

    def __init__(self, task: Detection, recipe: Recipe, steps_per_epoch: int) -> None:
        variables = jax.jit(task.init)(jax.random.key(recipe.seed))
        torch.manual_seed(recipe.seed)
        self.network = torchvision_network.build(task.model, variables)
        self.steps = 0
        self._live = task.model.batch_norm == "live"
        self._rate, self._clip = learning_rate(recipe, steps_per_epoch), recipe.gradient_clip
        self._parameters = _trained(self.network, task, variables)
        # Norms and biases are what has one axis.
        matrices = [p for p in self._parameters if p.ndim > 1]
        vectors = [p for p in self._parameters if p.ndim == 1]
        self._optimizer = torch.optim.SGD(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.peak_rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov and recipe.momentum > 0,
        )

    def step(self, arrays: Mapping[str, np.ndarray], scales: np.ndarray) -> dict[str, float]:
        """Takes a step; the loss, its parts, the gradient's norm, and the learning rate.

        Args:
          arrays: a batch, of `Preparation`.
          scales: see `torchvision_network.objects_of`.

        Raises:
          UserError: the loss is not finite.
        """
        self.network.train()
        if not self._live:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        losses = torchvision_network.losses(
            self.network,
            *torchvision_network.images_of(arrays),
            torchvision_network.objects_of(arrays, scales),
        )
        loss: Tensor = sum(losses.values(), start=torch.zeros(()))
        self._optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip or math.inf)
        rate = float(self._rate(self.steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if not math.isfinite(loss.item() + norm.item()):
            raise UserError(
                f"the loss is {loss.item()} and its gradient's norm {norm.item()} at step "
                f"{self.steps + 1}; lower --train.learning-rate."
            )
        self._optimizer.step()
        self.steps += 1
        return {
            "loss": loss.item(),
            **{name: part.item() for name, part in losses.items()},
            "gradient_norm": norm.item(),
            "learning_rate": rate,
        }


def evaluate(task: Detection, feed: CocoImages, network: nn.Module) -> Row:
    """COCO's metrics of torchvision's detector on the held-out images, by `Detection`'s code."""
    network.eval()
    evaluation = task.evaluation()
    for batch in feed.evaluation():
        found = torchvision_network.find(network, *torchvision_network.images_of(batch.arrays))
        evaluation.add(batch, _in_slots(found, task.model.box_detections_per_img))
    return evaluation.row()


def _in_slots(found: list[dict[str, Tensor]], slots: int) -> dict[str, np.ndarray]:
    """The detections of a batch as `Detection.evaluate` gives them."""

    def filled(name: str) -> np.ndarray:
        parts = [np.asarray(image[name]) for image in found]
        values = np.zeros((len(parts), slots, *parts[0].shape[1:]), parts[0].dtype)
        for image, part in zip(values, parts, strict=True):
            image[: len(part)] = part
        return values

    results = {name: filled(name) for name in ("boxes", "scores", "labels")}
    if "masks" in found[0]:
        results["masks"] = filled("masks")[:, :, 0].astype(np.float16)
    return results


def _scales(feed: CocoImages, batch: HostBatch) -> np.ndarray:
    """Of the images' heights and widths on the canvas, to those of their files."""
    annotations, index = feed.train.annotations, batch.index
    sizes = np.stack([annotations.heights[index], annotations.widths[index]], axis=1)
    return (batch.arrays["size"] / sizes).astype(np.float32)


def _trained(network: nn.Module, task: Detection, variables: Variables) -> list[nn.Parameter]:
    """The parameters that the task trains."""
    chosen = jax.tree.map(np.full_like, variables["params"], task.trained(variables["params"]))
    chosen_by_name = export_torch(task.model, {**variables, "params": chosen})
    return [p for name, p in network.named_parameters() if chosen_by_name[name].all()]


def _parse() -> Arguments:
    """The arguments, whose defaults are those of a recipe."""
    start, _ = tyro.cli(_Start, prog=_PROGRAM, return_unknown_args=True, add_help=False)
    # A recipe that is none is refused where all arguments are read.
    preset = next((name for name in PRESETS if name == start.recipe), next(iter(PRESETS)))
    default = Arguments(recipe=preset, config=PRESETS[preset])  # type: ignore[arg-type]
    return tyro.cli(Arguments, prog=_PROGRAM, description=__doc__, default=default)


if __name__ == "__main__":
    main()
