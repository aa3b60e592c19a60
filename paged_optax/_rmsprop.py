"""RMSprop and Adagrad with 8-bit, paged moments, as optax gradient transformations."""

from typing import Any, NamedTuple

import jax
import optax

from ._options import Paging, Quantization, make_options
from ._rule import Rule
from ._sgd import ScaleByPagedTrace8bitState
from ._state import Token, paged_state
from ._transformation import ascend, before_others, compose, descend, part_of, transformation
from ._validate import check_rate


@paged_state
class ScaleByPagedRms8bitState(NamedTuple):
    """State of `scale_by_paged_rms8bit`: a few integers, whatever the size of the model.

    Attributes:
      count: int32 of shape (), the number of updates so far.
      token: its `value`, int32 of shape (2,), says which moments belong to the state: their handle,
        and the version of their contents.
    """

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    token: Token


@paged_state
class ScaleByPagedStddev8bitState(NamedTuple):
    """State of `scale_by_paged_stddev8bit`: a few integers, whatever the size of the model.

    Attributes:
      count: int32 of shape (), the number of updates so far.
      token: its `value`, int32 of shape (2,), says which moments belong to the state: their handle,
        and the version of their contents.
    """

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    token: Token


@paged_state
class ScaleByPagedRss8bitState(NamedTuple):
    """State of `scale_by_paged_rss8bit`: a few integers, whatever the size of the model.

    Attributes:
      count: int32 of shape (), the number of updates so far.
      token: its `value`, int32 of shape (2,), says which moments belong to the state: their handle,
        and the version of their contents.
    """

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    token: Token


def scale_by_paged_rms8bit(
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by the root of the mean of their squares, kept outside XLA's memory.

    `optax.scale_by_rms` with the mean stored in 8 bits (1.02 instead of 4 bytes per parameter), in
    memory that XLA's allocator does not own. For step :math:`t` and gradient :math:`g_t`,

    .. math::

      v_t &\leftarrow \beta \cdot v_{t-1} + (1-\beta) \cdot g_t^2 \\
      u_t &\leftarrow g_t / \sqrt{v_t + \varepsilon}

    in float32. The default format stores the mean as small floats, rounded stochastically, whose
    grid does not move with the largest of the block. What `scale_by_paged_adam8bit` says of states
    that change in place holds here too.

    Args:
      decay: decay rate of the mean of squares; a float or a traced scalar.
      eps: added to the denominator.
      initial_scale: value at which the mean of squares starts.
      eps_in_sqrt: whether `eps` is added inside of the square root; if not, outside.
      bias_correction: whether to divide the mean by the sum of its weights so far.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        means.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the means are stored; see `Quantization`.
      paging: where the means live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Gradients may be float32, bfloat16 or float16,
      mixed in one tree, of any shape; updates have their dtypes.

    Raises:
      As `scale_by_paged_adam8bit`.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.scale_by_paged_rms8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      3.1623

    References:
      Hinton, `Overview of mini-batch gradient descent
      <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012

      Graves, `Generating Sequences With Recurrent Neural Networks
      <https://arxiv.org/abs/1308.0850>`_, 2013, for ``centered``
    """
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
    )
    rule = Rule(
        "rms",
        decay=decay,
        eps=eps,
        initial_scale=initial_scale,
        eps_in_sqrt=eps_in_sqrt,
        bias_correction=bias_correction,
    )
    return transformation(rule, options, ScaleByPagedRms8bitState)


def scale_by_paged_stddev8bit(
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by their standard deviation, from moments outside XLA's memory.

    `optax.scale_by_stddev` with both moments stored in 8 bits (2.03 instead of 8 bytes per
    parameter), in memory that XLA's allocator does not own. For step :math:`t` and gradient
    :math:`g_t`,

    .. math::

      m_t &\leftarrow \beta \cdot m_{t-1} + (1-\beta) \cdot g_t \\
      v_t &\leftarrow \beta \cdot v_{t-1} + (1-\beta) \cdot g_t^2 \\
      u_t &\leftarrow g_t / \sqrt{v_t - m_t^2 + \varepsilon}

    in float32. Where rounding makes the variance :math:`v_t - m_t^2` negative it counts as 0. The
    rounding of 8 bits is about a hundredth of :math:`v_t`, so an element whose gradients hardly
    vary has a less certain variance than with `optax.scale_by_stddev`.

    Args:
      decay: decay rate of the mean of squares; a float or a traced scalar.
      eps: added to the denominator.
      initial_scale: value at which the mean of squares starts.
      eps_in_sqrt: whether `eps` is added inside of the square root; if not, outside.
      bias_correction: whether to divide the mean by the sum of its weights so far.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        moments.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the moments are stored; see `Quantization`.
      paging: where the moments live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Gradients may be float32, bfloat16 or float16,
      mixed in one tree, of any shape; updates have their dtypes.

    Raises:
      As `scale_by_paged_adam8bit`.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.scale_by_paged_stddev8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      3.3333

    References:
      Hinton, `Overview of mini-batch gradient descent
      <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012

      Graves, `Generating Sequences With Recurrent Neural Networks
      <https://arxiv.org/abs/1308.0850>`_, 2013, for ``centered``
    """
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
    )
    rule = Rule(
        "stddev",
        decay=decay,
        eps=eps,
        initial_scale=initial_scale,
        eps_in_sqrt=eps_in_sqrt,
        bias_correction=bias_correction,
    )
    return transformation(rule, options, ScaleByPagedStddev8bitState)


def paged_rmsprop8bit(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    replay: bool = False,
    param_rounding: str = "nearest",
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""RMSprop with 8-bit, paged moments: `optax.rmsprop` for less memory.

    The chain of `scale_by_paged_rms8bit` (`scale_by_paged_stddev8bit` if centered),
    `optax.scale_by_learning_rate` and, with momentum, `scale_by_paged_trace8bit`. As in optax, the
    momentum is that of steps and not of gradients: it comes after the learning rate.

    .. math::

      v_t &\leftarrow \beta \cdot v_{t-1} + (1-\beta) \cdot g_t^2 \\
      m_t &\leftarrow \mu \cdot m_{t-1} - \alpha_t g_t / \sqrt{v_t + \varepsilon} \\
      \theta_t &\leftarrow \theta_{t-1} + m_t

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      decay: decay rate of the mean of squares; a float or a traced scalar.
      eps: added to the denominator.
      initial_scale: value at which the mean of squares starts.
      eps_in_sqrt: whether `eps` is added inside of the square root; if not, outside.
      centered: whether to divide by the standard deviation; takes a second moment.
      momentum: decay rate of the momentum; None for none, which saves its memory.
      nesterov: whether the momentum is Nesterov's.
      bias_correction: whether to divide the mean by the sum of its weights so far.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        moments.
      param_rounding: ``"nearest"``, ``"stochastic"`` or ``"compensated"``; see `paged_adamw8bit`.
      non_finite: what to do with gradients that are not finite; see `scale_by_paged_adam8bit`.
      quantization: how the moments are stored; see `Quantization`.
      paging: where the moments live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`; ValueError where parameters are rounded and not passed.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.paged_rmsprop8bit(learning_rate=0.1)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.3162

    References:
      Hinton, `Overview of mini-batch gradient descent
      <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012

      Graves, `Generating Sequences With Recurrent Neural Networks
      <https://arxiv.org/abs/1308.0850>`_, 2013, for ``centered``
    """
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        param_rounding=param_rounding,
    )
    rule = Rule(
        "stddev" if centered else "rms",
        decay=decay,
        eps=eps,
        initial_scale=initial_scale,
        eps_in_sqrt=eps_in_sqrt,
        bias_correction=bias_correction,
    )
    state_type: Any = ScaleByPagedStddev8bitState if centered else ScaleByPagedRms8bitState
    if momentum is None:
        return descend(rule, learning_rate, options, state_type)
    check_rate("learning_rate", learning_rate)
    trace = Rule("trace", decay=momentum, nesterov=nesterov)
    return compose(
        options,
        before_others(rule, options, state_type),
        optax.scale_by_learning_rate(learning_rate),
        ascend(trace, part_of(options, param_rounding), ScaleByPagedTrace8bitState),
    )


def scale_by_paged_rss8bit(
    initial_accumulator_value: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-7,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by the root of the sum of their squares, kept outside XLA's memory.

    `optax.scale_by_rss` with the sum stored in 8 bits (1.02 instead of 4 bytes per parameter), in
    memory that XLA's allocator does not own. For step :math:`t` and gradient :math:`g_t`,

    .. math::

      v_t &\leftarrow v_{t-1} + g_t^2 \\
      u_t &\leftarrow g_t / \sqrt{v_t + \varepsilon}

    in float32, and 0 where :math:`v_t` is 0. It is stored as in `scale_by_paged_rms8bit`. With
    mean-zero rounding a sum grows as it should even where a single square is less than its last
    digit.

    Args:
      initial_accumulator_value: where the sum starts; a float or a traced scalar.
      eps: added inside of the square root.
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
      >>> tx = paged_optax.scale_by_paged_rss8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      0.9535

    References:
      Duchi et al., `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
      <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011
    """
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
    )
    rule = Rule("rss", initial_accumulator_value=initial_accumulator_value, eps=eps)
    return transformation(rule, options, ScaleByPagedRss8bitState)


def paged_adagrad8bit(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-7,
    *,
    replay: bool = False,
    param_rounding: str = "nearest",
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Adagrad with 8-bit, paged sums: `optax.adagrad` for less memory.

    The chain of `scale_by_paged_rss8bit` and `optax.scale_by_learning_rate`, or one transformation
    that does the same, as in `paged_adamw8bit`:

    .. math::

      v_t &\leftarrow v_{t-1} + g_t^2 \\
      \theta_t &\leftarrow \theta_{t-1} - \alpha_t g_t / \sqrt{v_t + \varepsilon}

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      initial_accumulator_value: where the sum starts.
      eps: added inside of the square root.
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
      >>> tx = paged_optax.paged_adagrad8bit(learning_rate=0.1)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.4f}")
      -0.0953

    References:
      Duchi et al., `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
      <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011
    """
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        param_rounding=param_rounding,
    )
    rule = Rule("rss", initial_accumulator_value=initial_accumulator_value, eps=eps)
    return descend(rule, learning_rate, options, ScaleByPagedRss8bitState)
