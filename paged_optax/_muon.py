"""Muon with 8-bit or bfloat16, paged momentum, as an optax gradient transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from ._adam import ScaleByPagedAdam8bitState
from ._options import Options, Paging, Quantization, make_options
from ._rule import Rule
from ._state import Token, paged_state
from ._transformation import before_others, compose, descend, part_of, transformation
from ._validate import check_decay, check_rate

_STANDARD = (3.4445, -4.7750, 2.0315)  # optax.contrib.muon's default coefficients


@paged_state
class ScaleByPagedMuon8bitState(NamedTuple):
    """State of the momentum of `paged_muon8bit`: a few integers, whatever the size of the model.

    Attributes:
      count: int32 of shape (), the number of updates so far.
      token: its `value`, int32 of shape (2,), says which moments belong to the state: their handle,
        and the version of their contents.
    """

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    token: Token


def paged_muon8bit(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Any = _STANDARD,
    ns_steps: int = 5,
    beta: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps_root: jax.typing.ArrayLike = 0.0,
    adam_weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any | Callable[[optax.Params], Any] | None = None,
    consistent_rms: jax.typing.ArrayLike | None = None,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
    missing: str = "error",
    mu_dtype: None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with its momentum outside XLA's memory: `optax.contrib.muon` for less of it.

    Matrices take steps along their orthogonalized momentum; all other parameters take those of
    AdamW, as in optax. For step :math:`t` and the gradient :math:`G_t` of a matrix,

    .. math::

      M_t &\leftarrow \beta M_{t-1} + (1-\beta) G_t \\
      \hat M_t &\leftarrow \beta M_t / (1-\beta^{t+1}) + (1-\beta) G_t / (1-\beta^t) \\
      \theta_t &\leftarrow \theta_{t-1} - \alpha_t
        \left(\sqrt{\max(1, \tfrac{\text{out}}{\text{in}})} \; \text{NewtonSchulz}(\hat M_t)
        + \lambda \theta_{t-1}\right)

    One custom call turns all gradients into :math:`\hat M_t`, in their own memory; what follows is
    optax's. The momentum takes 1.02 bytes per parameter. Orthogonalization amplifies what rounding
    does to small singular values: ``Quantization("bfloat16")`` takes 2 bytes and is several times
    closer to float32.

    Args:
      learning_rate: a global scaling factor, a schedule, or a traced scalar.
      ns_coeffs: coefficients of the Newton-Schulz iteration, or the name of a preset of optax.
      ns_steps: number of iterations.
      beta: decay rate of the momentum.
      eps: added to the denominators, as in optax.
      weight_decay: strength of the weight decay of the matrices; it is multiplied by the learning
        rate.
      weight_decay_mask: a tree with the same structure as (or a prefix of) the parameters, or a
        callable that returns one; True where weight decay applies.
      nesterov: whether to use Nesterov momentum, for AdamW too.
      adaptive: whether to scale steps by the dual norm of the momentum.
      preconditioning: ``"frobenius"``, ``"spectral"``, ``"aol"`` or ``"schatten"``.
      adam_b1: decay rate of AdamW's first moment.
      adam_b2: decay rate of AdamW's second moment.
      adam_eps_root: added inside of AdamW's square root.
      adam_weight_decay: AdamW's weight decay.
      adam_learning_rate: AdamW's learning rate; None for that of the matrices.
      muon_weight_dimension_numbers: a tree of `optax.contrib.MuonDimensionNumbers`, which say what
        of an array is a matrix, and of None for AdamW; or a callable that returns one. None for all
        arrays of two dimensions.
      consistent_rms: scales steps by ``sqrt(max(in, out)) * consistent_rms`` instead.
      replay: whether the last step may be discarded and run again; doubles the memory of the
        moments.
      non_finite: what to do with gradients that are not finite; see `skip_non_finite`. Without it,
        an element that is not finite spoils the whole step of its matrix, but not its momentum.
      quantization: how momentum and moments are stored; see `Quantization`.
      paging: where they live; see `Paging`.
      missing: ``"error"`` or ``"restart"``; see `scale_by_paged_adam8bit`.
      mu_dtype: None, for programs that pass what optax's optimizer takes.

    Returns:
      The corresponding `optax.GradientTransformationExtraArgs`.

    Raises:
      As `scale_by_paged_adam8bit`; ValueError as `optax.contrib.muon`, from `init`.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = paged_optax.paged_muon8bit(learning_rate=0.1)
      >>> params = {"w": jnp.eye(64), "b": jnp.ones(64)}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.2f}, {updates['b'][0]:.2f}")
      -0.07, -0.15

    References:
      Jordan, `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024

      Liu et al., `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025
    """
    check_rate("learning_rate", learning_rate)
    check_decay(weight_decay)
    options = make_options(
        replay=replay,
        non_finite=non_finite,
        quantization=quantization,
        paging=paging,
        missing=missing,
        mu_dtype=mu_dtype,
    )
    if adam_learning_rate is None:
        adam_learning_rate = learning_rate
    orthogonalize = optax.contrib.muon(
        -1.0,  # optax's sign
        ns_coeffs,
        ns_steps,
        beta=0.0,  # the momentum is in the updates
        eps=eps,
        nesterov=False,
        adaptive=adaptive,
        preconditioning=preconditioning,  # pyright: ignore[reportArgumentType]
        muon_weight_dimension_numbers=muon_weight_dimension_numbers,
        consistent_rms=consistent_rms,
    )
    muon = [
        before_others(_momentum_rule(beta, nesterov), options, ScaleByPagedMuon8bitState),
        _stateless(orthogonalize),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    ]
    adam = Rule("adam", b1=adam_b1, b2=adam_b2, eps=eps, eps_root=adam_eps_root, nesterov=nesterov)
    adamw = descend(
        adam, adam_learning_rate, part_of(options), ScaleByPagedAdam8bitState, adam_weight_decay
    )
    parts: dict[Any, Any] = {"muon": compose(part_of(options), *muon), "adam": adamw}
    labels = _labels(muon_weight_dimension_numbers)
    return compose(options, optax.partition(parts, labels))


def momentum(
    beta: jax.typing.ArrayLike, nesterov: bool, options: Options
) -> optax.GradientTransformationExtraArgs:
    """The bias-corrected momentum alone."""
    return transformation(_momentum_rule(beta, nesterov), options, ScaleByPagedMuon8bitState)


def _momentum_rule(beta: jax.typing.ArrayLike, nesterov: bool) -> Rule:
    return Rule("muon", beta=beta, nesterov=nesterov)


def _stateless(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation whose state does not matter, with a fresh one in each step."""

    def init_fn(params):
        jax.eval_shape(tx.init, params)  # raises what it has to say
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax's powers of counts need it
            return tx.update(updates, tx.init(updates), params)[0], state

    return optax.GradientTransformation(init_fn, update_fn)


def _labels(numbers: Any) -> Callable[[Any], Any]:
    """Which part of the partition each parameter belongs to, as in optax."""

    def is_number(node: Any) -> bool:
        return node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)

    def labels(params):
        if numbers is None:
            return jax.tree.map(lambda x: "muon" if x.ndim == 2 else "adam", params)
        tree = numbers(params) if callable(numbers) else numbers
        return jax.tree.map(
            lambda number, part: jax.tree.map(lambda _: "adam" if number is None else "muon", part),
            tree,
            params,
            is_leaf=is_number,
        )

    return labels
