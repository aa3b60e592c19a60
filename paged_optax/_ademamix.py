"""AdEMAMix with 8-bit, paged moments, as optax gradient transformations."""

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
class ScaleByPagedAdemamix8bitState(NamedTuple):
    """State of `scale_by_paged_ademamix8bit`: a few integers, whatever the size of the model.

    Attributes:
      count: int32 of shape (), the number of updates so far.
      token: its `value`, int32 of shape (2,), says which moments belong to the state: their handle,
        and the version of their contents.
    """

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    token: Token


def scale_by_paged_ademamix8bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 6.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
    mu_dtype: None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates according to AdEMAMix, with its moments outside XLA's memory.

    `optax.contrib.scale_by_ademamix` with its three moments stored in 8 bits (3.05 instead of 12
    bytes per parameter), in memory that XLA's allocator does not own. For step :math:`t` and
    gradient :math:`g_t`,

    .. math::

      m_{1,t} &\leftarrow \beta_1 \cdot m_{1,t-1} + (1-\beta_1) \cdot g_t \\
      m_{2,t} &\leftarrow \beta_3 \cdot m_{2,t-1} + (1-\beta_3) \cdot g_t \\
      v_t &\leftarrow \beta_2 \cdot v_{t-1} + (1-\beta_2) \cdot g_t^2 \\
      u_t &\leftarrow \frac{m_{1,t} / (1-\beta_1^t) + \alpha \cdot m_{2,t}}
        {\sqrt{v_t / (1-\beta_2^t) + \bar\varepsilon} + \varepsilon}

    in float32. The default format stores both means as multiples of the second moment's root. What
    `scale_by_paged_adam8bit` says of states that change in place holds here too.

    Args:
      b1: decay rate of the fast mean.
      b2: decay rate of the second moment.
      b3: decay rate of the slow mean: a number, or a schedule of the number of steps.
      alpha: weight of the slow mean: a number, or a schedule of the number of steps.
      eps: added to the denominator outside of the square root.
      eps_root: added to the denominator inside the square root.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        moments.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the moments are stored; see `Quantization`.
      paging: where the moments live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.
      mu_dtype: None, for programs that pass what optax's optimizer takes.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Gradients may be float32, bfloat16 or float16,
      mixed in one tree, of any shape; updates have their dtypes.

    Raises:
      As `scale_by_paged_adam8bit`.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.scale_by_paged_ademamix8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      1.0006

    References:
      Pagliardini et al., `The AdEMAMix Optimizer: Better, Faster, Older
      <https://arxiv.org/abs/2409.03137>`_, 2024
    """
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        mu_dtype=mu_dtype,
    )
    rule = _rule(b1, b2, b3, alpha, eps, eps_root)
    return transformation(rule, options, ScaleByPagedAdemamix8bitState)


def paged_ademamix8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 5.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
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
    r"""AdEMAMix with weight decay and paged moments: `optax.contrib.ademamix` for less memory.

    The chain of `scale_by_paged_ademamix8bit`, `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`, or one transformation that does the same, as in
    `paged_adamw8bit`:

    .. math::

      \theta_t \leftarrow \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      b1: decay rate of the fast mean.
      b2: decay rate of the second moment.
      b3: decay rate of the slow mean: a number, or a schedule of the number of steps.
      alpha: weight of the slow mean: a number, or a schedule of the number of steps.
      eps: added to the denominator outside of the square root.
      eps_root: added to the denominator inside the square root.
      weight_decay: strength of the weight decay; it is multiplied by the learning rate.
      mask: a tree with the same structure as (or a prefix of) the parameters, or a callable that
        returns one; True where weight decay applies.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        moments.
      param_rounding: ``"nearest"``, ``"stochastic"`` or ``"compensated"``; see `paged_adamw8bit`.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the moments are stored; see `Quantization`.
      paging: where the moments live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.
      mu_dtype: None, for programs that pass what optax's optimizer takes.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`; ValueError where parameters are rounded and not passed.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.paged_ademamix8bit(learning_rate=0.1)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.1001

    References:
      Pagliardini et al., `The AdEMAMix Optimizer: Better, Faster, Older
      <https://arxiv.org/abs/2409.03137>`_, 2024
    """
    check_decay(weight_decay)
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        mu_dtype=mu_dtype,
        param_rounding=param_rounding,
    )
    rule = _rule(b1, b2, b3, alpha, eps, eps_root)
    return descend(rule, learning_rate, options, ScaleByPagedAdemamix8bitState, weight_decay, mask)


def _rule(b1: Any, b2: Any, b3: Any, alpha: Any, eps: Any, eps_root: Any) -> Rule:
    return Rule(
        "ademamix",
        schedules=("b3", "alpha"),
        b1=b1,
        b2=b2,
        b3=b3,
        alpha=alpha,
        eps=eps,
        eps_root=eps_root,
    )
