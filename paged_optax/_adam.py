"""Adam and AdamW with 8-bit, paged moments, as optax gradient transformations."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from . import _partition
from ._check import record
from ._names import leaf_keys, number_paths, number_tree
from ._non_finite import add_counts, count_bad, count_elements
from ._options import Paging, Quantization
from ._state import ScaleByPagedAdam8bitState, SkipNonFiniteState, new_token
from ._tables import CODECS, FLOAT32, RATIO
from ._validate import (
    check_choice,
    check_dtypes,
    check_flag,
    check_options,
    check_range,
    check_rate,
    check_shapes,
    check_state,
)

_PARAM_ROUNDINGS = ("nearest", "stochastic", "compensated")  # enum ParamRounding in rounding.h
_NON_FINITE = ("propagate", "skip_element", "skip_step")


def scale_by_paged_adam8bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    nesterov: bool = False,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
) -> optax.GradientTransformation:
    r"""Rescales updates according to the Adam algorithm, with moments outside XLA's memory.

    `optax.scale_by_adam` with both moments stored in 8 bits (2.03 instead of 8 bytes per
    parameter), in memory that XLA's allocator does not own. For step :math:`t` and gradient
    :math:`g_t`,

    .. math::

      m_t &\leftarrow \beta_1 \cdot m_{t-1} + (1-\beta_1) \cdot g_t \\
      v_t &\leftarrow \beta_2 \cdot v_{t-1} + (1-\beta_2) \cdot g_t^2 \\
      u_t &\leftarrow \frac{m_t / (1-\beta_1^t)}
        {\sqrt{v_t / (1-\beta_2^t) + \bar\varepsilon} + \varepsilon}

    in float32; :math:`u_t` uses the new moments as they are before they are quantized, by default
    in a code whose rounding has mean zero (see `Quantization`). A gradient
    element that is not finite gives a NaN update for that element (or what `non_finite` says) and
    leaves its moments alone.

    Moments change in place: only the newest state can be updated. A state that was rolled back,
    forked or restored from a checkpoint is refused with an error, and nothing is overwritten. With
    ``replay=True`` moments are kept twice (4.06 bytes per parameter), and the state before the last
    step can be updated as well, for whoever runs a step and then drops its result
    (``optax.MultiSteps``, ``jnp.where`` over the state, a step that is tried again). On a GPU the
    error comes with the next call (the refused step returns an update of zero), because a step
    never waits for the device.

    Args:
      b1: decay rate of the first moment; a float or a traced scalar.
      b2: decay rate of the second moment; a float or a traced scalar.
      eps: added to the denominator outside of the square root.
      eps_root: added to the denominator inside the square root.
      nesterov: whether to use Nesterov momentum.
      replay: whether the last step may be discarded and run again; doubles the moments' memory.
      non_finite: what a gradient that is not finite, or has no finite square, does.
        ``"propagate"``: its own update is NaN. ``"skip_element"``: its own direction is 0.
        ``"skip_step"``: all updates are 0 and the state stays as it was, with its count and the
        schedules of this optimizer (not those of `optax.inject_hyperparams` around it). The other
        two read all gradients once more, and the state then is a `SkipNonFiniteState`, whose
        ``skipped`` counts the elements, or the steps. Elements count from 2^64 on, where squares
        may overflow. In `jax.pmap` and `jax.shard_map` copies of an element count each. Behind
        clipping by a global norm use ``"skip_step"``: one such element spoils the norm of all.
        Each of several paged optimizers (`optax.partition`) decides for its own parameters.
      quantization: how moments are stored; see `Quantization`.
      paging: where moments live; see `Paging`.

    Returns:
      An `optax.GradientTransformation`. Gradients may be float32, bfloat16 or float16, mixed in one
      tree, of any shape; updates have their dtypes.

    Raises:
      ValueError: for decay rates outside [0, 1) or negative eps (where given as Python numbers), or
        when gradients and parameters do not match.
      TypeError: for gradients of another dtype (float64, complex, integers).
      RuntimeError or ValueError: from the compiled update, when the state is not the newest, was
        released, or does not belong to these gradients, or when host memory is short.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = optax.chain(paged_optax.scale_by_paged_adam8bit(), optax.scale(-0.1))
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update({"w": jnp.full((64, 64), 3.0)}, tx.init(params))
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["w"][0, 0].round(4))
      0.9

    References:
      Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_,
      2014

      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022

    .. note::
      bitsandbytes erases the moments of an element whose gradient is not finite; here they stay.
    """
    adam = _Adam(b1, b2, eps, eps_root, nesterov, replay, non_finite, quantization, paging)
    return optax.GradientTransformation(*_compose(adam))


class _Adam(NamedTuple):
    """Arguments of `scale_by_paged_adam8bit`, in its order."""

    b1: Any
    b2: Any
    eps: Any
    eps_root: Any
    nesterov: bool
    replay: bool
    non_finite: str
    quantization: Quantization | None
    paging: Paging | None


class _Descent(NamedTuple):
    """What is left to do with Adam's direction, where the custom call does it."""

    learning_rate: optax.ScalarOrSchedule
    weight_decay: optax.ScalarOrSchedule
    mask: Any
    param_rounding: int


def _compose(
    adam: _Adam,
    descent: _Descent | None = None,
    tail: Sequence[optax.GradientTransformation] = (),
) -> optax.GradientTransformation:
    """Adam's direction, or with `descent` the update of the parameters, and then the tail.

    What `adam.non_finite` skips is skipped for all of them.
    """
    check_choice("non_finite", adam.non_finite, _NON_FINITE)
    first = _Link(adam, descent)
    if adam.non_finite == "propagate":
        tx = optax.GradientTransformation(first.init, first.update)
        return _chain(tx, *tail) if tail else tx
    others = optax.chain(*tail) if tail else optax.identity()

    def init_fn(params):
        other_states: Any = others.init(params)  # a tuple, perhaps an empty one
        inner_state = (first.init(params), *other_states)
        return SkipNonFiniteState(jnp.zeros([], jnp.int32), inner_state)

    def update_fn(updates, state, params=None):
        if not isinstance(state, SkipNonFiniteState):
            raise TypeError(
                f"the optimizer state is a {type(state).__name__}, not the SkipNonFiniteState that"
                f" init returns for non_finite={adam.non_finite!r}. Make a new one with"
                " init(params)."
            )
        _check_links(state.inner_state, 1 + len(tail))
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        check_dtypes("gradient", leaves)
        grads = [jnp.asarray(grad) for _, grad in leaves]
        first_state, *other_states = state.inner_state
        skip = None
        if adam.non_finite == "skip_element":
            skipped = add_counts(state.skipped, count_bad(grads, count_elements))
        else:
            skip = count_bad(grads, jnp.any) > 0
            skipped = add_counts(state.skipped, skip.astype(jnp.int32))
        updates, first_state = first.update(updates, first_state, params, skip)
        new_states: Any
        updates, new_states = others.update(updates, tuple(other_states), params)
        if skip is not None and tail:
            updates = jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), updates)
            new_states = jax.tree.map(
                lambda new, old: jnp.where(skip, old, new), new_states, tuple(other_states)
            )
        return updates, SkipNonFiniteState(skipped, (first_state, *new_states))

    return optax.GradientTransformation(init_fn, update_fn)


def _chain(*links: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.chain`, which says what is wrong with a state that was made with other options."""
    tx = optax.chain(*links)

    def update_fn(updates, state, params=None):
        _check_links(state, len(links))
        return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update_fn)


def _check_links(state: Any, num_links: int) -> None:
    if not isinstance(state, tuple) or len(state) != num_links or hasattr(state, "_fields"):
        raise TypeError(
            f"the optimizer state is a {type(state).__name__} that this optimizer's init did not"
            " return; was it made with another param_rounding or non_finite? Start with"
            " init(params)."
        )


class _Link:
    """The transformation that makes the custom call."""

    def __init__(self, adam: _Adam, descent: _Descent | None):
        check_options(adam.quantization, adam.paging)
        check_range("b1", adam.b1, below=1.0)
        check_range("b2", adam.b2, below=1.0)
        check_range("eps", adam.eps)
        check_range("eps_root", adam.eps_root)
        self._adam, self._descent = adam, descent
        self._quantization = adam.quantization or Quantization()
        self._paging = adam.paging or Paging()

    def init(self, params: optax.Params) -> ScaleByPagedAdam8bitState:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        check_dtypes("parameter", leaves)
        _partition.guard(*(leaf for _, leaf in leaves if isinstance(leaf, Tracer)))
        return ScaleByPagedAdam8bitState(
            count=jnp.zeros([], jnp.int32), token=new_token(num_leaves=len(leaves))
        )

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        skip: jax.Array | None = None,
    ) -> tuple[optax.Updates, ScaleByPagedAdam8bitState]:
        """One step; where the bool `skip` is True, updates of zero and the state as it was."""
        adam, descent, paging = self._adam, self._descent, self._paging
        check_state(state)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        check_dtypes("gradient", leaves)
        check_shapes(leaves, params)
        count, next_count = state.count, jnp.asarray(optax.safe_increment(state.count))
        if skip is not None:
            count, next_count = jnp.where(skip, -1, count), jnp.where(skip, count, next_count)
        if not leaves:
            return updates, ScaleByPagedAdam8bitState(next_count, state.token)
        paths, grads = zip(
            *((jax.tree_util.keystr(path), grad) for path, grad in leaves), strict=True
        )
        hyperparams = [adam.b1, adam.b2, adam.eps, adam.eps_root]
        decayed, keys = (), ()
        if descent is not None:
            if params is None:
                raise ValueError(
                    "param_rounding other than 'nearest' needs the parameters: pass them to update"
                    " as its third argument"
                )
            check_dtypes("parameter", jax.tree_util.tree_leaves_with_path(params))
            for name in ("learning_rate", "weight_decay"):
                value = getattr(descent, name)
                if callable(value):
                    value = value(state.count)
                    check_rate(f"{name}, from its schedule,", value)
                hyperparams.append(value)
            decayed = _decayed(descent.mask, updates)
        codec = CODECS[self._quantization.codec]
        codecs = tuple(
            codec if np.size(g) >= self._quantization.min_size else FLOAT32 for g in grads
        )
        if descent is not None or RATIO in codecs:
            keys = leaf_keys(paths, self._quantization.seed)
        token, scaled = _partition.update(
            state.token,
            count,
            _stack(hyperparams),
            [jnp.asarray(grad) for grad in grads],
            [jnp.asarray(param) for param in jax.tree.leaves(params)],
            codecs=codecs,
            decayed=decayed,
            keys=keys,
            nesterov=bool(adam.nesterov),
            param_rounding=0 if descent is None else descent.param_rounding,
            replay=bool(adam.replay),
            skip_elements=adam.non_finite == "skip_element",
            tree=number_tree(paths, treedef),
            paths=number_paths(paths),
            device_bytes=-1 if paging.device_bytes is None else paging.device_bytes,
            headroom_bytes=paging.headroom_bytes,
            pinned=paging.memory == "pinned",
            # Where the program runs from must not matter later: a jitted step keeps the text.
            directory="" if paging.directory is None else os.path.abspath(paging.directory),
        )
        if descent is not None:
            record(scaled)
        return jax.tree.unflatten(treedef, scaled), ScaleByPagedAdam8bitState(next_count, token)


def _decayed(mask: Any, updates: optax.Updates) -> tuple[bool, ...]:
    """Of each leaf, whether weight decay applies."""
    if mask is None:
        return (True,) * len(jax.tree.leaves(updates))
    tree = mask(updates) if callable(mask) else mask
    return tuple(
        jax.tree.leaves(
            jax.tree.map(
                lambda m, part: jax.tree.map(lambda _: check_flag("mask", m), part), tree, updates
            )
        )
    )


def paged_adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    replay: bool = False,
    param_rounding: str = "nearest",
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with weight decay and 8-bit, paged moments: `optax.adamw` for less memory.

    The chain of `scale_by_paged_adam8bit`, `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`, so the decay acts on the parameters before the step, as in
    optax: :math:`\theta_t \leftarrow \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})`. With
    a `param_rounding` other than ``"nearest"`` it is one transformation that does the same in one
    pass, in float32, and rounds once.

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator outside of the square root.
      eps_root: added to the denominator inside the square root.
      weight_decay: strength of the weight decay; it is multiplied by the learning rate.
      mask: a tree with the same structure as (or a prefix of) the parameters, or a callable that
        returns one; True where weight decay applies.
      nesterov: whether to use Nesterov momentum.
      replay: whether the last step may be discarded and run again; doubles the moments' memory.
      param_rounding: how parameters in bfloat16 and float16 are rounded, which have too few digits
        for small steps. ``"nearest"``: by whoever adds the update, as with optax, and steps below
        half of a parameter's last digit are lost. ``"stochastic"``: at random, with the exact value
        as the mean. ``"compensated"``: to nearest, with 8 further bits of a float32 master weight
        kept beside the moments (3.05 instead of 2.03 bytes per parameter, if any is of 16 bits).
        With the latter two, `update` needs the parameters, and nothing behind this transformation
        may change its updates: see `check_last`.
      non_finite: ``"propagate"``, ``"skip_element"`` or ``"skip_step"``; see
        `scale_by_paged_adam8bit`.
      quantization: how moments are stored; see `Quantization`.
      paging: where moments live; see `Paging`.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`; ValueError where parameters are rounded and not passed.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from paged_optax import paged_adamw8bit
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(0.1, weight_decay=0.01))
      >>> loss = lambda params: jnp.mean((params["w"] - 1.0) ** 2)
      >>> params = {"w": jnp.zeros((64, 64))}
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...   return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...   params, state = step(params, state)
      >>> print(bool(loss(params) < 1e-2))
      True

    References:
      Loshchilov & Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019

      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022

    .. note::
      bitsandbytes applies the weight decay after the update, to the new parameters; the
      difference is :math:`\alpha^2 \lambda u_t` per step.

      Where a GPU refuses a step (see `scale_by_paged_adam8bit`), the weight decay still acts.
    """
    if (
        isinstance(weight_decay, type | np.dtype)
        or hasattr(weight_decay, "dtype")
        and callable(weight_decay)
    ):
        raise TypeError(
            f"weight_decay is {weight_decay}, a dtype: optax.adamw has mu_dtype in this place,"
            " which paged optimizers do not take (moments have 8 bits). Pass weight_decay and mask"
            " by keyword."
        )
    adam = _Adam(b1, b2, eps, eps_root, nesterov, replay, non_finite, quantization, paging)
    check_choice("param_rounding", param_rounding, _PARAM_ROUNDINGS)
    check_rate("learning_rate", learning_rate)
    check_rate("weight_decay", weight_decay)
    if param_rounding == "nearest":
        tail = [
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        ]
        return optax.with_extra_args_support(_compose(adam, tail=tail))
    rounding = _PARAM_ROUNDINGS.index(param_rounding)
    return optax.with_extra_args_support(
        _compose(adam, _Descent(learning_rate, weight_decay, mask, rounding))
    )


def paged_adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    nesterov: bool = False,
    replay: bool = False,
    param_rounding: str = "nearest",
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with 8-bit, paged moments: `optax.adam` for less memory.

    The chain of `scale_by_paged_adam8bit` and `optax.scale_by_learning_rate`, or one transformation
    that does the same, as in `paged_adamw8bit`.

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator outside of the square root.
      eps_root: added to the denominator inside the square root.
      nesterov: whether to use Nesterov momentum.
      replay: whether the last step may be discarded and run again; doubles the moments' memory.
      param_rounding: ``"nearest"``, ``"stochastic"`` or ``"compensated"``; see `paged_adamw8bit`.
      non_finite: ``"propagate"``, ``"skip_element"`` or ``"skip_step"``; see
        `scale_by_paged_adam8bit`.
      quantization: how moments are stored; see `Quantization`.
      paging: where moments live; see `Paging`.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`; ValueError where parameters are rounded and not passed.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.paged_adam8bit(learning_rate=0.1)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.1000

      In bfloat16 the number below 1 is 0.99609. Steps of 0.001 are lost, or add up:

      >>> for param_rounding in ("nearest", "compensated"):
      ...   tx = paged_optax.paged_adam8bit(0.001, param_rounding=param_rounding)
      ...   params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
      ...   state = tx.init(params)
      ...   for _ in range(100):
      ...     updates, state = tx.update({"w": jnp.ones_like(params["w"])}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...   print(param_rounding, params["w"][0, 0])
      nearest 1
      compensated 0.898438

    References:
      Kingma & Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014
    """
    adam = _Adam(b1, b2, eps, eps_root, nesterov, replay, non_finite, quantization, paging)
    check_choice("param_rounding", param_rounding, _PARAM_ROUNDINGS)
    check_rate("learning_rate", learning_rate)
    if param_rounding == "nearest":
        tail = [optax.scale_by_learning_rate(learning_rate)]
        return optax.with_extra_args_support(_compose(adam, tail=tail))
    rounding = _PARAM_ROUNDINGS.index(param_rounding)
    return optax.with_extra_args_support(
        _compose(adam, _Descent(learning_rate, 0.0, None, rounding))
    )


def _stack(scalars: list[jax.typing.ArrayLike]) -> jax.typing.ArrayLike:
    """Hyperparameters as the operand that the kernel reads: a constant unless one is traced."""
    if any(isinstance(x, jax.Array) for x in scalars):
        return jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars])
    return np.array(scalars, np.float32)
