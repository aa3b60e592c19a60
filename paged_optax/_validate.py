"""Checks of arguments, with errors that name the problem, the value and the remedy."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def check_range(name: str, value: jax.typing.ArrayLike, below: float = np.inf) -> None:
    """Accepts a scalar from 0 to below `below`, and any traced scalar."""
    if np.ndim(value) != 0:
        raise ValueError(f"{name} has shape {np.shape(value)}; it must be a scalar")
    if callable(value) or value is None or isinstance(value, str):
        raise TypeError(
            f"{name} is {value!r}; it must be a number. For a schedule use"
            " optax.inject_hyperparams(...)"
        )
    # float32, as the kernel sees it: 0.99999999 is 1 there.
    if isinstance(value, float | int | np.floating) and not 0 <= float(np.float32(value)) < below:
        allowed = "at least 0" if below == np.inf else "in [0, 1) as float32"
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def check_rate(name: str, value: Any) -> None:
    """Accepts a learning rate or the like: a scalar, or a schedule of scalars."""
    if value is None or isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; it must be a number or a schedule of numbers")
    if not callable(value) and np.ndim(value) != 0:
        raise ValueError(f"{name} has shape {np.shape(value)}; it must be a scalar")


def check_decay(value: Any) -> None:
    """Accepts a weight decay, and no dtype, which `optax.adamw` takes in its place."""
    if isinstance(value, type | np.dtype) or hasattr(value, "dtype") and callable(value):
        raise TypeError(
            f"weight_decay is {value}, a dtype: optax has mu_dtype in this place, which paged"
            " optimizers do not take (moments have 8 bits). Pass weight_decay and mask by keyword."
        )
    check_rate("weight_decay", value)


def check_no_dtype(name: str, value: Any) -> None:
    """Accepts None, which trainers pass on to whatever optimizer there is."""
    if value is not None:
        raise TypeError(
            f"{name} is {value!r}; it can only be None, because Quantization says how moments are"
            " stored: 8 bits each by default, Quantization('float32') for float32"
        )


def check_kind(name: str, value: Any, kind: type) -> None:
    """Accepts an instance of a public class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}; it must be a paged_optax.{kind.__name__}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Accepts one of several names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def check_flag(name: str, value: Any) -> bool:
    """Accepts the leaf of a mask, True or False and not traced, and returns it."""
    if isinstance(value, Tracer):
        raise TypeError(f"{name} has a traced value; its leaves must be known: True or False")
    if np.ndim(value) != 0 or np.asarray(value).dtype != bool:
        raise TypeError(f"{name} has the leaf {value!r}; its leaves must be True or False")
    return bool(value)


def check_dtypes(kind: str, leaves: list[tuple[Any, Any]]) -> None:
    """Accepts leaves, with their paths, that have a type which the kernel reads."""
    for path, leaf in leaves:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype
        if isinstance(leaf, np.ndarray | np.generic):
            dtype = jax.dtypes.canonicalize_dtype(dtype)  # as jax will take it
        if isinstance(dtype, np.dtype) and not dtype.isnative:
            raise TypeError(
                f"{kind} {leaf_name(path)} has dtype {dtype}, in the byte order of another machine,"
                " which JAX does not take. Convert it: leaf.astype(leaf.dtype.newbyteorder('='))"
            )
        if dtype not in FLOATS:
            raise TypeError(
                f"{kind} {leaf_name(path)} has dtype {dtype}; paged optimizers take float32,"
                " bfloat16 and float16. Cast it, or keep it out with optax.masked or"
                " optax.partition."
            )


def check_shapes(grads: list[tuple[Any, Any]], params: optax.Params | None) -> None:
    """Compares gradients with the parameters, if given. The kernel compares with the moments."""
    if params is None:
        return
    leaves = jax.tree.leaves(params)
    if len(leaves) != len(grads):
        raise ValueError(
            f"there are {len(grads)} gradients but {len(leaves)} parameters; pass to update the"
            " gradients of these parameters"
        )
    for (path, grad), param in zip(grads, leaves, strict=True):
        if np.shape(grad) != np.shape(param):
            raise ValueError(
                f"gradient {leaf_name(path)} has shape {np.shape(grad)} but its parameter has shape"
                f" {np.shape(param)}"
            )


def leaf_name(path: Any) -> str:
    """The path of a leaf, for messages."""
    return jax.tree_util.keystr(path) or "leaf"
