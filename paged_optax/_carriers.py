"""Lets what copies or saves an optimizer state by itself carry the moments: pickle, deepcopy, flax.

All of them treat a `Token` as one object, and ask here what it consists of: the token's array, and
the moments as a dict of arrays. A token without moments in this process (released, not the newest,
or made elsewhere) is carried alone, and is refused when it is used.
"""

import copyreg
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import _ext
from ._after_import import after_import
from ._arrays import from_arrays, to_arrays
from ._ffi import TOKEN_SHAPE
from ._state import Token, new_token
from ._transfer import opened, stage

Moments = dict[str, np.ndarray]


def _moments_of(token: Token) -> Moments | None:
    """A copy of the moments that a token stands for; None if there are none to be had."""
    value = token.value
    if isinstance(value, Tracer) or not isinstance(value, jax.Array | np.ndarray):
        return None
    if value.dtype != jnp.int32 or value.shape != TOKEN_SHAPE:
        return None  # a state that was cast or stacked
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None  # other processes have a part
    handle = int(np.asarray(value)[0])
    if not _ext.is_alive(handle):
        return None
    try:
        with opened(value) as contents:
            return to_arrays([contents])
    except _ext.StateRefused:  # not the newest, or released meanwhile
        return None


def _restore(value: Any, moments: Mapping[str, Any] | None) -> Token:
    """A token for moments that were carried with `value`."""
    if moments is None:
        return Token(value)
    (contents,), _ = from_arrays(moments)
    if contents is None:
        return new_token(num_leaves=1)
    return Token(jnp.asarray(stage(contents)))


def _reduce(token: Token) -> tuple[Any, ...]:
    return _restore, (token.value, _moments_of(token))


def _to_state_dict(token: Token) -> dict[str, Any]:
    moments = _moments_of(token)
    return {"value": token.value} if moments is None else {"value": token.value, "moments": moments}


def _from_state_dict(token: Token, state: dict[str, Any]) -> Token:
    del token
    return _restore(state["value"], state.get("moments"))


def _register_with_flax() -> None:
    from flax import serialization  # which is imported already

    serialization.register_serialization_state(
        Token, _to_state_dict, _from_state_dict, override=True
    )


copyreg.pickle(Token, _reduce)  # pyright: ignore[reportArgumentType]
after_import("flax.serialization", _register_with_flax)
