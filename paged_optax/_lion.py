"""Lion with an 8-bit, paged moment, as optax gradient transformations."""

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
class ScaleByPagedLion8bitState(NamedTuple):
    """State of `scale_by_paged_lion8bit`: a few integers, whatever the size of the model.

    Attributes:
      count: int32 of shape (), the number of updates so far.
      token: its `value`, int32 of shape (2,), says which moments belong to the state: their handle,
        and the version of their contents.
    """

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    token: Token


def scale_by_paged_lion8bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
    mu_dtype: None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates according to the Lion algorithm, with its moment outside XLA's memory.

    `optax.scale_by_lion` with its moment stored in 8 bits (1.02 instead of 4 bytes per parameter),
    in memory that XLA's allocator does not own. For step :math:`t` and gradient :math:`g_t`,

    .. math::

      u_t &\leftarrow \text{sign}(\beta_1 \cdot m_{t-1} + (1-\beta_1) \cdot g_t) \\
      m_t &\leftarrow \beta_2 \cdot m_{t-1} + (1-\beta_2) \cdot g_t

    in float32. The default format stores the moment as squares of integers, scaled by the largest
    of its block and rounded stochastically. What `scale_by_paged_adam8bit` says of states that
    change in place holds here too.

    Args:
      b1: weight of the moment in the direction; a float or a traced scalar.
      b2: decay rate of the moment; a float or a traced scalar.
      replay: whether the last step may be discarded and run again; doubles the moment's memory.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the moment is stored; see `Quantization`.
      paging: where the moment lives; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.
      mu_dtype: None, for programs that pass what optax's optimizer takes.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Gradients may be float32, bfloat16 or float16,
      mixed in one tree, of any shape; updates have their dtypes.

    Raises:
      As `scale_by_paged_adam8bit`.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = optax.chain(paged_optax.scale_by_paged_lion8bit(), optax.scale(-0.1))
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update({"w": jnp.full((64, 64), 3.0)}, tx.init(params))
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["w"][0, 0].round(4))
      0.9

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023
    """
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        mu_dtype=mu_dtype,
    )
    return transformation(Rule("lion", b1=b1, b2=b2), options, ScaleByPagedLion8bitState)


def paged_lion8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    replay: bool = False,
    param_rounding: str = "nearest",
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
    mu_dtype: None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with weight decay and an 8-bit, paged moment: `optax.lion` for less memory.

    The chain of `scale_by_paged_lion8bit`, `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`, or one transformation that does the same, as in
    `paged_adamw8bit`.

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar. Lion takes a third to
        a tenth of Adam's.
      b1: weight of the moment in the direction.
      b2: decay rate of the moment.
      weight_decay: strength of the weight decay; it is multiplied by the learning rate. Lion takes
        three to ten times Adam's.
      mask: a tree with the same structure as (or a prefix of) the parameters, or a callable that
        returns one; True where weight decay applies.
      replay: whether the last step may be discarded and run again; doubles the moment's memory.
      param_rounding: ``"nearest"``, ``"stochastic"`` or ``"compensated"``; see `paged_adamw8bit`.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the moment is stored; see `Quantization`.
      paging: where the moment lives; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.
      mu_dtype: None, for programs that pass what optax's optimizer takes.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`; ValueError where parameters are rounded and not passed.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.paged_lion8bit(learning_rate=0.1, weight_decay=0.0)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.1000

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023
    """
    check_decay(weight_decay)
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        param_rounding=param_rounding,
        missing=missing,
        mu_dtype=mu_dtype,
    )
    rule = Rule("lion", b1=b1, b2=b2)
    return descend(rule, learning_rate, options, ScaleByPagedLion8bitState, weight_decay, mask)
