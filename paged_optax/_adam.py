"""Adam and AdamW with 8-bit, paged moments, as optax gradient transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from ._options import Paging, Quantization, make_options
from ._rule import Rule
from ._state import Token, paged_state
from ._transformation import descend, transformation
from ._validate import check_decay


@paged_state
class ScaleByPagedAdam8bitState(NamedTuple):
    """State of `scale_by_paged_adam8bit`: a few integers, whatever the size of the model.

    Attributes:
      count: int32 of shape (), the number of updates so far.
      token: its `value`, int32 of shape (2,), says which moments belong to the state: their handle,
        and the version of their contents.
    """

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    token: Token


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
    missing: str = "error",
    mu_dtype: None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates according to the Adam algorithm, with moments outside XLA's memory.

    `optax.scale_by_adam` with both moments stored in 8 bits (2.03 instead of 8 bytes per
    parameter), in memory that XLA's allocator does not own. For step :math:`t` and gradient
    :math:`g_t`,

    .. math::

      m_t &\leftarrow \beta_1 \cdot m_{t-1} + (1-\beta_1) \cdot g_t \\
      v_t &\leftarrow \beta_2 \cdot v_{t-1} + (1-\beta_2) \cdot g_t^2 \\
      u_t &\leftarrow \frac{m_t / (1-\beta_1^t)}
        {\sqrt{v_t / (1-\beta_2^t) + \bar\varepsilon} + \varepsilon}

    in float32. The direction :math:`u_t` uses the new moments before they are quantized. By default
    the format rounds them at random, with mean zero (see `Quantization`). A gradient element that
    is NaN, infinite, or at least 2^64 makes its own update NaN (or does what `non_finite` says) and
    leaves its moments alone.

    Moments change in place, so only the newest state can be updated. A state that was rolled back,
    forked, or saved without its moments is refused with an error, and nothing is overwritten. On a
    GPU a step never waits for the device: the refused step returns an update of zero, and the next
    call raises the error.

    With ``replay=True`` a second copy of the moments is kept (4.06 bytes per parameter), and the
    state before the last step can be updated as well. Wrappers that compute a step and may discard
    it need this: ``optax.MultiSteps``, ``jnp.where`` over the state, a step that is tried again.

    Args:
      b1: decay rate of the first moment; a float or a traced scalar.
      b2: decay rate of the second moment; a float or a traced scalar.
      eps: added to the denominator outside of the square root.
      eps_root: added to the denominator inside the square root.
      nesterov: whether to use Nesterov momentum.
      replay: whether the last step may be discarded and run again; doubles the moments' memory.
      non_finite: what to do with gradients that are NaN, infinite, or at least 2^64 (their square
        overflows). ``"propagate"``: the element's update is NaN. ``"skip_element"``: the element's
        direction is 0. ``"skip_step"``: all updates are 0 and the state stays as it was, with its
        count and the schedules of this optimizer (but not those of an `optax.inject_hyperparams`
        around it). The two that skip read all gradients once more. Their state is a
        `SkipNonFiniteState`, whose ``skipped`` counts elements or steps; under `jax.pmap` and
        `jax.shard_map` a replicated element is counted once per device. They look at the gradients
        that reach this optimizer, after those before it in the chain. To look before clipping, or
        to decide for several optimizers together, use `skip_non_finite`.
      quantization: how moments are stored; see `Quantization`.
      paging: where moments live; see `Paging`.
      missing: what to do with a state whose moments are not in this process: one from a checkpoint
        that does not carry them. ``"error"``: its update is refused. ``"restart"``: its moments
        start at zero, with a warning. Bias correction counts from there; the state's count, and
        schedules with it, go on.
      mu_dtype: None, for programs that pass what `optax.adam` takes.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Gradients may be float32, bfloat16 or float16,
      mixed in one tree, of any shape; updates have their dtypes. The extra argument ``skip`` is for
      `skip_non_finite`.

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
    rule = Rule("adam", b1=b1, b2=b2, eps=eps, eps_root=eps_root, nesterov=nesterov)
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        mu_dtype=mu_dtype,
    )
    return transformation(rule, options, ScaleByPagedAdam8bitState)


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
    missing: str = "error",
    mu_dtype: None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with weight decay and 8-bit, paged moments: `optax.adamw` for less memory.

    The chain of `scale_by_paged_adam8bit`, `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`. As in optax, the decay acts on the parameters before the step:

    .. math::

      \theta_t \leftarrow \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})

    With a `param_rounding` other than ``"nearest"`` it is one transformation that does the same in
    one pass, in float32, and rounds once.

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
      param_rounding: how new parameters in bfloat16 and float16 are rounded. These types have too
        few digits for small steps. ``"nearest"``: `optax.apply_updates` rounds, as always in optax,
        and steps below half a unit in a parameter's last place are lost. ``"stochastic"``: at
        random, with the exact value as the mean. ``"compensated"``: to nearest, and 8 further bits
        of a float32 master weight are kept with the moments (3.05 instead of 2.03 bytes per
        parameter, if any has 16 bits). With the latter two, `update` needs the parameters, and no
        transformation after this one may change its updates: see `check_last`.
      non_finite: ``"propagate"``, ``"skip_element"`` or ``"skip_step"``; see
        `scale_by_paged_adam8bit`.
      quantization: how moments are stored; see `Quantization`.
      paging: where moments live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.
      mu_dtype: None, for programs that pass what optax's optimizer takes.

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

      Where a GPU refuses a step (see `scale_by_paged_adam8bit`), later links of the chain do not
      know it: weight decay is still applied in that step.
    """
    check_decay(weight_decay)
    rule = Rule("adam", b1=b1, b2=b2, eps=eps, eps_root=eps_root, nesterov=nesterov)
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        param_rounding=param_rounding,
        missing=missing,
        mu_dtype=mu_dtype,
    )
    return descend(rule, learning_rate, options, ScaleByPagedAdam8bitState, weight_decay, mask)


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
    missing: str = "error",
    mu_dtype: None = None,
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
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.
      mu_dtype: None, for programs that pass what optax's optimizer takes.

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

      The largest bfloat16 below 1 is 0.99609. Steps of 0.001 are lost, or they add up:

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
    rule = Rule("adam", b1=b1, b2=b2, eps=eps, eps_root=eps_root, nesterov=nesterov)
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        param_rounding=param_rounding,
        missing=missing,
        mu_dtype=mu_dtype,
    )
    return descend(rule, learning_rate, options, ScaleByPagedAdam8bitState)
