"""An optimizer's rule: its name, its hyperparameters and its flags, checked against the tables."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._tables import RULES, rule_number
from ._validate import check_range


class Rule:
    """A rule with the values of its hyperparameters and flags, as in ``Rule("adam", b1=0.9, ...)``.

    Args:
      name: of the rule, as in `_tables.RULES`.
      schedules: the hyperparameters that may also be schedules.
      **values: all of its hyperparameters (floats or traced scalars) and flags (bools), by name.

    Raises:
      ValueError: for a hyperparameter outside its domain, where given as a Python number.
      TypeError: for anything but a number, and for other names than those of the rule.
    """

    def __init__(self, name: str, *, schedules: Collection[str] = (), **values: Any):
        self.number = rule_number(name)
        row = RULES[self.number]
        hyperparams, flags = row["hyperparams"], row["flags"]
        names = [key for key, _ in hyperparams] + flags
        if sorted(values) != sorted(names):
            raise TypeError(f"rule {name} takes {', '.join(names)}, not {', '.join(values)}")
        self._ranges = [(key, 1.0 if domain == "decay" else np.inf) for key, domain in hyperparams]
        for key, below in self._ranges:
            if not (key in schedules and callable(values[key])):
                check_range(key, values[key], below)
        self._values = values
        self.flags = sum(bool(values[key]) << bit for bit, key in enumerate(flags))

    def hyperparams(self, count: jax.Array) -> tuple[jax.typing.ArrayLike, ...]:
        """Those of the step after `count` steps, in the operand's order."""
        return tuple(self._at(key, below, count) for key, below in self._ranges)

    def _at(self, key: str, below: float, count: jax.Array) -> jax.typing.ArrayLike:
        value = self._values[key]
        if not callable(value):
            return value
        scheduled: Any = value(count)
        check_range(f"{key}, from its schedule,", scheduled, below)
        return scheduled


def stack(scalars: tuple[jax.typing.ArrayLike, ...]) -> jax.typing.ArrayLike:
    """Hyperparameters as the operand that the kernel reads: a constant unless one is traced."""
    if any(isinstance(x, jax.Array) for x in scalars):
        return jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars])
    return np.array(scalars, np.float32)
