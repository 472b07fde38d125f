"""Which implementations to try, and in what order, where the user names none."""

from __future__ import annotations

from typing import Any


def defaults(platform: str, x: Any, filters: Any, guide_features: Any) -> tuple[str, ...]:
    """Names, the best first; the last does everything."""
    if platform == "cpu":
        return ("cpu", "blocked")
    return ("blocked",)
