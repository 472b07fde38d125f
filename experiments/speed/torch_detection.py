"""torchvision's contenders in the cases of detection."""

from __future__ import annotations

import os
from collections.abc import Iterator

import jax
import numpy as np
import torch
from torch import Tensor
from torchvision import ops
from torchvision.models.detection import FasterRCNN

from experiments.detection import torchvision_network
from experiments.speed import detection
from experiments.speed.cases import Case
from experiments.speed.measure import Contender
from experiments.speed.torch_drconv import contender

NAME = "torchvision"


def contenders(case: Case) -> Iterator[Contender]:
    """torchvision's, all of which are what ours are compared with."""
    torch.set_num_threads(os.cpu_count() or 1)
    make = {"roi_align": _roi_align, "nms": _nms, "detector": _detectors}[case.level]
    yield from make(case)


def _roi_align(case: Case) -> Iterator[Contender]:
    maps = {
        str(i): _channels_first(x).requires_grad_() for i, x in enumerate(detection.pyramid(case))
    }
    boxes = [_on_device(torch.tensor(boxes)) for boxes in detection.draw_boxes(case)]
    pool = torchvision_network.roi_align(case.kernel)
    sizes = [(case.size, case.size)] * case.batch
    dy = torch.ones_like(pool(maps, boxes, sizes))

    def forward() -> None:
        with torch.no_grad():
            pool(maps, boxes, sizes)

    def forward_backward() -> None:
        torch.autograd.grad(pool(maps, boxes, sizes), list(maps.values()), dy)

    yield contender(NAME, None, "forward", forward, standard=True)
    yield contender(NAME, None, "forward+backward", forward_backward, standard=True)


def _nms(case: Case) -> Iterator[Contender]:
    boxes, scores = (_on_device(torch.tensor(a)) for a in detection.candidates(case))

    def forward() -> None:
        ops.nms(boxes, scores, detection.NMS_THRESHOLD)

    yield contender(NAME, None, "forward", forward, standard=True)


def _detectors(case: Case) -> Iterator[Contender]:
    """The detector, with images in both of PyTorch's layouts: which is faster depends."""
    model, arrays = detection.detector(case), detection.arrays(case)
    variables = detection.initial(model)
    images, sizes = torchvision_network.images_of(arrays)
    objects = [
        {name: _on_device(tensor) for name, tensor in image.items()}
        for image in torchvision_network.objects_of(arrays, np.ones((case.batch, 2), np.float32))
    ]
    for name, layout in (
        (NAME, torch.contiguous_format),
        (f"{NAME}, channels last", torch.channels_last),
    ):
        network = _on_device(torchvision_network.build(model, variables)).to(memory_format=layout)
        x = _on_device(images).to(memory_format=layout)
        yield from _both_directions(name, network, x, sizes, objects)


def _both_directions(
    name: str,
    network: FasterRCNN,
    images: Tensor,
    sizes: list[tuple[int, int]],
    objects: list[torchvision_network.Objects],
) -> Iterator[Contender]:
    parameters = list(network.parameters())

    def infer() -> None:
        network.eval()
        torchvision_network.find(network, images, sizes)

    def train() -> None:
        network.train()
        losses = torchvision_network.losses(network, images, sizes, objects)
        torch.autograd.grad(sum(losses.values()), parameters)

    yield contender(name, None, "forward", infer, standard=True)
    yield contender(name, None, "forward+backward", train, standard=True)


def _channels_first(x: jax.Array) -> Tensor:
    return _on_device(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous())


def _on_device(value: Tensor) -> Tensor:
    return value.to("cuda" if jax.default_backend() == "gpu" else "cpu")
