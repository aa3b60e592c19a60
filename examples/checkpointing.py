"""Saves a training as it goes on and resumes it: parameters, optimizer and history, with Orbax.

Nothing here is about paged moments: Orbax carries them because `paged_optax` is imported.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx


class Checkpoints:
    """The newest checkpoints of a training in a folder; none if the folder is None.

    A process may be killed at any time. The next one goes on from the newest checkpoint that is
    complete, and gets the same losses, to the bit.
    """

    def __init__(self, folder: Path | None, every: int, model: nnx.Module, optimizer):
        self.every, self.model, self.optimizer = every, model, optimizer
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.manager = folder and ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.manager:
            self.manager.close()  # waits for the checkpoint that is being written

    def _states(self) -> dict[str, Any]:
        # What is trained; the rest of the model is made anew by the same arguments.
        return {
            "params": nnx.state(self.model, self.optimizer.wrt),
            "optimizer": nnx.state(self.optimizer),
        }

    def _arrays(self) -> dict[str, Any]:
        return {name: nnx.to_pure_dict(state) for name, state in self._states().items()}

    def restore(self) -> tuple[int, list]:
        """Puts the newest checkpoint into model and optimizer; returns its step and history."""
        step = self.manager and self.manager.latest_step()
        if not self.manager or step is None:
            return 0, []
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._arrays())
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(shapes), history=ocp.args.JsonRestore()
            ),
        )
        for name, state in self._states().items():
            nnx.replace_by_pure_dict(state, restored["arrays"][name])
            nnx.update(self.model if name == "params" else self.optimizer, state)
        return step, [tuple(row) for row in restored["history"]["rows"]]

    def save(self, step: int, history: list) -> None:
        """Saves after every so many steps; training goes on while the files are written."""
        if self.manager and step % self.every == 0:
            items = {
                "arrays": ocp.args.StandardSave(self._arrays()),
                "history": ocp.args.JsonSave({"rows": list(history)}),
            }
            self.manager.save(step, args=ocp.args.Composite(**items))
