"""Optimizers that put optax's own links around paged moments: LAMB, LARS and NAdamW."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ._adam import ScaleByPagedAdam8bitState, paged_adamw8bit
from ._options import Paging, Quantization, make_options
from ._rule import Rule
from ._sgd import ScaleByPagedTrace8bitState
from ._transformation import ascend, before_others, compose, part_of
from ._validate import check_decay, check_rate


def paged_lamb8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""LAMB with 8-bit, paged moments: `optax.lamb` for less memory.

    The chain of `scale_by_paged_adam8bit`, `optax.add_decayed_weights`,
    `optax.scale_by_trust_ratio` and `optax.scale_by_learning_rate`. With Adam's direction
    :math:`u_t`, for each leaf,

    .. math::

      d_t &\leftarrow u_t + \lambda \theta_{t-1} \\
      \theta_t &\leftarrow \theta_{t-1} - \alpha_t \frac{\|\theta_{t-1}\|}{\|d_t\|} d_t

    and a ratio of 1 where a norm is 0. Parameters cannot be rounded at random or compensated here:
    the ratio needs the whole direction before any parameter can change.

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator outside of the square root.
      eps_root: added to the denominator inside the square root.
      weight_decay: strength of the weight decay; it is multiplied by the learning rate.
      mask: a tree with the same structure as (or a prefix of) the parameters, or a callable that
        returns one; True where weight decay applies.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        moments.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the moments are stored; see `Quantization`.
      paging: where the moments live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`; ValueError if `update` gets no parameters.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.paged_lamb8bit(learning_rate=0.1)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.1000

    References:
      You et al., `Large Batch Optimization for Deep Learning: Training BERT in 76 minutes
      <https://arxiv.org/abs/1904.00962>`_, 2019
    """
    check_rate("learning_rate", learning_rate)
    check_decay(weight_decay)
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
    )
    rule = Rule("adam", b1=b1, b2=b2, eps=eps, eps_root=eps_root, nesterov=False)
    return compose(
        options,
        before_others(rule, options, ScaleByPagedAdam8bitState),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_trust_ratio(),
        optax.scale_by_learning_rate(learning_rate),
    )


def paged_lars8bit(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] = True,
    trust_coefficient: jax.typing.ArrayLike = 0.001,
    eps: jax.typing.ArrayLike = 0.0,
    trust_ratio_mask: Any | Callable[[optax.Params], Any] = True,
    momentum: jax.typing.ArrayLike = 0.9,
    nesterov: bool = False,
    *,
    replay: bool = False,
    param_rounding: str = "nearest",
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""LARS with 8-bit, paged momentum: `optax.lars` for less memory.

    The chain of `optax.add_decayed_weights`, `optax.scale_by_trust_ratio`,
    `optax.scale_by_learning_rate` and `scale_by_paged_trace8bit`. For each leaf, with the
    coefficient :math:`\eta`,

    .. math::

      d_t &\leftarrow g_t + \lambda \theta_{t-1} \\
      m_t &\leftarrow \mu \cdot m_{t-1}
        - \alpha_t \eta \frac{\|\theta_{t-1}\|}{\|d_t\| + \varepsilon} d_t \\
      \theta_t &\leftarrow \theta_{t-1} + m_t

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      weight_decay: strength of the weight decay, which is added to the gradients.
      weight_decay_mask: a tree with the same structure as (or a prefix of) the parameters, or a
        callable that returns one; True where weight decay applies.
      trust_coefficient: a multiplier of the ratio.
      eps: added to the denominator of the ratio.
      trust_ratio_mask: as `weight_decay_mask`; True where the ratio applies.
      momentum: decay rate of the momentum.
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
      As `scale_by_paged_adam8bit`; ValueError if `update` gets no parameters.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.paged_lars8bit(learning_rate=0.1)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.0001

    References:
      You et al., `Large Batch Training of Convolutional Networks
      <https://arxiv.org/abs/1708.03888>`_, 2017
    """
    check_rate("learning_rate", learning_rate)
    check_decay(weight_decay)
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        param_rounding=param_rounding,
    )
    ratio = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
    trace = Rule("trace", decay=momentum, nesterov=nesterov)
    return compose(
        options,
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.masked(ratio, trust_ratio_mask),
        optax.scale_by_learning_rate(learning_rate),
        ascend(trace, part_of(options, param_rounding), ScaleByPagedTrace8bitState),
    )


def paged_nadamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
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
    r"""NAdamW with 8-bit, paged moments: `optax.nadamw` for less memory.

    `paged_adamw8bit` with Nesterov momentum:

    .. math::

      u_t \leftarrow \frac{\beta_1 m_t / (1-\beta_1^{t+1}) + (1-\beta_1) g_t / (1-\beta_1^t)}
        {\sqrt{v_t / (1-\beta_2^t) + \bar\varepsilon} + \varepsilon}

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
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
      >>> tx = paged_optax.paged_nadamw8bit(learning_rate=0.1, weight_decay=0.0)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.1474

    References:
      Dozat, `Incorporating Nesterov Momentum into Adam
      <https://openreview.net/pdf/OM0jvwB8jIp57ZJjtNEZ.pdf>`_, 2016
    """
    return paged_adamw8bit(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        weight_decay,
        mask,
        nesterov=True,
        replay=replay,
        param_rounding=param_rounding,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        mu_dtype=mu_dtype,
    )
