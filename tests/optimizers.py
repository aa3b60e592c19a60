"""The table of optimizers, one row each, and what the NumPy reference makes of a row.

`test_contracts.py` runs every row through every contract.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

import paged_optax
from helpers import FORMATS, leaf_key, reference, same_bits, stored_leaves
from paged_optax import Quantization, moments


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A row.

    Attributes:
      name: of the row.
      direction: makes the transformation without a learning rate; takes the shared options.
      descent: makes the one with a learning rate, which is its first argument.
      optax: what makes the same as `descent` in optax.
      rule: its name in the reference.
      hyperparams: the reference's, of the values that the factories have by default.
      states: names of its moments, as `moments` and optax call them.
      flags: of the reference's rule.
      weight_decay: what `descent` has by default.
      formats: that can store its moments.
      rtol, atol: how close updates with float32 moments are to optax's.
    """

    name: str
    direction: Callable[..., optax.GradientTransformation]
    descent: Callable[..., optax.GradientTransformation]
    optax: Callable[..., optax.GradientTransformation]
    rule: str
    hyperparams: Any
    states: tuple[str, ...]
    flags: dict[str, bool] = dataclasses.field(default_factory=dict)
    weight_decay: float = 0.0
    formats: tuple[str, ...] = tuple(FORMATS)
    rtol: float = 6e-5  # optax's bias correction is less exact: test_reference.py
    atol: float = 1e-6


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
]
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
            quantized = quantization.codec != "float32" and size >= quantization.min_size
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
    if isinstance(expected[0], reference.Quantized | reference.Squares):
        expected = [*(state.codes for state in expected), *(state.scales for state in expected)]
    for actual, part in zip(stored, expected, strict=True):
        same_bits(actual[: part.size], part, what)
        assert not actual[part.size :].any(), what


def assert_as_specified(state, specification, what=""):
    """Everything that a state on one device stores."""
    names = sorted(specification.leaves)  # as in a tree
    for name, stored in zip(names, stored_leaves(state), strict=True):
        assert_stored(stored, specification.leaves[name], f"{name} {what}")
