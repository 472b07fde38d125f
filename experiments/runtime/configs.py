"""Configurations: nested dataclasses that are saved, read again, compared and shown."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from experiments.runtime.errors import UserError

T = TypeVar("T")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every option's value under its dotted name, as "train.epochs"."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        values |= flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return values


def differences(config: T, other: T) -> dict[str, tuple[Any, Any]]:
    """The options that differ, each with its value in `config` and that in `other`."""
    theirs = flat(other)
    return {
        name: (value, theirs[name]) for name, value in flat(config).items() if value != theirs[name]
    }


def option(name: str) -> str:
    """The command-line option of a dotted name."""
    return f"--{name.replace('_', '-')}"


def check_options(config: Any, group: str, *ranges: tuple[str, bool, str]) -> None:
    """Refuses an option whose value is out of its range.

    Args:
      config: has the options.
      group: what is before the options' names, as "train" in "--train.epochs"; "" for nothing.
      ranges: for each option its name, whether its value is in its range, and which that is.

    Raises:
      UserError: one is out of its range.
    """
    for name, within, allowed in ranges:
        if not within:
            value = getattr(config, name)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            dotted = f"{group}.{name}" if group else name
            raise UserError(f"{option(dotted)} must be {allowed}, got {shown}.")


def shown(config: T, preset: T, name: str) -> str:
    """All options, a line each; where one is not the preset's of that name, the preset's too."""
    changed = differences(config, preset)
    values = flat(config)
    width = max(map(len, values))
    lines = [f"{option:{width}}  {value}" for option, value in values.items()]
    for row, option in enumerate(values):
        if option in changed:
            lines[row] += f"  ({name}: {changed[option][1]})"
    return "\n".join(lines)


def arguments(config: T, preset: T) -> list[str]:
    """The command-line options that make `config` of `preset`."""
    options: list[str] = []
    for name, (value, _) in differences(config, preset).items():
        flag = option(name)
        if isinstance(value, bool) and isinstance(flat(preset)[name], bool):
            group, dot, last = flag[2:].rpartition(".")
            options.append(flag if value else f"--{group}{dot}no-{last}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            options += [flag, *map(str, values)]
    return options


def from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """The configuration that `dataclasses.asdict` and JSON made `values` of.

    Raises:
      TypeError: an option is unknown, or a group of options is none.
    """
    hints = typing.get_type_hints(kind)

    def value_of(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(hints.get(name)):
            return from_json(hints[name], value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: value_of(name, value) for name, value in values.items()})
