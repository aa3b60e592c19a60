"""An identity that refuses `jax.vmap` and differentiation, with an explanation.

The moments of a state are one memory outside JAX, so neither means anything. The custom call itself
is compiled inside `jax.jit`, where JAX would fail with a message about its internals.
"""

from typing import NoReturn

import jax
import jax.extend
from jax.interpreters import ad, batching, mlir

_guard_p = jax.extend.core.Primitive("paged_optax_guard")
_guard_p.multiple_results = True
_guard_p.def_impl(lambda *operands: operands)
_guard_p.def_abstract_eval(lambda *operands: operands)
mlir.register_lowering(_guard_p, lambda ctx, *operands: operands)


def guard(*operands: jax.Array) -> list[jax.Array]:
    """The operands as they are.

    Raises:
      NotImplementedError: under `jax.vmap`.
      TypeError: under differentiation.
    """
    return _guard_p.bind(*operands)


def _no_vmap(*args, **static) -> NoReturn:
    del args, static
    raise NotImplementedError(
        "a paged optimizer cannot be vmapped: its moments are one memory that every mapped copy"
        " would write to. Stack the models' parameters along a leading axis and update them as one"
        " tree, or step each model in a loop."
    )


def _no_gradient(*args, **static) -> NoReturn:
    del args, static
    raise TypeError(
        "a paged optimizer's update cannot be differentiated: its moments are outside JAX. Use"
        " optax.adamw to differentiate through a step, or jax.lax.stop_gradient on the gradients"
        " that go into it."
    )


batching.primitive_batchers[_guard_p] = _no_vmap
ad.primitive_jvps[_guard_p] = _no_gradient
