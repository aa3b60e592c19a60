"""A check that no transformation after a paged optimizer changes its updates."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._memory import release
from ._state import find_states, has_states, read_token
from ._transformation import observer


class _Record:
    """The updates that the paged optimizers of one state return, in this thread."""

    def __init__(self):
        self.updates: list[np.ndarray] = []
        self._handles: set[int] = set()

    def start_step(self, state: Any) -> None:
        """Begins anew, for the optimizers whose states are inside of `state`."""
        self.updates.clear()
        self._handles = {read_token(paged)[0] for paged in find_states(state)}

    def observe(self, token: jax.Array, updates: list[jax.Array]) -> None:
        jax.debug.callback(self._append, token, *updates)

    def _append(self, token: Any, *updates: Any) -> None:
        if int(token[0]) in self._handles:
            self.updates.extend(np.asarray(update).ravel() for update in updates)


@contextlib.contextmanager
def _recording() -> Iterator[_Record]:
    record = _Record()
    before = observer.set(record.observe)
    try:
        yield record
    finally:
        observer.reset(before)


def check_last(
    tx: optax.GradientTransformation, params: optax.Params, max_steps: int = 64, **extra_args: Any
) -> None:
    """Checks that nothing in `tx` changes the updates that its paged optimizers return.

    With ``param_rounding="stochastic"`` or ``"compensated"`` updates are made so that parameters
    land exactly where they were rounded to. A transformation after the paged optimizer, such as
    `optax.scale`, `optax.clip` or `optax.ema`, would let them land elsewhere: small updates would
    get lost again, and residuals would belong to other parameters. Wrappers that pass updates on
    or replace all of them by zeros, such as `optax.MultiSteps`, `optax.masked`, `optax.partition`
    and `optax.apply_if_finite`, are fine.

    Takes a few steps with random parameters and gradients, outside of `jax.jit`, and compares what
    the paged optimizers return with what `tx` returns. The memory of these steps is freed again. It
    cannot notice what does nothing in three such steps, such as `optax.clip(1.0)` after a small
    learning rate, or a schedule that starts with 1.

    Args:
      tx: the whole optimizer, as the training loop calls it.
      params: parameters. Only structure, shapes and dtypes matter, so those of a smaller model or
        `jax.ShapeDtypeStruct` will do.
      max_steps: how many steps to take at most to see three that update anything.
      **extra_args: what else to pass to ``tx.update``, such as ``value=1.0`` for
        `optax.contrib.reduce_on_plateau`.

    Raises:
      ValueError: if `tx` changes updates of a paged optimizer, has none that rounds parameters, or
        updates nothing within `max_steps` steps; or if the updates are NaN.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
      >>> adamw = paged_optax.paged_adamw8bit(1e-3, param_rounding="compensated")
      >>> paged_optax.check_last(optax.chain(optax.clip_by_global_norm(1.0), adamw), params)
      >>> try:
      ...   paged_optax.check_last(optax.chain(adamw, optax.scale(0.5)), params)
      ... except ValueError as error:
      ...   print(str(error).split(":")[0])
      something after the paged optimizer changes its updates
    """
    rng = np.random.default_rng(0)
    num_compared = 0
    params = jax.tree.map(lambda p: _random_like(p, rng), params)
    update = optax.with_extra_args_support(tx).update
    state = tx.init(params)
    if not has_states(state):
        raise ValueError("there is no paged optimizer in tx: nothing in it has to be last")
    try:
        # Without jit: a step that was traced before would have nothing to record, and one that is
        # traced here would go on recording.
        with jax.disable_jit(), _recording() as record:
            for _ in range(max_steps):
                record.start_step(state)
                grads = jax.tree.map(lambda p: _random_like(p, rng), params)
                updates, state = update(grads, state, params, **extra_args)
                jax.effects_barrier()
                num_compared += _compare(record.updates, updates)
                if num_compared == 3:  # the first may be special: optax.ema passes it on
                    return
    finally:
        release(state)
    if not num_compared:
        raise ValueError(
            f"within {max_steps} steps no paged optimizer returned an update that it had rounded."
            " Is param_rounding 'nearest'? Then nothing has to be last. Or pass a larger max_steps,"
            " if it accumulates longer or starts with a learning rate of 0."
        )


def _compare(records: list[np.ndarray], updates: Any) -> bool:
    """Whether a step had updates to compare; raises if they are not what was recorded."""
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(updates)]
    if any(np.isnan(record.astype(np.float32)).any() for record in records):
        raise ValueError(
            "the paged optimizer's own updates are NaN; with optax.inject_hyperparams and bfloat16"
            " parameters pass hyperparam_dtype=jnp.float32"
        )
    if not any(leaf.any() for leaf in leaves):
        return False
    missing, total = _count_missing(records, leaves), sum(record.size for record in records)
    if missing:
        raise ValueError(
            f"something after the paged optimizer changes its updates: {missing} of {total}"
            " elements that it returned are not in the updates of the whole chain. Parameters then"
            " do not land where they were rounded to; move the other transformations before it, or"
            " use param_rounding='nearest'."
        )
    return total > 0


def _random_like(leaf: Any, rng: np.random.Generator) -> jax.Array:
    """Numbers of many magnitudes, so that any step moves some parameters at once."""
    shape = np.shape(leaf)
    values = rng.standard_normal(shape) * 10 ** rng.uniform(-7, 0, shape)
    return jnp.asarray(values, leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype)


def _count_missing(records: list[np.ndarray], leaves: list[np.ndarray]) -> int:
    """How many recorded elements are not among those of the leaves, counted with multiplicity.

    Values are compared and not places, since wrappers may split, join and reshape trees.
    """
    missing = 0
    for dtype in {r.dtype for r in records}:
        values, wanted = _count([r for r in records if r.dtype == dtype])
        there, found = _count([leaf for leaf in leaves if leaf.dtype == dtype])
        found = dict(zip(there.tolist(), found.tolist(), strict=True))
        missing += sum(
            max(0, n - found.get(value, 0))
            for value, n in zip(values.tolist(), wanted.tolist(), strict=True)
        )
    return missing


def _count(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The values in the arrays, and how often each is there."""
    if not arrays:
        return np.zeros(0), np.zeros(0, np.int64)
    return np.unique(np.concatenate(arrays).astype(np.float32), return_counts=True)
