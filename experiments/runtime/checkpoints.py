"""Checkpoints of a run, by orbax."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.runtime.errors import UserError


class Checkpoints:
    """The checkpoints in a run's folder, the last two kept."""

    def __init__(self, run_dir: pathlib.Path):
        self._folder = run_dir / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self._folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def save(self, step: int, state: Any) -> None:
        """Begins to save; the newest save is whole once `close` has returned."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: Any) -> Any | None:
        """The newest checkpoint, or None where there is none.

        Args:
          like: a state of the shapes to be restored.

        Raises:
          UserError: the checkpoint is of another model.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        saved = ocp.StandardCheckpointer().metadata(
            (self._folder / str(step) / "default").absolute()
        )
        saved = getattr(saved, "item_metadata", saved)
        difference = _difference(like, getattr(saved, "tree", saved))
        if difference:
            raise UserError(
                f'the checkpoint "{self._folder / str(step)}" is of another model: {difference}; '
                "resume with the options and the version that the run was started with."
            )
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(shapes))

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.wait_until_finished()
        self._manager.close()


def _difference(like: Any, saved: Any) -> str:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda node: hasattr(node, "shape")
        )[0]
        return {
            "/".join(
                str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path
            ): (tuple(leaf.shape))
            for path, leaf in leaves
            if getattr(leaf, "shape", None) is not None
        }

    ours, theirs = shapes(like), shapes(saved)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            there, here = theirs.get(name, "missing"), ours.get(name, "missing")
            return f"{name} is {there} there and {here} here"
    return ""
