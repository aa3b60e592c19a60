"""Moving moments by hand, and freeing them."""

import functools
from typing import Any

from . import _ext
from ._bytes import check_bytes
from ._holding import postpone, postponed
from ._log import named, told
from ._refused import tell_refusals
from ._state import find_states, read_anyway, read_token
from ._states import StateInfo
from ._watch import await_steps


def evict(opt_state: Any, device_bytes: int = 0) -> int:
    """Takes moments out of GPU memory, and keeps them out until `prefetch`.

    Use it if something else outside of XLA's pool needs room, or XLA itself where it does not
    preallocate (``XLA_PYTHON_CLIENT_PREALLOCATE=false``). Returns when the moments are out, after
    saves on the same GPU. The device memory of managed moments then goes to the next allocation;
    until then ``nvidia-smi`` counts it as in use. The state can be updated meanwhile, and steps
    then work on the moments in host memory. Other states that are updated meanwhile may take the
    room. On the CPU, moments in a file are written out and leave RAM; others stay. States that were
    never updated have no moments to evict.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with paged states in it.
      device_bytes: bytes that each state may still have on each device.

    Returns:
      The number of bytes that were moved.

    Raises:
      ValueError: if there is no paged state, or for a negative number of bytes.
      RuntimeError: if the moments were released or are not in this process.
      MemoryError: if they could not be moved; they are then where they were.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> moved = paged_optax.evict(state)  # 2.03 MiB on a GPU
      >>> moved = paged_optax.prefetch(state)
    """
    limit = min(check_bytes("device_bytes", device_bytes), 2**63 - 1)
    with named("evict"):
        return told("evict moved %s of moments out of device memory", _limit(opt_state, limit))


def prefetch(opt_state: Any) -> int:
    """Brings moments into GPU memory, as far as there is room, and ends what `evict` asked for.

    Room is free memory beyond the headroom and within the budgets. Returns when the moments are in,
    after saves on the same GPU. Training does not need it: steps bring moments in by themselves
    once there has been room for a while. On the CPU, moments in a file are read ahead.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with paged states in it.

    Returns:
      The number of bytes that were moved.

    Raises:
      ValueError: if there is no paged state.
      RuntimeError: if the moments were released or are not in this process.
      MemoryError: if they could not be moved; they are then where they were.

    Example:
      >>> import tempfile, jax.numpy as jnp, paged_optax
      >>> paging = paged_optax.Paging(directory=tempfile.mkdtemp())  # on a GPU: Paging()
      >>> tx = paged_optax.scale_by_paged_adam8bit(paging=paging)
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> paged_optax.evict(state) > 1024**2
      True
      >>> paged_optax.memory_report(state).on_host > 1024**2
      True
      >>> moved = paged_optax.prefetch(state)
    """
    with named("prefetch"):
        return told("prefetch moved %s of moments into device memory", _limit(opt_state, -1))


def release(opt_state: Any) -> int:
    """Frees the moments of an optimizer state. The state cannot be updated any more.

    Waits for the steps under way, of all states and on every device. While the same thread saves or
    copies moments, as in a finalizer that the garbage collector runs there, it returns 0 and frees
    them when that ends.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with paged states in it, of any
        version; or an entry of `states`, or a list of such entries.

    Returns:
      The number of bytes freed.

    Raises:
      ValueError: if there is no paged state.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> paged_optax.release(state) >= 2 * 1024**2
      True
    """
    entries = opt_state if isinstance(opt_state, list) else [opt_state]
    are_known = all(isinstance(entry, StateInfo) for entry in entries)
    found = [] if are_known else find_states(opt_state)
    if postpone(functools.partial(release, opt_state)):
        return 0
    handles = {entry.handle for entry in entries} if are_known else set()
    handles |= {read_anyway(state)[0] for state in found}
    with named("release"):
        await_steps()  # a step that came after its moments are gone would be refused
        freed = sum(_ext.release(handle) for handle in handles)
        return told("release freed %s of moments, of %d state(s)", freed, len(handles))


def release_all() -> int:
    """Frees the moments of every optimizer state of this process, also of states that are lost.

    Use it in notebooks, where a state is lost when its cell runs again. No state made so far can be
    updated any more. Waits for the steps under way, and in a save until its end, as `release` does.

    Returns:
      The number of bytes freed.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> for _ in range(2):
      ...   _, state = tx.update(params, tx.init(params))
      >>> paged_optax.release_all() >= 2 * 2 * 1024**2
      True
    """
    if postpone(release_all):
        return 0
    with named("release_all"):
        await_steps()  # as above
        return told("release_all freed %s of moments", _ext.release_all())


def _limit(opt_state: Any, device_bytes: int) -> int:
    if postponed() is not None:
        raise RuntimeError(
            "moments cannot be moved while the same thread saves or copies some, as in a finalizer;"
            " call evict and prefetch outside of it"
        )
    tokens = dict(read_token(state) for state in find_states(opt_state))
    tell_refusals()
    return sum(_ext.limit(*token, device_bytes) for token in tokens.items())
