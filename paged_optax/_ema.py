"""Moving averages of gradients in 8 bits, paged, and Signum, as optax transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from ._options import Paging, Quantization, make_options
from ._rule import Rule
from ._state import Token, paged_state
from ._transformation import descend, transformation
from ._validate import check_decay, check_range


@paged_state
class ScaleByPagedEma8bitState(NamedTuple):
    """State of `scale_by_paged_ema8bit`: a few integers, whatever the size of the model.

    Attributes:
      count: int32 of shape (), the number of updates so far.
      token: its `value`, int32 of shape (2,), says which moments belong to the state: their handle,
        and the version of their contents.
    """

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    token: Token


def scale_by_paged_ema8bit(
    decay: jax.typing.ArrayLike,
    debias: bool = True,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Computes an exponential moving average of updates, outside XLA's memory.

    `optax.ema` with its average stored in 8 bits (1.02 instead of 4 bytes per parameter), in memory
    that XLA's allocator does not own. For step :math:`t`, gradient :math:`g_t` and decay
    :math:`\beta`,

    .. math::

      m_t &\leftarrow \beta \cdot m_{t-1} + (1-\beta) \cdot g_t \\
      u_t &\leftarrow m_t / (1-\beta^t) \quad \text{or, without debias,} \quad m_t

    in float32. It is stored as in `scale_by_paged_trace8bit`.

    Args:
      decay: decay rate of the average; a float or a traced scalar.
      debias: whether to divide by the sum of the weights so far.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        averages.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the averages are stored; see `Quantization`.
      paging: where the averages live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Gradients may be float32, bfloat16 or float16,
      mixed in one tree, of any shape; updates have their dtypes.

    Raises:
      As `scale_by_paged_adam8bit`.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.scale_by_paged_ema8bit(0.9)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      1.0000

    References:
      Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_,
      2014, section 3, for the bias
    """
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
    )
    rule = Rule("ema", decay=decay, debias=debias, sign=False)
    return transformation(rule, options, ScaleByPagedEma8bitState)


def scale_by_paged_signum8bit(
    decay: jax.typing.ArrayLike = 0.9,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Computes the sign of an exponential moving average of updates, outside XLA's memory.

    `scale_by_paged_ema8bit` and `optax.scale_by_sign` in one pass. For step :math:`t`, gradient
    :math:`g_t` and decay :math:`\beta`,

    .. math::

      m_t &\leftarrow \beta \cdot m_{t-1} + (1-\beta) \cdot g_t \\
      u_t &\leftarrow \text{sign}(m_t)

    Args:
      decay: decay rate of the average; a float or a traced scalar.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        averages.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the averages are stored; see `Quantization`.
      paging: where the averages live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Gradients may be float32, bfloat16 or float16,
      mixed in one tree, of any shape; updates have their dtypes.

    Raises:
      As `scale_by_paged_adam8bit`.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.scale_by_paged_signum8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update({"w": jnp.full((64, 64), -3.0)}, tx.init(params))
      >>> print(updates["w"][0, 0])
      -1.0

    References:
      Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018
    """
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
    )
    rule = Rule("ema", decay=decay, debias=False, sign=True)
    return transformation(rule, options, ScaleByPagedEma8bitState)


def paged_signum8bit(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    replay: bool = False,
    param_rounding: str = "nearest",
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Signum: the sign of an 8-bit, paged moving average.

    The chain of `scale_by_paged_signum8bit`, `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`, or one transformation that does the same, as in
    `paged_adamw8bit`:

    .. math::

      m_t &\leftarrow \beta \cdot m_{t-1} + (1-\beta) \cdot g_t \\
      \theta_t &\leftarrow \theta_{t-1} - \alpha_t (\text{sign}(m_t) + \lambda \theta_{t-1})

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      decay: decay rate of the average.
      weight_decay: strength of the weight decay; it is multiplied by the learning rate.
      mask: a tree with the same structure as (or a prefix of) the parameters, or a callable that
        returns one; True where weight decay applies.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        averages.
      param_rounding: ``"nearest"``, ``"stochastic"`` or ``"compensated"``; see `paged_adamw8bit`.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the averages are stored; see `Quantization`.
      paging: where the averages live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`; ValueError where parameters are rounded and not passed.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.paged_signum8bit(learning_rate=0.1)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.1000

    References:
      Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018
    """
    check_range("decay", decay, below=1.0)
    check_decay(weight_decay)
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        param_rounding=param_rounding,
    )
    rule = Rule("ema", decay=decay, debias=False, sign=True)
    return descend(rule, learning_rate, options, ScaleByPagedEma8bitState, weight_decay, mask)
