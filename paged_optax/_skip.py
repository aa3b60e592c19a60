"""A wrapper that skips gradients that are not finite, for everything inside it.

It looks at the gradients before any other transformation does, and tells the paged optimizers
inside by the extra argument ``skip``. They must know before the step: their moments change in
place, so the wrapper cannot undo a step afterwards.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._in_place import NewParam
from ._non_finite import add_counts, count_bad, count_elements, is_bad
from ._state import has_states, is_paged
from ._validate import check_choice

_is_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("is_inside", default=False)


class Skip(NamedTuple):
    """What a paged update is told: the extra argument ``skip``."""

    step: jax.Array | None = None  # bool (): whether to skip the step
    elements: dict[str, jax.Array] | None = None  # path -> bool like the gradient: which to skip


class SkipNonFiniteState(NamedTuple):
    """State of `skip_non_finite`, and of paged optimizers with a `non_finite` that skips.

    Inside `jax.shard_map` with ``check_vma=False``, and `jax.pmap`, an element of a gradient that
    devices have in common counts once per device.

    Attributes:
      skipped: int32 of shape (), the gradient elements, or steps, that were skipped so far.
      inner_state: the state of the optimizer.
    """

    skipped: jax.Array
    inner_state: Any


def skip_non_finite(
    tx: optax.GradientTransformation, mode: str
) -> optax.GradientTransformationExtraArgs:
    """Skips gradients that are NaN, infinite, or at least 2^64, for everything inside.

    Put it around the whole chain. It looks at the gradients before the chain does, so a single NaN
    cannot spoil the norm by which `optax.clip_by_global_norm` scales all of them, and all parts of
    an `optax.partition` skip together.

    Args:
      tx: any transformation; usually a chain with a paged optimizer in it.
      mode: what to skip. ``"step"``: the whole step. All updates are 0 and no state inside changes:
        counts, schedules, moments and momentum stay as they are. ``"element"``: single elements.
        Transformations inside see a gradient of 0 in their place. Paged optimizers skip exactly
        these elements: their direction is 0 and their moments stay. Other optimizers inside take
        the 0 for a gradient, so their moments decay.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its state is a `SkipNonFiniteState`, whose
      ``skipped`` counts steps or elements. Updates have the dtypes that `tx` gives them.

    Raises:
      ValueError: for another mode; from `init`, for ``"element"`` without a paged optimizer inside;
        from `update`, if a transformation inside renames or reshapes gradients, so that masks of
        elements do not fit them.
      TypeError: from `update`, for the state of another optimizer, or if a transformation inside
        does not pass extra arguments on to a paged optimizer.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> adamw = paged_optax.paged_adamw8bit(0.1, weight_decay=0.0)
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)
      >>> tx = paged_optax.skip_non_finite(tx, "element")
      >>> params = {"w": jnp.zeros(3)}
      >>> grads = {"w": jnp.array([3.0, jnp.nan, -4.0])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates["w"].round(3) + 0.0, state.skipped)
      [-0.1  0.   0.1] 1

    .. note::
      Inside `MultiSteps` it looks at the mean of a cycle. Around it, ``"step"`` leaves out the bad
      micro-step, and the cycle waits for another one; ``"element"`` puts a 0 into the mean, and the
      optimizer skips the elements that are bad in the last micro-step.

      `optax.apply_if_finite` looks at the updates instead, after every state has changed. Around a
      paged optimizer it needs ``replay=True``.
    """
    check_choice("mode", mode, ("step", "element"))
    return skipping(tx, mode, f"skip_non_finite(..., {mode!r})")


def skipping(
    tx: optax.GradientTransformation,
    mode: str,
    name: str,
    *,
    sends_masks: bool = True,
    makes_zeros: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """`skip_non_finite`, for a user who knows it as `name`.

    Args:
      tx: what to wrap.
      mode: ``"step"`` or ``"element"``.
      name: for messages.
      sends_masks: False if a paged optimizer in `tx` gets the gradients as they are, and skips
        elements by itself. Elements are then only counted, which saves a copy of the gradients.
      makes_zeros: False if the updates of a skipped step are zero already.
    """
    inner = optax.with_extra_args_support(tx)

    def init_fn(params):
        inner_state = inner.init(params)
        if mode == "element" and not has_states(inner_state):
            raise ValueError(
                f"there is no paged optimizer in {name}, and no other can skip elements: their"
                " moments would decay. Use mode 'step', or optax.zero_nans."
            )
        return SkipNonFiniteState(jnp.zeros([], jnp.int32), inner_state)

    def update_fn(updates, state, params=None, *, skip: Skip | None = None, **extra_args):
        if not isinstance(state, SkipNonFiniteState):
            raise TypeError(
                f"the optimizer state is a {type(state).__name__}, not the SkipNonFiniteState that"
                f" init returns for {name}. Make a new one with init(params)."
            )
        step, elements = check_skip(skip) or Skip()
        grads = [jnp.asarray(grad) for grad in jax.tree.leaves(updates)]
        if mode == "step":
            bad = count_bad(grads, jnp.any) > 0
            skipped = add_counts(state.skipped, bad.astype(jnp.int32))
            step = bad if step is None else step | bad
        else:
            skipped = add_counts(state.skipped, count_bad(grads, count_elements))
            if sends_masks:
                updates, elements = _take_out(updates, elements)
        with _inside():
            updates, inner_state = inner.update(
                updates, state.inner_state, params, skip=Skip(step, elements), **extra_args
            )
        if step is not None:
            inner_state = _choose(step, state.inner_state, inner_state)
            if makes_zeros:
                updates = jax.tree.map(functools.partial(_zero, step), updates)
        return updates, SkipNonFiniteState(skipped, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def follow(
    skip: Skip | None, paths: Sequence[str], grads: Sequence[jax.Array]
) -> tuple[jax.Array | None, list[jax.Array], bool]:
    """What a paged update has to do: whether to skip the step, and its gradients.

    Returns:
      A bool of shape () or None for a step that is not skipped; the gradients, with NaN where an
      element is to be skipped; and whether any may be.
    """
    skip = check_skip(skip)
    if skip is None:
        if _is_inside.get():
            raise TypeError(
                "skip_non_finite cannot tell this paged optimizer what to skip: a transformation"
                " between the two does not pass extra arguments on. Put skip_non_finite inside of"
                " that one; in place of optax.MultiSteps use paged_optax.MultiSteps. If it is your"
                " own, make it an optax.GradientTransformationExtraArgs, whose update takes"
                " **extra_args and hands them to the update inside."
            )
        return None, list(grads), False
    if skip.elements is None:
        return skip.step, list(grads), False
    results = []
    for path, grad in zip(paths, grads, strict=True):
        mask = skip.elements.get(path)
        if mask is None or mask.shape != grad.shape:
            raise ValueError(
                f"skip_non_finite in mode 'element' does not know gradient {path or 'leaf'} of"
                f" shape {grad.shape}: a transformation inside renames or reshapes gradients. Put"
                " skip_non_finite inside of that one, or use mode 'step'."
            )
        results.append(jnp.where(mask, jnp.asarray(jnp.nan, grad.dtype), grad))
    return skip.step, results, True


def check_skip(skip: Any) -> Skip | None:
    """The extra argument ``skip``, if it is one of ours."""
    if skip is None or isinstance(skip, Skip):
        return skip
    raise TypeError(
        f"update got skip={skip!r}, which paged optimizers take from paged_optax.skip_non_finite"
        " alone. To skip steps by a rule of your own put jax.lax.cond around tx.update."
    )


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    """While an update is traced, whose paged optimizers all have to be told what to skip."""
    token = _is_inside.set(True)
    try:
        yield
    finally:
        _is_inside.reset(token)


def _take_out(
    updates: optax.Updates, outer: dict[str, jax.Array] | None
) -> tuple[optax.Updates, dict[str, jax.Array]]:
    """Gradients with 0 for bad elements, and masks by path, which include those of `outer`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    masks, clean = {}, []
    for path, grad in leaves:
        name, grad = jax.tree_util.keystr(path), jnp.asarray(grad)
        mask = is_bad(grad)
        clean.append(jnp.where(mask, jnp.zeros_like(grad), grad))
        masks[name] = mask | outer[name] if outer and name in outer else mask
    return jax.tree.unflatten(treedef, clean), masks


def _zero(pred: jax.Array, update: Any) -> Any:
    """The update, or 0. A parameter that was stepped in place knows of the skip."""
    if isinstance(update, NewParam):
        return update
    return jnp.where(pred, jnp.zeros_like(update), update)


def _choose(pred: jax.Array, on_true: Any, on_false: Any) -> Any:
    """One tree or the other; paged states always of the second, because they know of the skip."""
    return jax.tree.map(
        lambda x, y: y if is_paged(y) else jnp.where(pred, x, y),
        on_true,
        on_false,
        is_leaf=is_paged,
    )
