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

    def __init__(self, folder: Path | None, every: int):
        self.every = every
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.manager = folder and ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.manager:
            self.manager.close()  # waits for the checkpoint that is being written

    def restore(self, state: Any) -> tuple[int, Any, list]:
        """Returns the newest step, state and history; if there are none, 0, `state` and none."""
        step = self.manager and self.manager.latest_step()
        if not self.manager or step is None:
            return 0, state, []
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = {"state": ocp.args.StandardRestore(shapes), "history": ocp.args.JsonRestore()}
        found = self.manager.restore(step, args=ocp.args.Composite(**items))
        return step, found["state"], [tuple(row) for row in found["history"]["rows"]]

    def is_due(self, step: int) -> bool:
        """Returns whether to save after this step."""
        return self.manager is not None and step % self.every == 0

    def save(self, step: int, state: Any, history: list) -> None:
        """Saves if it is due; training goes on while the files are written."""
        if self.manager and self.is_due(step):
            items = {
                "state": ocp.args.StandardSave(state),
                "history": ocp.args.JsonSave({"rows": list(history)}),
            }
            self.manager.save(step, args=ocp.args.Composite(**items))


class Trained:
    """What of a model is trained, and its optimizer, as pure dicts of arrays.

    The rest of the model is made anew by the same arguments.
    """

    def __init__(self, model: nnx.Module, optimizer: nnx.Optimizer):
        self.model, self.optimizer = model, optimizer

    def _states(self) -> dict[str, Any]:
        return {
            "params": nnx.state(self.model, self.optimizer.wrt),
            "optimizer": nnx.state(self.optimizer),
        }

    def read(self) -> dict[str, Any]:
        """Returns the arrays."""
        return {name: nnx.to_pure_dict(state) for name, state in self._states().items()}

    def write(self, arrays: dict[str, Any]) -> None:
        """Puts arrays into model and optimizer."""
        for name, state in self._states().items():
            nnx.replace_by_pure_dict(state, arrays[name])
            nnx.update(self.model if name == "params" else self.optimizer, state)
