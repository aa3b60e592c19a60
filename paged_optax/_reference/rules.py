"""What an optimizer does to the float32 states of a leaf. Knows no formats.

References:
  Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_,
  2014. Chen et al., `Symbolic Discovery of Optimization Algorithms
  <https://arxiv.org/abs/2302.06675>`_, 2023.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .formats import Quantized, Squares


class Rule(NamedTuple):
    """An optimizer: what it does in a step, and what its states are.

    ``step(grad, *states, count, hyperparams, skip_elements=..., **flags)`` takes flat float32
    arrays and returns the direction and the new states.
    """

    step: Callable[..., Any]
    state: Callable[..., Any]  # makes a NamedTuple of what is stored of each state
    signed: tuple[bool, ...]  # of each state, whether it can be negative


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


def bound_ratios(mu, nu, hyperparams: Hyperparams):
    """First moments as a format stores them that stores ratios to the root of the second ones.

    With ``b1^2 > b2`` that ratio grows while an element has no gradients, and would leave the other
    elements of its block no precision. A first moment above ``sqrt(2 nu)`` becomes 0. No gradients
    but shrinking ones lead there.
    """
    f32 = np.float32
    b1, b2 = f32(hyperparams.b1), f32(hyperparams.b2)
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and b1 * b1 > b2):
        return mu
    with np.errstate(all="ignore"):
        return np.where(mu * mu > f32(2) * nu, f32(0), mu)


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


class LeafState(NamedTuple):
    """Adam's moments of one leaf: `Quantized` in the ``dynamic`` code, or flat float32 arrays."""

    mu: Quantized | np.ndarray
    nu: Quantized | np.ndarray


class LionState(NamedTuple):
    """Lion's moment of one leaf: `Quantized`, `Squares`, or a flat float32 array."""

    mu: Quantized | Squares | np.ndarray


RULES = {
    "adam": Rule(adam, LeafState, signed=(True, False)),
    "lion": Rule(lion, LionState, signed=(True,)),
}
