"""What an optimizer does to the float32 states of a leaf. Knows no formats.

References:
  Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_,
  2014. Chen et al., `Symbolic Discovery of Optimization Algorithms
  <https://arxiv.org/abs/2302.06675>`_, 2023. Sutskever et al., `On the importance of initialization
  and momentum in deep learning <http://proceedings.mlr.press/v28/sutskever13.pdf>`_, 2013. Hinton,
  `Overview of mini-batch gradient descent`, 2012. Graves, `Generating Sequences With Recurrent
  Neural Networks <https://arxiv.org/abs/1308.0850>`_, 2013. Duchi et al., `Adaptive Subgradient
  Methods <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011. Pagliardini et al., `The AdEMAMix
  Optimizer <https://arxiv.org/abs/2409.03137>`_, 2024.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .formats import Halves, Quantized, Squares, Window


class Rule(NamedTuple):
    """An optimizer: what it does in a step, and what its states are.

    ``step(grad, *states, count, hyperparams, skip_elements=..., **flags)`` takes flat float32
    arrays and returns the direction and the new states.
    """

    step: Callable[..., Any]
    state: Callable[..., Any]  # makes a NamedTuple of what is stored of each state
    signed: tuple[bool, ...]  # of each state, whether it can be negative
    # Takes states and hyperparameters, and returns the states as a format stores them that stores
    # ratios to the root of the one that is never negative.
    bound: Callable[..., Any] = lambda states, hyperparams: states
    # Takes the hyperparameters, and returns the value at which the state starts that is never
    # negative.
    initial: Callable[..., float] = lambda hyperparams: 0.0


class Hyperparams(NamedTuple):
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0


def adam(
    grad,
    mu,
    nu,
    count: int,
    hyperparams: Hyperparams,
    nesterov: bool = False,
    skip_elements: bool = False,
):
    """One Adam step on flat float32 arrays.

    Args:
      grad: gradients.
      mu: first moments before the step.
      nu: second moments before the step.
      count: number of steps already taken.
      hyperparams: b1, b2, eps, eps_root.
      nesterov: whether to use Nesterov momentum (Dozat, 2016).
      skip_elements: whether an element whose gradient cannot be used is skipped.

    Returns:
      ``(update, mu, nu)``, float32. Where a gradient is not finite, or at least 2^64 (its square
      overflows), the moments are unchanged and the update is NaN; with `skip_elements` it is that
      of a first moment of 0.
    """
    f32 = np.float32
    b1, b2, eps, eps_root = (f32(x) for x in hyperparams)
    if not (0 <= b1 < 1 and 0 <= b2 < 1):  # only a traced value can be outside
        return np.full_like(mu, np.nan), mu, nu
    one_minus_b1, one_minus_b2 = f32(1) - b1, f32(1) - b2
    t = count + 1
    c1, c2 = 1.0 - _power(b1, t), 1.0 - _power(b2, t)
    if nesterov:
        mu_scale = f32(float(b1) / (1.0 - _power(b1, t + 1)))
        grad_scale = f32(float(one_minus_b1) / c1)
    else:
        mu_scale, grad_scale = f32(1.0 / c1), f32(0)
    nu_scale = f32(1.0 / c2)
    with np.errstate(all="ignore"):
        new_mu = b1 * mu + one_minus_b1 * grad
        new_nu = b2 * nu + one_minus_b2 * grad * grad
        used = (np.abs(grad) < f32(2.0**64)) & np.isfinite(new_nu)  # and then mu is finite too
        mu_hat = new_mu * mu_scale + grad * grad_scale if nesterov else new_mu * mu_scale
        mu_hat = np.where(used, mu_hat, f32(0 if skip_elements else np.nan))
        new_mu, new_nu = np.where(used, new_mu, mu), np.where(used, new_nu, nu)
        update = mu_hat * (f32(1) / (np.sqrt(new_nu * nu_scale + eps_root) + eps))
    return update, new_mu, new_nu


def bound_ratio(mu, nu, decay: float, b2: float):
    """A first moment as a format stores it that stores ratios to the root of the second one.

    With ``decay^2 > b2`` that ratio grows while an element has no gradients, and would leave the
    other elements of its block no precision. A first moment above ``sqrt(2 nu)`` becomes 0. No
    gradients but shrinking ones lead there.
    """
    f32 = np.float32
    if not f32(decay) * f32(decay) > f32(b2):
        return mu
    with np.errstate(all="ignore"):
        return np.where(mu * mu > f32(2) * nu, f32(0), mu)


def _bound_adam(states, hyperparams: Hyperparams):
    mu, nu = states
    b1, b2 = hyperparams.b1, hyperparams.b2
    return [bound_ratio(mu, nu, b1, b2) if _are_decays(b1, b2) else mu, nu]


def _are_decays(*rates: Any) -> bool:
    return all(0 <= np.float32(rate) < 1 for rate in rates)


class LionHyperparams(NamedTuple):
    b1: float = 0.9
    b2: float = 0.99


def lion(grad, mu, count: int, hyperparams: LionHyperparams, skip_elements: bool = False):
    """One Lion step on flat float32 arrays; arguments and results as those of `adam`."""
    del count
    f32 = np.float32
    b1, b2 = (f32(x) for x in hyperparams)
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        return np.full_like(mu, np.nan), mu
    with np.errstate(all="ignore"):
        used = np.abs(grad) < f32(2.0**64)
        sign = np.sign(b1 * mu + (f32(1) - b1) * grad) + f32(0)  # no -0.0
        new_mu = b2 * mu + (f32(1) - b2) * grad
    direction = np.where(used, sign, f32(0 if skip_elements else np.nan))
    return direction, np.where(used, new_mu, mu)


class DecayHyperparams(NamedTuple):
    decay: float = 0.9


def trace(
    grad,
    trace,
    count: int,
    hyperparams: DecayHyperparams,
    nesterov: bool = False,
    skip_elements: bool = False,
):
    """One step of momentum on flat float32 arrays; arguments and results as those of `adam`."""
    del count
    f32 = np.float32
    (decay,) = (f32(x) for x in hyperparams)
    p, q = (decay * decay, f32(1) + decay) if nesterov else (decay, f32(1))
    return _momentum(grad, trace, p, q, decay, f32(1), _are_decays(decay), skip_elements)


def ema(
    grad,
    ema,
    count: int,
    hyperparams: DecayHyperparams,
    debias: bool = False,
    sign: bool = False,
    skip_elements: bool = False,
):
    """One step of a moving average, or of its sign; arguments and results as those of `adam`."""
    f32 = np.float32
    (decay,) = (f32(x) for x in hyperparams)
    rest = f32(1) - decay
    bias = 1.0 - _power(decay, count + 1) if debias else 1.0
    with np.errstate(all="ignore"):  # a decay rate of 1
        p, q = f32(np.float64(decay) / bias), f32(np.float64(rest) / bias)
    direction, ema = _momentum(grad, ema, p, q, decay, rest, _are_decays(decay), skip_elements)
    return (np.sign(direction) + f32(0) if sign else direction), ema


class MuonHyperparams(NamedTuple):
    beta: float = 0.95


def muon(
    grad,
    mu,
    count: int,
    hyperparams: MuonHyperparams,
    nesterov: bool = False,
    skip_elements: bool = False,
):
    """One step of Muon's momentum; arguments and results as those of `adam`."""
    f32, f64 = np.float32, np.float64
    (beta,) = (f32(x) for x in hyperparams)
    rest = f32(1) - beta
    with np.errstate(all="ignore"):  # a decay rate of 1
        bias = f64(1.0 - _power(beta, count + 1))
        of_mean = f64(beta) / (1.0 - _power(beta, count + 2)) if nesterov else 1.0 / bias
        of_grad = f64(rest) / bias if nesterov else f64(0)
        p, q = f32(f64(beta) * of_mean), f32(f64(rest) * of_mean + of_grad)
    return _momentum(grad, mu, p, q, beta, rest, _are_decays(beta), skip_elements)


def _momentum(grad, mu, p, q, a, c, is_valid: bool, skip_elements: bool):
    """The direction ``p mu + q grad``, and the new state ``a mu + c grad``."""
    f32 = np.float32
    if not is_valid:
        return np.full_like(mu, np.nan), mu
    with np.errstate(all="ignore"):
        used = np.abs(grad) < f32(2.0**64)
        direction, new_mu = p * mu + q * grad, a * mu + c * grad
    direction = np.where(used, direction, f32(0 if skip_elements else np.nan))
    return direction, np.where(used, new_mu, mu)


class RmsHyperparams(NamedTuple):
    decay: float = 0.9
    eps: float = 1e-8
    initial_scale: float = 0.0


def rms(
    grad,
    nu,
    count: int,
    hyperparams: RmsHyperparams,
    eps_in_sqrt: bool = False,
    bias_correction: bool = False,
    skip_elements: bool = False,
):
    """One step of RMSprop on flat float32 arrays; arguments and results as those of `adam`."""
    f32 = np.float32
    decay, eps, initial = (f32(x) for x in hyperparams)
    if not (_are_decays(decay) and _is_initial(initial)):
        return np.full_like(nu, np.nan), nu
    bias = 1.0 - _power(decay, count + 1) if bias_correction else 1.0
    root = f32(1.0 / bias), eps if eps_in_sqrt else f32(0), f32(0) if eps_in_sqrt else eps
    used, nu = _add_squares(grad, nu, decay, f32(1) - decay)
    return _over_root(_usable(grad, used, skip_elements), nu, *root), nu


class RssHyperparams(NamedTuple):
    initial_accumulator_value: float = 0.1
    eps: float = 1e-7


def rss(grad, nu, count: int, hyperparams: RssHyperparams, skip_elements: bool = False):
    """One step of Adagrad on flat float32 arrays; arguments and results as those of `adam`."""
    del count
    f32 = np.float32
    initial, eps = (f32(x) for x in hyperparams)
    if not _is_initial(initial):
        return np.full_like(nu, np.nan), nu
    used, nu = _add_squares(grad, nu, f32(1), f32(1))
    direction = _over_root(_usable(grad, used, skip_elements), nu, f32(1), eps, f32(0))
    return np.where(nu == 0, f32(0), direction), nu


def stddev(
    grad,
    mu,
    nu,
    count: int,
    hyperparams: RmsHyperparams,
    eps_in_sqrt: bool = False,
    bias_correction: bool = False,
    skip_elements: bool = False,
):
    """One step of centered RMSprop; arguments and results as those of `adam`."""
    f32 = np.float32
    decay, eps, initial = (f32(x) for x in hyperparams)
    if not (_are_decays(decay) and _is_initial(initial)):
        return np.full_like(mu, np.nan), mu, nu
    rest = f32(1) - decay
    unbias = f32(1.0 / (1.0 - _power(decay, count + 1))) if bias_correction else f32(1)
    used, nu = _add_squares(grad, nu, decay, rest)
    with np.errstate(all="ignore"):
        mu = np.where(used, decay * mu + rest * grad, mu)
        mu_hat = mu * unbias
        variance = np.maximum(nu * unbias - mu_hat * mu_hat, f32(0))
    root = f32(1), eps if eps_in_sqrt else f32(0), f32(0) if eps_in_sqrt else eps
    return _over_root(_usable(grad, used, skip_elements), variance, *root), mu, nu


def _is_initial(value) -> bool:
    return bool(np.isfinite(value) and value >= 0)


def _initial(name: str) -> Callable[..., float]:
    def initial(hyperparams) -> float:
        value = getattr(hyperparams, name)
        return value if _is_initial(np.float32(value)) else 0.0

    return initial


def _add_squares(grad, nu, a, c):
    """Which gradients can be used, and the new second moments ``a nu + c grad^2``."""
    with np.errstate(all="ignore"):
        new_nu = a * nu + c * grad * grad
        used = (np.abs(grad) < np.float32(2.0**64)) & np.isfinite(new_nu)
    return used, np.where(used, new_nu, nu)


def _usable(grad, used, skip_elements: bool):
    return np.where(used, grad, np.float32(0 if skip_elements else np.nan))


def _over_root(values, nu, nu_scale, eps_root, eps):
    with np.errstate(all="ignore"):
        return values * (np.float32(1) / (np.sqrt(nu * nu_scale + eps_root) + eps))


class AdemamixHyperparams(NamedTuple):
    b1: float = 0.9
    b2: float = 0.999
    b3: float = 0.9999
    alpha: float = 6.0
    eps: float = 1e-8
    eps_root: float = 0.0


def ademamix(
    grad,
    m1,
    m2,
    nu,
    count: int,
    hyperparams: AdemamixHyperparams,
    skip_elements: bool = False,
):
    """One AdEMAMix step on flat float32 arrays; arguments and results as those of `adam`."""
    f32 = np.float32
    b1, b2, b3, alpha, eps, eps_root = (f32(x) for x in hyperparams)
    if not _are_decays(b1, b2, b3):
        return np.full_like(nu, np.nan), m1, m2, nu
    t = count + 1
    fast_scale, nu_scale = f32(1.0 / (1.0 - _power(b1, t))), f32(1.0 / (1.0 - _power(b2, t)))
    used, nu = _add_squares(grad, nu, b2, f32(1) - b2)
    with np.errstate(all="ignore"):
        m1 = np.where(used, b1 * m1 + (f32(1) - b1) * grad, m1)
        m2 = np.where(used, b3 * m2 + (f32(1) - b3) * grad, m2)
        mix = m1 * fast_scale + alpha * m2
    return _over_root(_usable(mix, used, skip_elements), nu, nu_scale, eps_root, eps), m1, m2, nu


def _bound_ademamix(states, hyperparams: AdemamixHyperparams):
    m1, m2, nu = states
    b1, b2, b3 = hyperparams.b1, hyperparams.b2, hyperparams.b3
    if not _are_decays(b1, b2, b3):
        return states
    return [bound_ratio(m1, nu, b1, b2), bound_ratio(m2, nu, b3, b2), nu]


def _power(base: np.float32, exponent: int) -> float:
    """base ** exponent in float64, by squaring: the order of operations is part of the
    specification."""
    result, square = 1.0, float(base)
    while exponent:
        if exponent & 1:
            result *= square
        square *= square
        exponent >>= 1
    return result


# What is stored of a state: in the ``ratio`` format several states together are one object instead.
Stored = Quantized | Squares | Window | Halves | np.ndarray


class LeafState(NamedTuple):
    """Adam's moments of one leaf, and those of centered RMSprop."""

    mu: Stored
    nu: Stored


class LionState(NamedTuple):
    """Lion's moment of one leaf, and Muon's."""

    mu: Stored


class TraceState(NamedTuple):
    """The momentum of one leaf."""

    trace: Stored


class EmaState(NamedTuple):
    """The moving average of one leaf."""

    ema: Stored


class RmsState(NamedTuple):
    """RMSprop's moment of one leaf."""

    nu: Stored


class RssState(NamedTuple):
    """Adagrad's state of one leaf."""

    sum_of_squares: Stored


class AdemamixState(NamedTuple):
    """AdEMAMix's moments of one leaf."""

    m1: Stored
    m2: Stored
    nu: Stored


RULES = {
    "adam": Rule(adam, LeafState, signed=(True, False), bound=_bound_adam),
    "lion": Rule(lion, LionState, signed=(True,)),
    "trace": Rule(trace, TraceState, signed=(True,)),
    "ema": Rule(ema, EmaState, signed=(True,)),
    "muon": Rule(muon, LionState, signed=(True,)),
    "rms": Rule(rms, RmsState, signed=(False,), initial=_initial("initial_scale")),
    "rss": Rule(rss, RssState, signed=(False,), initial=_initial("initial_accumulator_value")),
    "stddev": Rule(stddev, LeafState, signed=(True, False), initial=_initial("initial_scale")),
    "ademamix": Rule(ademamix, AdemamixState, signed=(True, True, False), bound=_bound_ademamix),
}
