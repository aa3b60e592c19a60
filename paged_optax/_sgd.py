"""SGD with 8-bit, paged momentum, and the momentum alone, as optax gradient transformations."""

from typing import NamedTuple

import jax
import optax

from ._options import Paging, Quantization, make_options
from ._rule import Rule
from ._state import Token, paged_state
from ._transformation import descend, transformation
from ._validate import check_range


@paged_state
class ScaleByPagedTrace8bitState(NamedTuple):
    """State of `scale_by_paged_trace8bit`: a few integers, whatever the size of the model.

    Attributes:
      count: int32 of shape (), the number of updates so far.
      token: its `value`, int32 of shape (2,), says which moments belong to the state: their handle,
        and the version of their contents.
    """

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    token: Token


def scale_by_paged_trace8bit(
    decay: jax.typing.ArrayLike,
    nesterov: bool = False,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates a decaying sum of updates, outside XLA's memory.

    `optax.trace` with its sum stored in 8 bits (1.02 instead of 4 bytes per parameter), in memory
    that XLA's allocator does not own. For step :math:`t`, gradient :math:`g_t` and decay
    :math:`\mu`,

    .. math::

      m_t &\leftarrow \mu \cdot m_{t-1} + g_t \\
      u_t &\leftarrow m_t \quad \text{or, with Nesterov momentum,} \quad g_t + \mu \cdot m_t

    in float32. The default format stores the sum as squares of integers, scaled by the largest of
    its block and rounded stochastically. What `scale_by_paged_adam8bit` says of states that change
    in place holds here too.

    Args:
      decay: decay rate of the sum; a float or a traced scalar.
      nesterov: whether to use Nesterov momentum.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        sums.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the sums are stored; see `Quantization`.
      paging: where the sums live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Gradients may be float32, bfloat16 or float16,
      mixed in one tree, of any shape; updates have their dtypes.

    Raises:
      As `scale_by_paged_adam8bit`.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.scale_by_paged_trace8bit(0.9)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      1.0000

    References:
      Sutskever et al., `On the importance of initialization and momentum in deep learning
      <http://proceedings.mlr.press/v28/sutskever13.pdf>`_, 2013
    """
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
    )
    rule = Rule("trace", decay=decay, nesterov=nesterov)
    return transformation(rule, options, ScaleByPagedTrace8bitState)


def paged_sgd8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike,
    nesterov: bool = False,
    *,
    replay: bool = False,
    param_rounding: str = "nearest",
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with 8-bit, paged momentum: `optax.sgd` for less memory.

    The chain of `scale_by_paged_trace8bit` and `optax.scale_by_learning_rate`, or one
    transformation that does the same, as in `paged_adamw8bit`:

    .. math::

      m_t &\leftarrow \mu \cdot m_{t-1} + g_t \\
      \theta_t &\leftarrow \theta_{t-1} - \alpha_t m_t

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      momentum: decay rate of the sum of gradients. Without momentum SGD has no state, and there is
        nothing to page: use `optax.sgd`.
      nesterov: whether to use Nesterov momentum.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        sums.
      param_rounding: ``"nearest"``, ``"stochastic"`` or ``"compensated"``; see `paged_adamw8bit`.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the sums are stored; see `Quantization`.
      paging: where the sums live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`; ValueError where parameters are rounded and not passed.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.paged_sgd8bit(learning_rate=0.1, momentum=0.9)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.1000

    References:
      Sutskever et al., `On the importance of initialization and momentum in deep learning
      <http://proceedings.mlr.press/v28/sutskever13.pdf>`_, 2013
    """
    if momentum is None:
        raise ValueError(
            "momentum is None; without momentum SGD has no state to page: use optax.sgd"
        )
    check_range("momentum", momentum, below=1.0)
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        param_rounding=param_rounding,
    )
    rule = Rule("trace", decay=momentum, nesterov=nesterov)
    return descend(rule, learning_rate, options, ScaleByPagedTrace8bitState)
