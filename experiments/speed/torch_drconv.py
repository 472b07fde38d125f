"""DRConv in PyTorch, in the design of the public implementations, to compare with.

Parameters have the names of shallowtoil/DRConv-PyTorch, so `drconv_jax.interop` imports them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from experiments.speed.cases import Case
from experiments.speed.measure import DEVICE_CALLS, Contender, Direction


class _Select(torch.autograd.Function):
    """At each position the response of the region that the guide names (Eq. 3-8)."""

    @staticmethod
    def forward(ctx: Any, responses: Tensor, guide: Tensor) -> Tensor:
        """From (batch, m, features, h, w) and (batch, m, h, w) to (batch, features, h, w)."""
        index = guide.argmax(1, keepdim=True)
        ctx.save_for_backward(responses, guide, index)
        wide = index.unsqueeze(2).expand(-1, -1, responses.shape[2], -1, -1)
        return responses.gather(1, wide).squeeze(1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """The hard choice's gradient for the responses, softmax's for the guide."""
        responses, guide, index = ctx.saved_tensors
        dy = dy.unsqueeze(1)
        mask = torch.zeros_like(guide).scatter_(1, index, 1).unsqueeze(2)
        scores = (dy * responses).sum(2)
        soft = guide.softmax(1)
        return dy * mask, soft * (scores - (soft * scores).sum(1, keepdim=True))


class DRConv2d(torch.nn.Module):
    """The layer: all m filters convolve everywhere, in one grouped convolution, then a gather."""

    def __init__(self, in_features: int, features: int, kernel_size: int, regions: int) -> None:
        super().__init__()
        m = regions
        self.features, self.kernel_size, self.regions = features, kernel_size, m
        padding = kernel_size // 2
        self.conv_guide = torch.nn.Conv2d(in_features, m, kernel_size, padding=padding)
        self.conv_kernel = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(kernel_size),
            torch.nn.Conv2d(in_features, m * m, 1),
            torch.nn.Sigmoid(),
            torch.nn.Conv2d(m * m, m * in_features * features, 1, groups=m),
        )

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, in, h, w) to (batch, features, h, w)."""
        batch, in_features, height, width = x.shape
        filters = self.conv_kernel(x).reshape(-1, in_features, self.kernel_size, self.kernel_size)
        responses = functional.conv2d(
            x.reshape(1, -1, height, width), filters, padding=self.kernel_size // 2, groups=batch
        )
        responses = responses.reshape(batch, self.regions, self.features, height, width)
        return _Select.apply(responses, self.conv_guide(x))


def contenders(case: Case, x: np.ndarray, name: str) -> Iterator[Contender]:
    """The layer for each m, and PyTorch's own convolution.

    Args:
      case: a layer.
      x: its input, (batch, height, width, in).
      name: what to call the layer.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    to = {"dtype": getattr(torch, case.dtype), "device": device}
    image = torch.tensor(np.moveaxis(x, -1, 1)).contiguous().to(**to).requires_grad_()
    convolution = torch.nn.Conv2d(
        case.in_features, case.features, case.kernel, padding=case.kernel // 2, bias=False
    )
    modules: list[tuple[str, int | None, torch.nn.Module]] = [("torch conv", None, convolution)]
    for m in case.regions:
        modules.append((name, m, DRConv2d(case.in_features, case.features, case.kernel, m)))
    for module_name, regions, module in modules:
        yield from _both_directions(module_name, regions, module.to(**to), image)


def _both_directions(
    name: str, regions: int | None, module: torch.nn.Module, x: Tensor
) -> Iterator[Contender]:
    variables = [x, *module.parameters()]
    dy = torch.randn_like(module(x))

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def forward_backward() -> None:
        torch.autograd.grad(module(x), variables, dy)

    yield contender(name, regions, "forward", forward)
    yield contender(name, regions, "forward+backward", forward_backward)


def contender(
    name: str,
    regions: int | None,
    direction: Direction,
    call: Callable[[], None],
    *,
    standard: bool = False,
) -> Contender:
    """One that calls PyTorch: on a GPU often, so that it waits for the last call alone."""
    if not torch.cuda.is_available():
        return Contender(name, regions, direction, call, standard=standard)

    def run() -> None:
        for _ in range(DEVICE_CALLS):
            call()
        torch.cuda.synchronize()

    return Contender(name, regions, direction, run, standard=standard, calls=DEVICE_CALLS)
