"""Flax's optimizers, with steps in place: the classes of the same names, and one method another.

    -from flax.nnx import Optimizer
    +from paged_optax.flax import Optimizer

    -from flax.training.train_state import TrainState
    +from paged_optax.flax import TrainState

States, and so checkpoints, are those of Flax. This module needs flax; the package does without.
"""

from typing import Any

from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from ._in_place import apply_gradients


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer`, whose `update` steps the model's parameters in place.

    Donate model and optimizer to the program (see `paged_optax.apply_gradients`), and what `tx` may
    be is said there too.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> from flax import nnx
      >>> from paged_optax.flax import Optimizer
      >>> model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, paged_optax.paged_adamw8bit(1e-2), wrt=nnx.Param)
      >>> loss = lambda model: jnp.mean(model(jnp.ones((1, 64))) ** 2)
      >>> @nnx.jit(donate_argnums=(0, 1))
      ... def step(model, optimizer):
      ...   value, grads = nnx.value_and_grad(loss)(model)
      ...   optimizer.update(model, grads)
      ...   return value
      >>> losses = [step(model, optimizer) for _ in range(50)]
      >>> print(bool(losses[-1] < 0.1 * losses[0]))
      True
    """

    def update(self, model: Any, grads: Any, /, **kwargs: Any) -> Any:
        """Updates the model's parameters and the optimizer state.

        Args:
          model: the module whose parameters `grads` belong to.
          grads: what `nnx.grad` returned.
          **kwargs: passed to ``tx.update``.

        Returns:
          None, where `nnx.Optimizer` returns updates: in place there are none.
        """
        new_params, new_opt_state = apply_gradients(
            self.tx,
            nnx.as_pure(nnx.state(grads, self.wrt, graph=self.graph)),
            nnx.as_pure(self.opt_state),
            nnx.as_pure(nnx.state(model, self.wrt, graph=self.graph)),
            **nnx.as_pure(kwargs),
        )
        nnx.update(model, new_params)
        nnx.update(self.opt_state, nnx.state(new_opt_state, graph=self.graph))
        self.step[...] += 1
        return None


class ModelAndOptimizer(nnx.ModelAndOptimizer, Optimizer):  # pyright: ignore
    """`nnx.ModelAndOptimizer`, whose `update` steps the model's parameters in place."""


class TrainState(train_state.TrainState):
    """Linen's `TrainState`, whose `apply_gradients` steps the parameters in place.

    Donate it to the program (see `paged_optax.apply_gradients`), and what `tx` may be is said there
    too.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, paged_optax
      >>> from paged_optax.flax import TrainState
      >>> model, x = nn.Dense(64), jnp.ones((1, 64))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = paged_optax.paged_adamw8bit(1e-2)
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> @jax.jit(donate_argnums=0)
      ... def step(state):
      ...   loss = lambda params: jnp.mean(state.apply_fn({"params": params}, x) ** 2)
      ...   value, grads = jax.value_and_grad(loss)(state.params)
      ...   return state.apply_gradients(grads=grads), value
      >>> losses = []
      >>> for _ in range(50):
      ...   state, value = step(state)
      ...   losses.append(value)
      >>> print(bool(losses[-1] < 0.1 * losses[0]))
      True
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """A copy of itself after one step.

        Args:
          grads: gradients, with the structure of `params`. Of the collection that FP8 layers
            overwrite with their gradients, they are the new values, as in Flax.
          **kwargs: further fields to replace.
        """
        if OVERWRITE_WITH_GRADIENT not in grads:
            params, opt_state = apply_gradients(self.tx, grads, self.opt_state, self.params)
        else:
            stepped, opt_state = apply_gradients(
                self.tx, grads["params"], self.opt_state, self.params["params"]
            )
            overwritten = grads[OVERWRITE_WITH_GRADIENT]
            params = {"params": stepped, OVERWRITE_WITH_GRADIENT: overwritten}
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
