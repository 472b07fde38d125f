"""Who takes part in a case: DRConv and what it replaces."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from drconv_jax import DRConv
from drconv_jax.models import ShuffleNetV2, create_model
from drconv_jax.region_conv import region_conv
from experiments.speed import detection
from experiments.speed.cases import Case
from experiments.speed.measure import (
    DIRECTIONS,
    Contender,
    compiled,
    in_direction,
    temporary_bytes,
)

Guide = Literal["random", "blocky"]
OURS = {"op": "region_conv", "layer": "DRConv", "network": "with DRConv"}
TORCH_DRCONV = "PyTorch DRConv"
TORCH_NETWORK = "PyTorch"

_BLOCK = 7  # pixels a side over which a blocky guide is constant


def contenders(case: Case, implementation: str | None, guide: Guide) -> list[Contender]:
    """All that can take part here, compiled, in both directions."""
    make = {"op": _op, "layer": _layer, "network": _network}.get(case.level, _detection)
    return list(make(case, implementation, guide))


def noise(seed: int, shape: tuple[int, ...], dtype: str, guide: Guide) -> Array:
    """Normal values (batch, height, width, channels); blocky: constant over squares of pixels.

    As guide features, random ones use all regions equally at every place.
    """
    rng = np.random.default_rng(seed)
    if guide == "random":
        return jnp.asarray(rng.normal(size=shape), dtype)
    batch, height, width, channels = shape
    coarse = rng.normal(size=(batch, -(-height // _BLOCK), -(-width // _BLOCK), channels))
    fine = coarse.repeat(_BLOCK, axis=1).repeat(_BLOCK, axis=2)
    return jnp.asarray(fine[:, :height, :width], dtype)


def _op(case: Case, implementation: str | None, guide: Guide) -> Iterator[Contender]:
    x, dy = _x_and_dy(case, guide)
    kernel = _scaled(2, (case.kernel, case.kernel, case.in_features, case.features), case.dtype)
    for direction in DIRECTIONS:
        timed = functools.partial(in_direction, direction=direction, dy=dy)
        yield timed("convolution", None, _convolution, x, kernel, standard=True)
        if case.kernel == 1:
            yield timed("matmul", None, jnp.matmul, x, kernel[0, 0], standard=True)
        for m in case.regions:
            features = noise(3, (*x.shape[:3], m), "float32", guide)
            filters = _scaled(4, (case.batch, m, *kernel.shape), case.dtype)
            named = {OURS["op"]: implementation}
            # m times the work: they would take most of the time of a sweep, or of a GPU's minutes.
            if len(case.regions) == 1 and jax.default_backend() == "cpu":
                named |= {"blocked": "blocked", "reference": "reference"}
            for name, chosen in named.items():
                op = functools.partial(region_conv, implementation=chosen)
                yield timed(name, m, op, x, filters, features)


def _layer(case: Case, implementation: str | None, guide: Guide) -> Iterator[Contender]:
    x, dy = _x_and_dy(case, guide)
    size = (case.kernel, case.kernel)
    # As in the networks, where a batch norm follows, no layer has a bias.
    layers: list[tuple[str, int | None, nn.Module]] = [
        ("nn.Conv", None, nn.Conv(case.features, size, use_bias=False))
    ]
    for m in case.regions:
        drconv = DRConv(
            case.features, size, regions=m, use_bias=False, implementation=implementation
        )
        layers.append((OURS["layer"], m, drconv))
    for name, regions, layer in layers:
        params = _cast(jax.jit(layer.init)(jax.random.key(0), x), case.dtype)
        for direction in DIRECTIONS:
            yield in_direction(
                name, regions, layer.apply, params, x, direction=direction, dy=dy,
                standard=name == "nn.Conv",
            )  # fmt: skip
    if case.kernel == 1:
        matrix = _scaled(2, (1, 1, case.in_features, case.features), case.dtype)[0, 0]
        for direction in DIRECTIONS:
            yield in_direction("matmul", None, jnp.matmul, x, matrix, direction=direction, dy=dy)
    if torch_takes_part():
        from experiments.speed import torch_drconv

        yield from torch_drconv.contenders(case, np.asarray(x, np.float32), TORCH_DRCONV)


def _network(case: Case, implementation: str | None, guide: Guide) -> Iterator[Contender]:
    """Forward is inference; forward and backward is the training loss and its gradient."""
    x = noise(0, (case.batch, case.size, case.size, case.in_features), case.dtype, guide)
    labels = jnp.arange(case.batch) % case.features
    networks: list[tuple[str, int | None, nn.Module]] = [("plain", None, _plain_network(case))]
    networks += [(OURS["network"], m, _dr_network(case, m, implementation)) for m in case.regions]
    for name, regions, model in networks:
        variables = jax.jit(model.init)(jax.random.key(0), x)
        add = functools.partial(compiled, name, regions, standard=regions is None)
        yield add("forward", model.apply, variables, x)

        def loss(params: Any, stats: Any, x: Array, model: nn.Module = model) -> Any:
            logits, updates = model.apply(
                {"params": params, **stats}, x, train=True, mutable="batch_stats"
            )
            chosen = jax.nn.log_softmax(logits)[jnp.arange(case.batch), labels]
            return -chosen.mean(), updates

        params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
        step = jax.value_and_grad(loss, has_aux=True)
        yield add("forward+backward", step, params, stats, x)
    if case.network and torch_takes_part():
        from experiments.speed import torch_networks

        network = torch_networks.create(case.network, case.features)
        yield from torch_networks.contenders(
            TORCH_NETWORK, network, np.asarray(x, np.float32), np.asarray(labels), case.dtype
        )


def _detection(case: Case, implementation: str | None, guide: Guide) -> Iterator[Contender]:
    del guide  # a detector's is its own
    yield from detection.contenders(case, implementation)
    if torchvision_takes_part():
        from experiments.speed import torch_detection

        yield from torch_detection.contenders(case)


def _plain_network(case: Case) -> nn.Module:
    if case.network:
        return create_model(case.network, num_classes=case.features, dtype=jnp.dtype(case.dtype))
    return _small_network(case, nn.Conv)


def _dr_network(case: Case, regions: int, implementation: str | None) -> nn.Module:
    conv = functools.partial(DRConv, regions=regions, implementation=implementation)
    if case.network:
        return create_model(
            f"dr_{case.network}",
            num_classes=case.features,
            conv=conv,
            dtype=jnp.dtype(case.dtype),
        )
    return _small_network(case, conv)


def _small_network(case: Case, conv: Any) -> nn.Module:
    return ShuffleNetV2(
        case.features, 0.5, case.blocks, conv, stem_strides=(1, 2), dtype=jnp.dtype(case.dtype)
    )


def training_step_bytes(case: Case, implementation: str | None) -> tuple[int, int, int] | None:
    """Temporary memory of a layer's training step: DRConv's, nn.Conv's, and the filters' bytes.

    The step is the mean square of the output as loss, gradients of parameters and input, and the
    parameters' update. None where the platform does not tell.
    """
    shape = (case.batch, case.size, case.size, case.in_features)
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype))
    size, m = (case.kernel, case.kernel), case.regions[0]
    found = []
    for layer in (
        DRConv(case.features, size, regions=m, use_bias=False, implementation=implementation),
        nn.Conv(case.features, size, use_bias=False),
    ):

        def step(params: Any, x: Array, layer: Any = layer) -> Any:
            def loss(params: Any, x: Array) -> Array:
                return jnp.square(layer.apply(params, x)).mean()

            value, (dparams, dx) = jax.value_and_grad(loss, argnums=(0, 1))(params, x)
            update = jax.tree.map(lambda p, d: p - jnp.asarray(0.1, p.dtype) * d, params, dparams)
            return value, update, dx

        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        found.append(temporary_bytes(jax.jit(step).lower(params, x).compile()))
    ours, standard = found
    if ours is None or standard is None:
        return None
    entries = case.batch * m * case.kernel**2 * case.in_features * case.features
    return ours, standard, entries * jnp.dtype(case.dtype).itemsize


def torch_takes_part() -> bool:
    """Whether PyTorch is importable and computes on the same device as JAX."""
    if importlib.util.find_spec("torch") is None:
        return False
    # PyTorch's idle threads would otherwise spin on the cores that its backward pass needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    platform = jax.default_backend()
    return platform == "cpu" or (platform == "gpu" and torch.cuda.is_available())


def torchvision_takes_part() -> bool:
    """Whether torchvision is importable beside PyTorch."""
    return torch_takes_part() and importlib.util.find_spec("torchvision") is not None


def _convolution(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _x_and_dy(case: Case, guide: Guide) -> tuple[Array, Array]:
    spatial = (case.batch, case.size, case.size)
    x = noise(0, (*spatial, case.in_features), case.dtype, guide)
    return x, noise(1, (*spatial, case.features), case.dtype, "random")


def _scaled(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Filters (..., height, width, in, out) that keep the variance of their input."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values / np.prod(shape[-4:-1]) ** 0.5, dtype)


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
