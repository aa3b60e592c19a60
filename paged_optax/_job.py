"""What the processes of a `jax.distributed` job agree on."""

import functools
import random
from typing import Any

import jax
from jax._src import distributed

from . import _ext


def is_shared(num_devices: int) -> bool:
    """Whether a program on so many devices runs in several processes."""
    # Devices are not known while a program is traced or compiled, only how many there are.
    return jax.distributed.is_initialized() and num_devices > jax.local_device_count()


def share_base() -> None:
    """Has all processes count the handles of states that they share from one random number."""
    if jax.distributed.is_initialized():
        client = distributed.global_state.client
        assert client is not None
        _share_base_of(client)


# The last one: `jax.distributed` may shut down and start anew, and a job has one client.
@functools.lru_cache(maxsize=1)
def _share_base_of(client: Any) -> None:
    key = "paged_optax/base"
    try:
        client.key_value_set(key, str(random.SystemRandom().getrandbits(29)))
    except jax.errors.JaxRuntimeError:
        pass  # another process was first
    _ext.set_shared_base(int(client.blocking_key_value_get(key, 60_000)))
