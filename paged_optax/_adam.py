"""Adam and AdamW with 8-bit, paged moments, as optax gradient transformations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from . import _partition
from ._ffi import TOKEN_SHAPE
from ._options import Paging, Quantization
from ._state import (
    CODECS,
    FLOAT32,
    RATIO,
    ScaleByPagedAdam8bitState,
    leaf_keys,
    name_paths,
    name_tree,
    new_token,
)

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def scale_by_paged_adam8bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    nesterov: bool = False,
    replay: bool = False,
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

    in float32; :math:`u_t` uses the new moments as they are before they are quantized. A gradient
    element that is not finite gives a NaN update for that element and leaves its moments alone.

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
    _check_options(quantization, paging)
    _check_range("b1", b1, below=1.0)
    _check_range("b2", b2, below=1.0)
    _check_range("eps", eps)
    _check_range("eps_root", eps_root)
    quantization = Quantization() if quantization is None else quantization
    paging = Paging() if paging is None else paging

    def init_fn(params):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        _check_dtypes("parameter", leaves)
        _partition.guard(*(leaf for _, leaf in leaves if isinstance(leaf, Tracer)))
        return ScaleByPagedAdam8bitState(
            count=jnp.zeros([], jnp.int32), token=new_token(num_leaves=len(leaves))
        )

    def update_fn(updates, state, params=None):
        _check_state(state)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        _check_dtypes("gradient", leaves)
        _check_shapes(leaves, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        if not leaves:
            return updates, ScaleByPagedAdam8bitState(count, state.token)
        paths, grads = zip(
            *((jax.tree_util.keystr(path), grad) for path, grad in leaves), strict=True
        )
        codec = CODECS[quantization.codec]
        token, scaled = _partition.update(
            state.token,
            state.count,
            _stack([b1, b2, eps, eps_root]),
            [jnp.asarray(grad) for grad in grads],
            jax.tree.leaves(params),
            codecs=tuple(codec if np.size(g) >= quantization.min_size else FLOAT32 for g in grads),
            decayed=(),
            keys=leaf_keys(paths, quantization.seed) if codec == RATIO else (),
            nesterov=bool(nesterov),
            param_rounding=0,
            replay=bool(replay),
            skip_elements=False,
            tree=name_tree(paths, treedef),
            paths=name_paths(paths),
            device_bytes=-1 if paging.device_bytes is None else paging.device_bytes,
            headroom_bytes=paging.headroom_bytes,
        )
        return jax.tree.unflatten(treedef, scaled), ScaleByPagedAdam8bitState(count, token)

    return optax.GradientTransformation(init_fn, update_fn)


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
    quantization: Quantization | None = None,
    paging: Paging | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with weight decay and 8-bit, paged moments: `optax.adamw` for less memory.

    The chain of `scale_by_paged_adam8bit`, `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`, so the decay acts on the parameters before the step, as in
    optax: :math:`\theta_t \leftarrow \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})`.

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
      quantization: how moments are stored; see `Quantization`.
      paging: where moments live; see `Paging`.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`.

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
    return optax.chain(
        scale_by_paged_adam8bit(
            b1,
            b2,
            eps,
            eps_root,
            nesterov=nesterov,
            replay=replay,
            quantization=quantization,
            paging=paging,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
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
    quantization: Quantization | None = None,
    paging: Paging | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with 8-bit, paged moments: `optax.adam` for less memory.

    The chain of `scale_by_paged_adam8bit` and `optax.scale_by_learning_rate`.

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator outside of the square root.
      eps_root: added to the denominator inside the square root.
      nesterov: whether to use Nesterov momentum.
      replay: whether the last step may be discarded and run again; doubles the moments' memory.
      quantization: how moments are stored; see `Quantization`.
      paging: where moments live; see `Paging`.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.paged_adam8bit(learning_rate=0.1)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.1000

    References:
      Kingma & Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014
    """
    return optax.chain(
        scale_by_paged_adam8bit(
            b1,
            b2,
            eps,
            eps_root,
            nesterov=nesterov,
            replay=replay,
            quantization=quantization,
            paging=paging,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def _stack(scalars: list[jax.typing.ArrayLike]) -> jax.typing.ArrayLike:
    """Hyperparameters as the operand that the kernel reads: a constant unless one is traced."""
    if any(isinstance(x, jax.Array) for x in scalars):
        return jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars])
    return np.array(scalars, np.float32)


def _check_range(name: str, value: jax.typing.ArrayLike, below: float = np.inf) -> None:
    if np.ndim(value) != 0:
        raise ValueError(f"{name} has shape {np.shape(value)}; it must be a scalar")
    if callable(value) or value is None:
        raise TypeError(
            f"{name} is {value}; it must be a number. For a schedule use"
            " optax.inject_hyperparams(...)"
        )
    # float32, as the kernel sees it: 0.99999999 is 1 there.
    if isinstance(value, float | int | np.floating) and not 0 <= float(np.float32(value)) < below:
        allowed = "at least 0" if below == np.inf else "in [0, 1) as float32"
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def _check_options(quantization: Quantization | None, paging: Paging | None) -> None:
    for name, value, kind in (
        ("quantization", quantization, Quantization),
        ("paging", paging, Paging),
    ):
        if not isinstance(value, kind | None):
            raise TypeError(f"{name} is {value!r}; it must be a paged_optax.{kind.__name__}")


def _check_state(state: Any) -> None:
    if not isinstance(state, ScaleByPagedAdam8bitState):
        raise TypeError(
            f"the optimizer state is a {type(state).__name__}, not one that this optimizer's init"
            " returned. Moments of another optimizer cannot be taken over: start with init(params)."
        )
    if state.token.dtype != jnp.int32 or state.token.shape != TOKEN_SHAPE:
        raise ValueError(
            f"the optimizer state's token is {state.token.dtype}{list(state.token.shape)}, and must"
            " be int32[2] as init returned it; was the whole state cast, stacked or mapped over?"
        )
    if state.count.dtype != jnp.int32 or state.count.shape != ():
        raise ValueError(
            f"the optimizer state's count is {state.count.dtype}{list(state.count.shape)}, and must"
            " be int32[] as init returned it; was the whole state cast, stacked or mapped over?"
        )


def _check_dtypes(kind: str, leaves: list[tuple[Any, Any]]) -> None:
    for path, leaf in leaves:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype
        if isinstance(leaf, np.ndarray | np.generic):
            dtype = jax.dtypes.canonicalize_dtype(dtype)  # as jax will take it
        if dtype not in _FLOATS:
            raise TypeError(
                f"{kind} {_name(path)} has dtype {dtype}; paged optimizers take float32, bfloat16"
                " and float16. Cast it, or keep it out with optax.masked or optax.partition."
            )


def _check_shapes(grads: list[tuple[Any, Any]], params: optax.Params | None) -> None:
    """Compares gradients with the parameters, where given; the kernel compares with the moments."""
    if params is None:
        return
    leaves = jax.tree.leaves(params)
    if len(leaves) != len(grads):
        raise ValueError(
            f"there are {len(grads)} gradients but {len(leaves)} parameters; pass to update the"
            " gradients of these parameters"
        )
    for (path, grad), param in zip(grads, leaves, strict=True):
        if np.shape(grad) != np.shape(param):
            raise ValueError(
                f"gradient {_name(path)} has shape {np.shape(grad)} but its parameter has shape"
                f" {np.shape(param)}"
            )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "leaf"
