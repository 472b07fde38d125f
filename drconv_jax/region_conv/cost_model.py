"""Which implementations to try, and in what order, where the user names none."""

from __future__ import annotations

from typing import Any

from drconv_jax.region_conv.mixture import Mixture


def defaults(platform: str, x: Any, filters: Any, guide_features: Any) -> tuple[str, ...]:
    """Names, the best first; the last does everything."""
    if platform == "cpu":
        return ("cpu", "blocked")
    if isinstance(filters, Mixture) and filters.bank.shape[0] == 1 and guide_features.shape[-1] > 1:
        return ("experts_first_gpu", "experts_first", "blocked")
    if platform == "cuda":
        return ("pallas_gpu", "blocked")
    return ("blocked",)
