"""Steps in place: how new parameters come through the transformations around a paged optimizer.

optax passes updates from one transformation to the next, and in the end the caller adds them to the
parameters. In place there are no updates: the optimizer's call has written the new parameters
already. While an `InPlace` is active, a paged optimizer returns a `NewParam` for each leaf. To a
tree that is a leaf like any other, so transformations that pass updates on pass it on. One that
looks at it or changes it raises an error, while the program is traced.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import optax

_active: contextvars.ContextVar["InPlace | None"] = contextvars.ContextVar("active", default=None)

_REMEDY = (
    " Move other transformations before the paged optimizer (learning rate and weight decay are"
    " arguments of paged_adamw8bit and the like), use paged_optax.MultiSteps for optax.MultiSteps,"
    " or call tx.update and optax.apply_updates instead."
)
_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul"
    " rmatmul neg pos abs invert and rand or ror xor rxor lt le gt ge bool float int index len iter"
    " getitem array"
)


class NewParam:
    """What a paged optimizer returns in place of an update. To use it as an update is an error."""

    __slots__ = ("param", "value")

    def __init__(self, value: jax.Array, param: Any):
        self.value = value  # the new parameter
        self.param = param  # the old one, as the optimizer got it

    def __getattr__(self, name: str) -> NoReturn:
        if name != "__jax_array__" and name.startswith("__"):  # Python looks for those it may lack
            raise AttributeError(name)
        _refuse()

    def __repr__(self) -> str:
        return "<a parameter that a paged optimizer stepped in place, and no update>"


_USED = (
    "a transformation after a paged optimizer uses its updates (the traceback says which), but"
    f" apply_gradients steps parameters in place, so there are none.{_REMEDY}"
)


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    del args, kwargs
    raise TypeError(_USED)


for _name in _OPERATORS.split():
    setattr(NewParam, f"__{_name}__", _refuse)


class InPlace:
    """What the paged optimizers in one transformation did to their parameters."""

    def __init__(self):
        self._sent: list[NewParam] = []

    def send(self, values: Sequence[jax.Array], params: Sequence[Any]) -> list[NewParam]:
        """What an optimizer returns as the updates of `params`, whose new values are given."""
        sent = [NewParam(value, param) for value, param in zip(values, params, strict=True)]
        self._sent += sent
        return sent

    def receive(self, updates: Any, params: Any) -> tuple[Any, Any]:
        """What came of it.

        Args:
          updates: what the whole transformation returned.
          params: the parameters that it was given.

        Returns:
          The updates, with new parameters in the place of each `NewParam`; and a tree of bools like
          it, which says where these are.

        Raises:
          ValueError: if a `NewParam` is missing, or is not that of the parameter in its place.
        """
        arrived = set()

        def open_leaf(update: Any, param: Any) -> Any:
            if not isinstance(update, NewParam):
                return update
            if update.param is not param:
                raise ValueError(
                    "a transformation around the paged optimizer hands it other parameters than"
                    " apply_gradients got, such as copies in another dtype, or moves its updates to"
                    f" other leaves. In place it can only step the parameters themselves.{_REMEDY}"
                )
            arrived.add(id(update))
            return update.value

        is_new = jax.tree.map(lambda u: isinstance(u, NewParam), updates, is_leaf=_is_none)
        opened = jax.tree.map(open_leaf, updates, params, is_leaf=_is_none)
        if missing := len(self._sent) - len(arrived):
            raise ValueError(
                f"a transformation after a paged optimizer replaces {missing} of its"
                f" {len(self._sent)} updates, but apply_gradients steps parameters in"
                f" place.{_REMEDY}"
            )
        return opened, is_new

    def resend(self, results: Any, is_new: Any, params: Any) -> Any:
        """The updates that `receive` opened elsewhere, such as in a branch, for `params` here."""

        def resend_leaf(result: Any, is_new: bool, param: Any) -> Any:
            return self.send([result], [param])[0] if is_new else result

        return jax.tree.map(resend_leaf, results, is_new, params, is_leaf=_is_none)


def in_place() -> InPlace | None:
    """What a paged optimizer has to tell its new parameters, if it is to step in place."""
    return _active.get()


@contextlib.contextmanager
def stepping_in_place() -> Iterator[InPlace]:
    """While a transformation's update runs, whose paged optimizers are to step in place."""
    step = InPlace()
    token = _active.set(step)
    try:
        yield step
    finally:
        _active.reset(token)


@contextlib.contextmanager
def not_in_place() -> Iterator[None]:
    """While a paged optimizer's update runs whose updates others need."""
    token = _active.set(None)
    try:
        yield
    finally:
        _active.reset(token)


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    opt_state: optax.OptState,
    params: optax.Params,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """Takes a step in place: `tx.update` and `optax.apply_updates` without updates in between.

    A paged optimizer in `tx` reads gradients and parameters and writes the parameters, in one pass.
    The memory of the updates, and the time to write and read them, are saved. So is a rounding:
    parameters of 16 bits are rounded once, from float32. Leaves of other optimizers in `tx` take
    their updates as always.

    Donate the parameters and the optimizer state to the program, as in the example. XLA then gives
    the call the memory of the parameters. Parameters that are still needed afterwards are copied
    first, so the result is the same. Let the step take and return the parameters before the state:
    JAX pairs donated arguments with results of the same shape in their order, so with accumulators
    in the state (`MultiSteps`) another order costs a copy of both.

    Args:
      tx: any transformation in which a paged optimizer is the last one to touch the updates of its
        leaves: alone, at the end of an `optax.chain`, and inside of `optax.masked`,
        `optax.partition`, `optax.inject_hyperparams`, `MultiSteps` and `skip_non_finite`.
      grads: gradients, of the parameters' shapes. Their dtypes may be others than those of the
        parameters.
      opt_state: what ``tx.init`` or the last step returned; `tx.update` takes it as well.
      params: parameters.
      **extra_args: what ``tx.update`` takes besides.

    Returns:
      The new parameters, with the dtypes of the old ones, and the new state. They are equal to the
      bit to what ``tx.update`` and `optax.apply_updates` make of float32 parameters and gradients,
      where XLA contracts no multiplication and addition of the separate operations.

    Raises:
      TypeError: while tracing, if a transformation after the paged optimizer uses its updates.
      ValueError: while tracing, if one replaces them, or hands other parameters to the optimizer.
      As ``tx.update`` otherwise.

    Example:
      >>> import jax, jax.numpy as jnp, optax, paged_optax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), paged_optax.paged_adamw8bit(0.1))
      >>> loss = lambda params: jnp.mean((params["w"] - 1.0) ** 2)
      >>> params = {"w": jnp.zeros((64, 64))}
      >>> opt_state = tx.init(params)
      >>> @jax.jit(donate_argnums=(0, 1))
      ... def step(params, opt_state):
      ...   return paged_optax.apply_gradients(tx, jax.grad(loss)(params), opt_state, params)
      >>> for _ in range(100):
      ...   params, opt_state = step(params, opt_state)
      >>> print(bool(loss(params) < 1e-2))
      True
    """
    update = optax.with_extra_args_support(tx).update
    with stepping_in_place() as step:
        try:
            updates, opt_state = update(grads, opt_state, params, **extra_args)
        except (TypeError, ValueError) as error:
            if NewParam.__name__ in str(error):  # JAX says that it is no array
                raise TypeError(_USED) from error
            raise
    results, is_new = step.receive(updates, params)

    def apply(param: Any, result: Any, is_new: bool) -> Any:
        return result if is_new else optax.apply_updates(param, result)

    return jax.tree.map(apply, params, results, is_new, is_leaf=_is_none), opt_state


def _is_none(x: Any) -> bool:
    return x is None
