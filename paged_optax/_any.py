"""Any optax transformation, with its state outside of XLA's memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from ._any_step import LeafwiseStep, trace_init
from ._like_params import find_layout
from ._options import Options, Paging, Quantization, make_options
from ._refusals import guard
from ._refused import stopping_at_once
from ._skip import Skip, follow, skipping
from ._state import PagedState, Token, check_state, make_beside, new_token, paged_state
from ._transformation import count_on, flatten
from ._validate import check_choice, check_dtypes


@paged_state
class PagedArraysState(PagedState):
    """The part of `PagedTransformationState` that stands for the paged arrays."""


class PagedTransformationState(NamedTuple):
    """State of `paged`.

    Attributes:
      arrays: a `PagedArraysState`, which stands for the arrays outside of XLA's memory.
      inner_state: the wrapped state, with an `optax.MaskedNode` in the place of each of them.
    """

    arrays: PagedArraysState
    inner_state: Any


def paged(
    tx: optax.GradientTransformation,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of any optax transformation outside of XLA's memory.

    For optimizers that have no paged form of their own (`docs/optimizers.md` lists those that do,
    which are faster). Arrays of the state that look like a parameter are kept in the formats of
    `Quantization`, where `Paging` says. Each step loads them into XLA's memory, runs the
    equations of `tx` and stores them again: leaf after leaf, and small leaves together. So no more
    than about twice the state of the largest leaf is in XLA's memory at a time.

    An array looks like a parameter if its path in the state ends in the parameter's, and it has its
    shape. Everything else stays in the state as it is: counts, scalars, keys, factors of matrices.

    With ``Quantization("float32")`` updates are equal to those of `tx` alone. In the ``"ratio"``
    format a block without a negative value is stored as second moments are, with a relative
    precision; other blocks are stored as momentum is. NaN is stored as 0 except in float32. What
    `scale_by_paged_adam8bit` says of states that change in place holds here too.

    Args:
      tx: a transformation that updates every leaf by itself. What happens to the gradients alone
        before may mix leaves, such as `optax.clip_by_global_norm`.
      replay: whether the last step may be discarded and run again; doubles the arrays' memory.
      non_finite: ``"propagate"``, or ``"skip_step"`` to leave out a step with a gradient that is
        not finite.
      quantization: how the arrays are stored; see `Quantization`. The format of a parameter is that
        of all arrays that look like it.
      paging: where they live; see `Paging`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which takes the extra arguments of `tx`. Its
      state is a `PagedTransformationState`. `moments` returns the arrays as the field ``state``, in
      the tree of the wrapped state.

    Raises:
      ValueError: from `init`, if no array of the state looks like a parameter; from `update`, if
        `tx` mixes leaves, so that it cannot be run leaf by leaf, or needs the parameters for
        initial values that are not zero and gets none.
      TypeError: from `update`, for a state of another optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, optax, paged_optax
      >>> madgrad = paged_optax.paged(optax.contrib.madgrad(1e-3))
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), madgrad)
      >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}", [leaf.shape for leaf in jax.tree.leaves(state)])
      -0.0002 [(), (2,), ()]

      MADGRAD has two sums, and the first parameters:

      >>> print(len(jax.tree.leaves(paged_optax.moments(state).state)))
      6

    References:
      `The DeepMind JAX Ecosystem <http://github.com/google-deepmind>`_, 2020, of which optax is a
      part.

    .. note::
      Initial values that are not zero are made at the first step, of the parameters of that step.

      `apply_gradients` takes a step with it too, and saves no memory of updates.

      `reset` sets only arrays to zero that its masks name in the tree of the wrapped state: whether
      zero is where an array begins, you know of `tx`. For everything else make a new state.

      A step whose arrays are lost while it runs (the disk of their file fails) gives each parameter
      its whole update or none. The count does not advance, and the state is refused.
    """
    options = make_options(
        replay=replay, non_finite=non_finite, quantization=quantization, paging=paging
    )
    check_choice("non_finite", non_finite, ("propagate", "skip_step"))
    stepper = _Stepper(optax.with_extra_args_support(tx), options)

    def update_fn(updates, state, params=None, *, skip: Skip | None = None, **extra_args):
        return stepper.update(updates, state, params, skip, extra_args)

    wrapped = optax.GradientTransformationExtraArgs(stepper.init, update_fn)
    if non_finite == "propagate":
        return wrapped
    return skipping(wrapped, "step", f"non_finite={non_finite!r}")


class _Stepper:
    """Makes and steps states of `paged`."""

    def __init__(self, tx: optax.GradientTransformationExtraArgs, options: Options):
        self._tx = tx
        self._options = options

    def init(self, params: Any) -> Any:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        check_dtypes("parameter", leaves)
        guard(*(leaf for _, leaf in leaves if isinstance(leaf, Tracer)))
        layout = find_layout(self._tx.init, params)
        if leaves and not layout.paged:
            raise ValueError(
                "no array of the transformation's state looks like a parameter, so there is nothing"
                " to page: use the transformation as it is"
            )
        program = trace_init(self._tx.init, params)
        others = program.run_for([program.outputs[i] for i in layout.others])
        arrays = make_beside(
            [leaf for _, leaf in leaves],
            lambda: PagedArraysState(jnp.zeros([], jnp.int32), new_token(len(layout.paged))),
        )
        return PagedTransformationState(arrays, layout.others_alone(others))

    def update(
        self, updates: Any, state: Any, params: Any, skip: Skip | None, extra: dict[str, Any]
    ) -> tuple[Any, Any]:
        """The new updates, and the next state."""
        if not isinstance(state, PagedTransformationState):
            raise TypeError(
                f"the optimizer state is a {type(state).__name__}, not the PagedTransformationState"
                " that paged(...).init returns: start with init(params)"
            )
        token = check_state(state.arrays, PagedArraysState)
        paths, grads, treedef = flatten(updates, params)
        skip_step, _, _ = follow(skip, paths, grads)
        if not grads:
            return updates, state
        guard(*grads, *jax.tree.leaves(params))
        count, next_count = count_on(state.arrays.count, skip_step)
        with stopping_at_once(token) as stop:
            updates = jax.tree.unflatten(treedef, grads)
            step = LeafwiseStep(self._tx, self._options, updates, state.inner_state, params, extra)
            new_token, results, others = step.run(token, count)
            stop(new_token)
        next_count = jnp.where(step.is_left, state.arrays.count, next_count)
        arrays = PagedArraysState(next_count, Token(new_token))
        inner = jax.tree.unflatten(jax.tree.structure(state.inner_state), others)
        return jax.tree.unflatten(treedef, results), PagedTransformationState(arrays, inner)
