"""The study's finished runs, kept in one file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

from experiments.runtime.errors import UserError
from experiments.runtime.files import write_text

# Of --data, those whose name is a path; that of hf: says which data set it is.
_BY_PATH = re.compile(r"^(folder:|arrayrecord:|idx:).*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, and what came of it.

    Attributes:
      case: its name in the study.
      seed: its seed.
      command: Python's arguments, but for the run's folder.
      report: the run's report.json; None before it is done.
      data: the run's data.json, what it was trained on; None of older runs.
    """

    case: str
    seed: int
    command: list[str]
    report: dict[str, Any] | None = None
    data: dict[str, Any] | None = None

    @property
    def options(self) -> set[str]:
        """The command's options with their values, in whatever order it has them.

        The path of the data is left out, which may lie elsewhere on another machine.
        """
        options = [""]
        for argument in self.command:
            if argument.startswith("--"):
                options.append(argument)
            else:
                options[-1] += " " + _BY_PATH.sub(r"\1", argument)
        return set(options)


class Results:
    """`results.json` in a folder, which is made where there is none.

    Attributes:
      runs: those that are finished.

    Raises:
      UserError: the file is not one of this command.
    """

    def __init__(self, folder: pathlib.Path):
        self._path = folder / "results.json"
        self.runs: list[Run] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                rows = json.loads(self._path.read_text(encoding="utf-8"))
                self.runs = [Run(**row) for row in rows]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f'--out: "{self._path}" holds no results of this command: {error}; name another '
                "folder."
            ) from None

    def has(self, run: Run) -> bool:
        """Whether this run is finished.

        Raises:
          UserError: it is, but was done with other options.
        """
        for known in self.runs:
            if (known.case, known.seed) == (run.case, run.seed):
                if known.options != run.options:
                    raise UserError(
                        f'--out: "{self._path}" has {run.case} with seed {run.seed} done by other '
                        f"options, {' '.join(known.command)}; name another folder."
                    )
                return True
        return False

    def add(self, run: Run, folder: pathlib.Path) -> None:
        """Takes in the report that a run has left in its folder.

        Raises:
          UserError: it was trained on other data than a run that is there.
        """
        report, data = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("report.json", "data.json")
        )
        for known in self.runs:
            if known.data not in (None, data):
                raise UserError(
                    f'--data: the run in "{folder}" was trained on other data than {known.case} '
                    f'with seed {known.seed} in "{self._path}"; name another --out, and another '
                    "--runs."
                )
        self.runs.append(dataclasses.replace(run, report=report, data=data))
        rows = [dataclasses.asdict(known) for known in self.runs]
        write_text(self._path, json.dumps(rows, indent=1) + "\n")
