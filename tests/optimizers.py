"""The table of optimizers, one row each, and what the NumPy reference makes of a row.

`test_contracts.py` runs every row through every contract.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pytest

import paged_optax
from helpers import (
    FORMATS,
    leaf_key,
    make_options,
    muon_momentum,
    reference,
    same_bits,
    stored_leaves,
)
from paged_optax import Quantization, moments


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A row.

    Attributes:
      name: of the row.
      direction: makes the transformation without a learning rate; takes the shared options.
      descent: makes the one with a learning rate, which is its first argument; None if there is
        none.
      optax: what makes the same as `descent` in optax.
      rule: its name in the reference.
      hyperparams: the reference's, of the values that the factories have by default.
      states: names of its moments, as `moments` and optax call them.
      flags: of the reference's rule.
      weight_decay: what `descent` has by default.
      formats: that can store its moments.
      rtol, atol: how close updates with float32 moments are to optax's.
      marks: of its tests. Of rows that share their arithmetic with another one most are slow.
        Those that are not belong to ``pytest -m fast``.
    """

    name: str
    direction: Callable[..., optax.GradientTransformation]
    descent: Callable[..., optax.GradientTransformation] | None
    optax: Callable[..., optax.GradientTransformation] | None
    rule: str
    hyperparams: Any
    states: tuple[str, ...]
    flags: dict[str, bool] = dataclasses.field(default_factory=dict)
    weight_decay: float = 0.0
    formats: tuple[str, ...] = tuple(FORMATS)
    rtol: float = 6e-5  # optax's bias correction is less exact: test_reference.py
    atol: float = 1e-6
    marks: tuple[Any, ...] = (pytest.mark.fast,)

    @property
    def param(self):
        """For `pytest.mark.parametrize`."""
        return pytest.param(self, id=self.name, marks=self.marks)


ADAM = {
    "direction": paged_optax.scale_by_paged_adam8bit,
    "descent": paged_optax.paged_adam8bit,
    "optax": optax.adam,
    "rule": "adam",
    "hyperparams": reference.Hyperparams(),
    "states": ("mu", "nu"),
}
NESTEROV = {
    "direction": functools.partial(paged_optax.scale_by_paged_adam8bit, nesterov=True),
    "descent": functools.partial(paged_optax.paged_adam8bit, nesterov=True),
    "optax": optax.nadam,
    "flags": {"nesterov": True},
}
ADAMW = {"descent": paged_optax.paged_adamw8bit, "optax": optax.adamw, "weight_decay": 1e-4}

RMS_OF_TORCH = {
    "decay": 0.99,
    "initial_scale": 0.5,
    "eps_in_sqrt": False,
    "bias_correction": True,
}
# A larger eps than by default: after the first steps a variance is a difference of nearly equal
# numbers.
CENTERED = {"eps": 1e-4, "initial_scale": 0.1}
SLOW = (pytest.mark.slow,)


def _options(replay=False, non_finite="propagate", quantization=None, paging=None):
    return make_options(
        replay=replay, non_finite=non_finite, quantization=quantization, paging=paging
    )


OPTIMIZERS = [
    Optimizer("adam", **ADAM),
    Optimizer("nadam", **ADAM | NESTEROV),
    Optimizer("adamw", **ADAM | ADAMW),
    Optimizer(
        "lion",
        direction=paged_optax.scale_by_paged_lion8bit,
        descent=paged_optax.paged_lion8bit,
        optax=optax.lion,
        rule="lion",
        hyperparams=reference.LionHyperparams(),
        states=("mu",),
        weight_decay=1e-3,
    ),
    Optimizer(
        "sgd",
        direction=functools.partial(paged_optax.scale_by_paged_trace8bit, 0.9),
        descent=functools.partial(paged_optax.paged_sgd8bit, momentum=0.9),
        optax=functools.partial(optax.sgd, momentum=0.9),
        rule="trace",
        hyperparams=reference.DecayHyperparams(0.9),
        states=("trace",),
    ),
    Optimizer(
        "nesterov",
        direction=functools.partial(paged_optax.scale_by_paged_trace8bit, 0.8, nesterov=True),
        descent=functools.partial(paged_optax.paged_sgd8bit, momentum=0.8, nesterov=True),
        optax=functools.partial(optax.sgd, momentum=0.8, nesterov=True),
        rule="trace",
        hyperparams=reference.DecayHyperparams(0.8),
        states=("trace",),
        flags={"nesterov": True},
        marks=SLOW,
    ),
    Optimizer(
        "ema",
        direction=functools.partial(paged_optax.scale_by_paged_ema8bit, 0.9),
        descent=None,
        optax=None,
        rule="ema",
        hyperparams=reference.DecayHyperparams(0.9),
        states=("ema",),
        flags={"debias": True},
        marks=SLOW,
    ),
    Optimizer(
        "signum",
        direction=paged_optax.scale_by_paged_signum8bit,
        descent=paged_optax.paged_signum8bit,
        optax=optax.signum,
        rule="ema",
        hyperparams=reference.DecayHyperparams(0.9),
        states=("ema",),
        flags={"sign": True},
        marks=SLOW,
    ),
    Optimizer(
        "muon",
        direction=lambda **options: muon_momentum(0.95, True, _options(**options)),
        descent=None,
        optax=None,
        rule="muon",
        hyperparams=reference.MuonHyperparams(),
        states=("mu",),
        flags={"nesterov": True},
        marks=SLOW,
    ),
    Optimizer(
        "rmsprop",
        direction=paged_optax.scale_by_paged_rms8bit,
        descent=paged_optax.paged_rmsprop8bit,
        optax=optax.rmsprop,
        rule="rms",
        hyperparams=reference.RmsHyperparams(),
        states=("nu",),
        flags={"eps_in_sqrt": True},
    ),
    Optimizer(
        "rmsprop_of_torch",
        direction=functools.partial(paged_optax.scale_by_paged_rms8bit, **RMS_OF_TORCH),
        descent=functools.partial(paged_optax.paged_rmsprop8bit, **RMS_OF_TORCH),
        optax=functools.partial(optax.rmsprop, **RMS_OF_TORCH),
        rule="rms",
        hyperparams=reference.RmsHyperparams(0.99, 1e-8, 0.5),
        states=("nu",),
        flags={"bias_correction": True},
        marks=SLOW,
    ),
    Optimizer(
        "centered",
        direction=functools.partial(paged_optax.scale_by_paged_stddev8bit, **CENTERED),
        descent=functools.partial(paged_optax.paged_rmsprop8bit, centered=True, **CENTERED),
        optax=functools.partial(optax.rmsprop, centered=True, **CENTERED),
        rule="stddev",
        hyperparams=reference.RmsHyperparams(0.9, 1e-4, 0.1),
        states=("mu", "nu"),
        flags={"eps_in_sqrt": True},
        marks=SLOW,
    ),
    Optimizer(
        "adagrad",
        direction=paged_optax.scale_by_paged_rss8bit,
        descent=paged_optax.paged_adagrad8bit,
        optax=optax.adagrad,
        rule="rss",
        hyperparams=reference.RssHyperparams(),
        states=("sum_of_squares",),
        marks=SLOW,
    ),
    Optimizer(
        "ademamix",
        direction=functools.partial(paged_optax.scale_by_paged_ademamix8bit, alpha=5.0),
        descent=paged_optax.paged_ademamix8bit,
        optax=optax.contrib.ademamix,
        rule="ademamix",
        hyperparams=reference.AdemamixHyperparams(alpha=5.0),
        states=("m1", "m2", "nu"),
    ),
]
DESCENTS = [row for row in OPTIMIZERS if row.descent is not None]
BY_NAME = {row.name: row for row in OPTIMIZERS}


@dataclasses.dataclass(frozen=True)
class Specification:
    """A run over a flat dict of leaves on one device, as the NumPy reference has it: a value.

    Attributes:
      optimizer: the row.
      quantization: as the optimizer's option.
      rounding: None for a direction, or the `param_rounding` of a descent.
      skip_elements: whether `non_finite` is "skip_element".
      leaves: stored states by the names of leaves.
      residuals: of parameters, by the names of leaves.
      count: steps taken.
    """

    optimizer: Optimizer
    quantization: Quantization
    rounding: str | None
    skip_elements: bool
    leaves: dict[str, Any]
    residuals: dict[str, np.ndarray]
    count: int = 0

    @classmethod
    def fresh(cls, optimizer, params, quantization=None, rounding=None, skip_elements=False):
        quantization = quantization or Quantization()

        def init(size):
            quantized = size >= quantization.min_size
            return reference.init_leaf(size, quantized, quantization.codec, rule=optimizer.rule)

        zero = np.uint8(reference.ZERO_RESIDUAL)
        return cls(
            optimizer,
            quantization,
            rounding,
            skip_elements,
            {name: init(param.size) for name, param in params.items()},
            {name: np.full(param.size, zero) for name, param in params.items()},
        )

    def update(self, grads, params=None, learning_rate=0.0, weight_decay=0.0, masked=()):
        """Updates, and the specification after the step; `masked` leaves do not decay."""
        updates, residuals = {}, dict(self.residuals)
        directions, leaves = self._directions(grads)
        for name, grad in grads.items():
            if self.rounding is None:
                with np.errstate(over="ignore"):
                    update = directions[name].astype(grad.dtype)
            else:
                update, residuals[name] = reference.update_params(
                    directions[name],
                    np.ravel(params[name]),
                    self.residuals[name],
                    self._random_bits(name, grad.size),
                    reference.ParamHyperparams(learning_rate, weight_decay),
                    grad.dtype,
                    self.rounding,
                    name not in masked,
                )
            updates[name] = update.reshape(grad.shape)
        return updates, self._after(leaves, residuals)

    def step(self, grads, params, learning_rate, weight_decay=0.0, masked=()):
        """Parameters, and the specification, after a step in place."""
        results, residuals = {}, dict(self.residuals)
        directions, leaves = self._directions(grads)
        for name, param in params.items():
            result, residuals[name] = reference.step_params(
                directions[name],
                np.ravel(param),
                self.residuals[name],
                self._random_bits(name, param.size),
                reference.ParamHyperparams(learning_rate, weight_decay),
                self.rounding or "nearest",
                name not in masked,
            )
            results[name] = result.reshape(param.shape)
        return results, self._after(leaves, residuals)

    def _directions(self, grads):
        directions, leaves = {}, dict(self.leaves)
        for name, grad in grads.items():
            directions[name], leaves[name] = reference.directions(
                np.asarray(grad),
                self.leaves[name],
                self.count,
                self.optimizer.hyperparams,
                **self.optimizer.flags,
                rule=self.optimizer.rule,
                skip_elements=self.skip_elements,
                leaf_key=leaf_key(name, self.quantization.seed),
            )
        return directions, leaves

    def _random_bits(self, name, size):
        key = leaf_key(name, self.quantization.seed)
        return reference.random_bits(key, self.count, 0, size)

    def _after(self, leaves, residuals):
        return dataclasses.replace(self, leaves=leaves, residuals=residuals, count=self.count + 1)

    def moments(self, shapes):
        """Float32 values: a dict of the optimizer's states, each a dict of leaves."""
        signed = reference.RULES[self.optimizer.rule].signed
        values = {state: {} for state in self.optimizer.states}
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            decoded = reference.decode(self.leaves[name], signed, size)
            for state, moment in zip(self.optimizer.states, decoded, strict=True):
                values[state][name] = np.asarray(moment)[:size].reshape(shape)
        return values


def moments_of(optimizer, state):
    """What `paged_optax.moments` says, as a dict of the optimizer's states."""
    found = moments(state)
    return {name: getattr(found, name) for name in optimizer.states}


def assert_stored(stored, expected, what=""):
    """The bytes stored of a leaf's states, against those of the reference; padding is zero."""
    if isinstance(expected[0], tuple):  # codes and words, or codes alone, of each state
        expected = [part for parts in zip(*expected, strict=True) for part in parts]
    for actual, part in zip(stored, expected, strict=True):
        same_bits(actual[: part.size], part, what)
        padding = actual[part.size :]
        assert not padding.any(), f"{what}: padding is not zero; does a rule move states of zero?"


def assert_as_specified(state, specification, what=""):
    """Everything that a state on one device stores."""
    names = sorted(specification.leaves)  # as in a tree
    for name, stored in zip(names, stored_leaves(state), strict=True):
        assert_stored(stored, specification.leaves[name], f"{name} {what}")
