"""ShuffleNetV2 and MobileNetV2 in PyTorch, from the tables of their papers, to compare with.

They have the layers of `drconv_jax.models`, without DRConv. Images lie channels last in memory,
the fastest layout for these networks on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.speed.measure import Contender

# Table 5 of the ShuffleNetV2 paper: channels of the stem, of stages 2, 3, 4, of the last layer.
_SHUFFLENET_CHANNELS = {0.5: (24, 48, 96, 192, 1024), 1.0: (24, 116, 232, 464, 1024)}
# Table 2 of the MobileNetV2 paper: expansion, channels, blocks, strides of the first block.
_MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def shufflenet_v2(width: float, num_classes: int = 1000) -> nn.Sequential:
    """ShuffleNetV2 of width 0.5 or 1, from (batch, 3, height, width) to logits."""
    stem, *stages, last = _SHUFFLENET_CHANNELS[width]
    layers: list[nn.Module] = [
        *_conv_norm(3, stem, 3, strides=2, activation=nn.ReLU),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    channels = stem
    for features, blocks in zip(stages, (4, 8, 4), strict=True):
        layers.append(_ShuffleDown(channels, features))
        layers += [_ShuffleBasic(features) for _ in range(blocks - 1)]
        channels = features
    layers += _conv_norm(channels, last, activation=nn.ReLU)
    return nn.Sequential(*layers, *_classifier(last, num_classes))


def mobilenet_v2(num_classes: int = 1000) -> nn.Sequential:
    """MobileNetV2 of width 1, from (batch, 3, height, width) to logits."""
    stem, last = 32, 1280
    layers: list[nn.Module] = [*_conv_norm(3, stem, 3, strides=2, activation=nn.ReLU6)]
    channels = stem
    for expansion, features, blocks, strides in _MOBILENET_STAGES:
        for block in range(blocks):
            layers.append(
                _InvertedResidual(channels, features, expansion, strides if block == 0 else 1)
            )
            channels = features
    layers += _conv_norm(channels, last, activation=nn.ReLU6)
    return nn.Sequential(*layers, *_classifier(last, num_classes))


def contenders(
    name: str, network: nn.Module, x: np.ndarray, labels: np.ndarray, dtype: str
) -> Iterator[Contender]:
    """A network's inference, and its training step: loss, gradients, batch norm's statistics.

    Args:
      name: what to call it.
      network: from images to logits.
      x: images, (batch, height, width, channels).
      labels: their classes, (batch,).
      dtype: of the computation.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    network = network.to(
        device=device, dtype=getattr(torch, dtype), memory_format=torch.channels_last
    )
    image = torch.tensor(np.moveaxis(x, -1, 1)).to(
        device=device, dtype=getattr(torch, dtype), memory_format=torch.channels_last
    )
    target = torch.tensor(labels, dtype=torch.long, device=device)
    parameters = list(network.parameters())

    def infer() -> None:
        network.eval()
        with torch.no_grad():
            network(image)

    def train() -> None:
        network.train()
        loss = functional.cross_entropy(network(image), target)
        torch.autograd.grad(loss, parameters)

    def waited(run: Callable[[], None]) -> Callable[[], None]:
        def run_and_wait() -> None:
            run()
            if image.is_cuda:
                torch.cuda.synchronize()

        return run_and_wait

    yield Contender(name, None, "forward", waited(infer))
    yield Contender(name, None, "forward+backward", waited(train))


def _conv_norm(
    in_features: int,
    features: int,
    kernel: int = 1,
    *,
    strides: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> list[nn.Module]:
    """A convolution without bias, batch norm, and the activation if there is one."""
    padding = kernel // 2
    layers: list[nn.Module] = [
        nn.Conv2d(in_features, features, kernel, strides, padding, groups=groups, bias=False),
        nn.BatchNorm2d(features),
    ]
    return layers if activation is None else [*layers, activation(inplace=True)]


def _classifier(in_features: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_features, num_classes)]


def _shuffle_branch(in_features: int, features: int, strides: int) -> nn.Sequential:
    """The branch of a ShuffleNetV2 block that has all three convolutions."""
    return nn.Sequential(
        *_conv_norm(in_features, features, activation=nn.ReLU),
        *_conv_norm(features, features, 3, strides=strides, groups=features),
        *_conv_norm(features, features, activation=nn.ReLU),
    )


class _ShuffleBasic(nn.Module):
    """Figure 3(c) of the ShuffleNetV2 paper."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.branch = _shuffle_branch(features // 2, features // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From and to (batch, features, height, width)."""
        kept, x = x.chunk(2, dim=1)
        return functional.channel_shuffle(torch.cat([kept, self.branch(x)], dim=1), 2)


class _ShuffleDown(nn.Module):
    """Figure 3(d) of the ShuffleNetV2 paper."""

    def __init__(self, in_features: int, features: int) -> None:
        super().__init__()
        half = features // 2
        self.shortcut = nn.Sequential(
            *_conv_norm(in_features, in_features, 3, strides=2, groups=in_features),
            *_conv_norm(in_features, half, activation=nn.ReLU),
        )
        self.branch = _shuffle_branch(in_features, half, 2)

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, in, height, width) to (batch, features, height / 2, width / 2)."""
        return functional.channel_shuffle(torch.cat([self.shortcut(x), self.branch(x)], dim=1), 2)


class _InvertedResidual(nn.Module):
    """Figure 4(d) of the MobileNetV2 paper."""

    def __init__(self, in_features: int, features: int, expansion: int, strides: int) -> None:
        super().__init__()
        inside = expansion * in_features
        expand = _conv_norm(in_features, inside, activation=nn.ReLU6) if expansion > 1 else []
        self.adds = strides == 1 and in_features == features
        self.layers = nn.Sequential(
            *expand,
            *_conv_norm(inside, inside, 3, strides=strides, groups=inside, activation=nn.ReLU6),
            *_conv_norm(inside, features),
        )

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, in, height, width) to (batch, features, out_height, out_width)."""
        return x + self.layers(x) if self.adds else self.layers(x)
