"""Gradient accumulation that runs the wrapped optimizer once per cycle.

Moments change in place, so a paged optimizer must not run at micro-steps that discard its result.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from ._in_place import in_place, stepping_in_place


class MultiSteps:
    r"""Accumulates gradients over several micro-steps: `optax.MultiSteps` without wasted updates.

    In each cycle of :math:`k` micro-steps the first :math:`k - 1` return updates of zero. The last
    one returns the updates of the wrapped optimizer for the mean (or the sum) of the gradients,

    .. math::

      a_n = a_{n-1} + \frac{g_n - a_{n-1}}{n}, \quad n = 1, \dots, k, \quad a_0 = 0.

    `optax.MultiSteps` runs the wrapped optimizer at every micro-step and throws :math:`k - 1`
    results away. Here the optimizer is in a branch of `jax.lax.cond` and runs once per cycle. A
    paged one needs that, because its moments change in place; others take less time.

    Constructor, methods and state (`optax.MultiStepsState`) are those of `optax.MultiSteps`. So are
    the numbers, up to rounding, which depends on how XLA fuses operations.

    Args:
      opt: the optimizer to wrap: any `optax.GradientTransformation`. It gets the extra arguments of
        the last micro-step in a cycle.
      every_k_schedule: micro-steps in a cycle, at least 1: an int, or a function from the number
        of cycles so far (int32 of shape ()) to an integer scalar. It may not change within a cycle.
      use_grad_mean: whether the optimizer gets the mean of the gradients, or else their sum.
      should_skip_update_fn: ``f(gradients, gradient_step, params)`` returns a bool of shape () and
        a tree. Where the bool is True, the micro-step changes nothing but ``skip_state``, which
        becomes that tree: `optax.skip_not_finite`, or `optax.skip_large_updates` with its limit.
      accumulator_dtype: dtype of the accumulated gradients; None for each parameter's own. For
        complex parameters it is promoted to a complex dtype.

    Returns:
      An object with the `init` and `update` of a gradient transformation. Where optax wants a
      tuple of functions, as in `optax.chain`, pass what `gradient_transformation` returns.

    Raises:
      ValueError: for an int below 1 as `every_k_schedule`; from `update`, when
        `should_skip_update_fn` returns anything but a boolean scalar.
      TypeError: from `update`, when `every_k_schedule` gives anything but an integer scalar.

    Example:
      >>> import jax, jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.MultiSteps(paged_optax.paged_adamw8bit(0.1), every_k_schedule=3)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> state = tx.init(params)
      >>> for gradient in (1.0, 2.0, 6.0):
      ...   grads = {"w": jnp.full((64, 64), gradient)}
      ...   updates, state = jax.jit(tx.update)(grads, state, params)
      ...   print(f"{updates['w'][0, 0]:.2f}", tx.has_updated(state))
      0.00 False
      0.00 False
      -0.10 True
      >>> print(paged_optax.moments(state).mu["w"][0, 0].round(4))  # 0.1 times the mean
      0.3

    References:
      Welford, `Note on a Method for Calculating Corrected Sums of Squares and Products
      <https://doi.org/10.1080/00401706.1962.10490022>`_, 1962

    .. note::
      Deviations from `optax.MultiSteps`:

      - Updates within a cycle are zero, also where the optimizer would return NaN.
      - A gradient that is not finite spoils its own cycle and no later one.
      - After a cycle ``acc_grads`` still holds what the optimizer got; the next micro-step starts
        from zero.
      - A cycle that is already longer than `every_k_schedule` says ends at once.
      - Outside of `jax.jit` no call compiles a branch.
      - `gradient_transformation` passes extra arguments on.

      On a GPU a micro-step with a paged optimizer returns only when the device has reached it,
      because XLA chooses the branch on the host. With other optimizers XLA:GPU may evaluate both
      branches and take as long as with `optax.MultiSteps`. Under `jax.vmap` over the state JAX
      evaluates both branches, and a paged optimizer is refused.
    """

    def __init__(
        self,
        opt: optax.GradientTransformation,
        every_k_schedule: int | Callable[[jax.Array], jax.typing.ArrayLike],
        use_grad_mean: bool = True,
        should_skip_update_fn: optax.ShouldSkipUpdateFunction | None = None,
        accumulator_dtype: jax.typing.DTypeLike | None = jnp.float32,
    ):
        if isinstance(every_k_schedule, int) and every_k_schedule < 1:
            raise ValueError(
                f"every_k_schedule is {every_k_schedule}; a cycle has at least 1 micro-step"
            )
        self._opt = optax.with_extra_args_support(opt)
        self._every_k_schedule = every_k_schedule
        self._use_grad_mean = use_grad_mean
        self._should_skip_update_fn = should_skip_update_fn
        self._accumulator_dtype = accumulator_dtype

    @property
    def inner_opt(self) -> optax.GradientTransformationExtraArgs:
        """The wrapped optimizer."""
        return self._opt

    def init(self, params: optax.Params) -> optax.MultiStepsState:
        """Makes the state of a first cycle.

        Args:
          params: the parameters.

        Returns:
          An `optax.MultiStepsState`: ``mini_step``, micro-steps in this cycle so far, and
          ``gradient_step``, cycles so far (int32 of shape ()); ``inner_opt_state``; ``acc_grads``,
          the mean or sum in this cycle so far, of the parameters' shapes; ``skip_state``.
        """
        gradient_step = jnp.zeros([], jnp.int32)
        skip_state: Any = ()
        if self._should_skip_update_fn is not None:
            zeros = _zeros_like(params)
            _, skip_state = _check_skip(self._should_skip_update_fn(zeros, gradient_step, params))
        return optax.MultiStepsState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=gradient_step,
            inner_opt_state=self._opt.init(params),
            acc_grads=jax.tree.map(self._new_accumulator, params),
            skip_state=skip_state,
        )

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.MultiStepsState]:
        """Takes the gradients of one micro-step.

        Args:
          updates: gradients, of the parameters' shapes.
          state: the `optax.MultiStepsState` that `init` or the last `update` returned.
          params: the parameters, for optimizers that use them.
          **extra_args: passed to the wrapped optimizer.

        Returns:
          The updates of the wrapped optimizer where this micro-step ends a cycle, otherwise zeros
          with their shapes and dtypes; and the new state.
        """
        is_last = state.mini_step >= self._get_k_steps(state.gradient_step) - 1
        mini_step = optax.safe_increment(state.mini_step)
        acc_grads = self._accumulate(updates, state)
        skip_state = state.skip_state
        if self._should_skip_update_fn is not None:
            answer = self._should_skip_update_fn(updates, state.gradient_step, params)
            skip, skip_state = _check_skip(answer)
            is_last = jnp.logical_and(is_last, jnp.logical_not(skip))
            mini_step = jnp.where(skip, state.mini_step, mini_step)
            acc_grads = jax.tree.map(
                lambda new, old: jnp.where(skip, old.astype(new.dtype), new),
                acc_grads,
                state.acc_grads,
            )

        # Accumulators stay out of the branches, where XLA would copy them.
        new_updates, inner_state = self._update_inner(
            is_last, acc_grads, updates, state.inner_opt_state, params, extra_args
        )
        return new_updates, optax.MultiStepsState(
            mini_step=jnp.where(is_last, 0, mini_step),
            gradient_step=jnp.where(
                is_last, optax.safe_increment(state.gradient_step), state.gradient_step
            ),
            inner_opt_state=inner_state,
            acc_grads=_cast_like(acc_grads, state.acc_grads),
            skip_state=skip_state,
        )

    def has_updated(self, state: optax.MultiStepsState) -> jax.Array:
        """Whether the micro-step that returned this state ended a cycle: a bool of shape ()."""
        return jnp.logical_and(jnp.equal(state.mini_step, 0), jnp.greater(state.gradient_step, 0))

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """The same as an `optax.GradientTransformationExtraArgs`, for `optax.chain` and others."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)

    def _update_inner(self, is_last, grads, like, inner_state, params, extra_args):
        """The wrapped optimizer's update where a cycle ends; its gradients are cast like `like`."""
        outer = in_place()
        is_new: Any = None  # where the optimizer steps in place

        def step(grads, inner_state, params):
            nonlocal is_new
            with contextlib.nullcontext() if outer is None else stepping_in_place() as inner:
                new_updates, new_state = self._opt.update(
                    _cast_like(grads, like), inner_state, params, **extra_args
                )
            if inner is not None:
                new_updates, is_new = inner.receive(new_updates, params)
            return new_updates, _cast_like(new_state, inner_state)

        def wait(grads, inner_state, params):
            new_updates, _ = jax.eval_shape(step, grads, inner_state, params)
            return keep(new_updates, params), inner_state

        def keep(new_updates, params):
            """Parameters where they are stepped in place, and updates of zero elsewhere."""
            if outer is None:
                return _zeros_like(new_updates)
            return jax.tree.map(
                lambda update, new, param: jnp.asarray(param) if new else jnp.zeros_like(update),
                new_updates,
                is_new,
                params,
            )

        results, inner_state = _cond(is_last, step, wait, grads, inner_state, params)
        return results if outer is None else outer.resend(results, is_new, params), inner_state

    def _get_k_steps(self, gradient_step: jax.Array) -> jax.Array:
        k_steps = self._every_k_schedule
        k_steps = jnp.asarray(k_steps(gradient_step) if callable(k_steps) else k_steps)
        if not jnp.issubdtype(k_steps.dtype, jnp.integer) or k_steps.shape != ():
            raise TypeError(
                f"every_k_schedule gives {k_steps.dtype}{list(k_steps.shape)}; it must give the"
                " number of micro-steps as an integer scalar"
            )
        return k_steps.astype(jnp.int32)

    def _new_accumulator(self, param: jax.typing.ArrayLike) -> jax.Array:
        dtype = self._accumulator_dtype
        if dtype is not None and jnp.iscomplexobj(param):
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.promote_types(dtype, jnp.asarray(param).dtype)
        return jnp.zeros_like(param, dtype=dtype)

    def _accumulate(self, grads: optax.Updates, state: optax.MultiStepsState) -> optax.Updates:
        def add(grad, acc):
            # The last cycle's sum is still there; it may be infinite or NaN.
            acc = jnp.where(state.mini_step == 0, jnp.zeros_like(acc), acc)
            if self._use_grad_mean:
                return acc + (grad - acc) / (state.mini_step + 1)
            return acc + grad

        # Gradients may have another dtype than the accumulators, and the counter has one.
        with jax.numpy_dtype_promotion("standard"):
            return jax.tree.map(add, grads, state.acc_grads)


def _check_skip(answer: tuple[jax.typing.ArrayLike, Any]) -> tuple[jax.Array, Any]:
    """What `should_skip_update_fn` returned."""
    skip, skip_state = answer
    skip = jnp.asarray(skip)
    if skip.dtype != jnp.bool_ or skip.shape != ():
        raise ValueError(
            f"should_skip_update_fn returned {skip.dtype}{list(skip.shape)} and a tree; the"
            " first must be a boolean scalar"
        )
    return skip, skip_state


def _cond(
    pred: jax.typing.ArrayLike, true_fun: Callable, false_fun: Callable, *operands: Any
) -> Any:
    """`jax.lax.cond`, which compiles its branches at each call where nothing is traced."""
    if isinstance(pred, Tracer):
        return jax.lax.cond(pred, true_fun, false_fun, *operands)
    return (true_fun if pred else false_fun)(*operands)


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.asarray(y).dtype), tree, like)
