"""What this process has of a token, whose array may lie on several devices, or be cut over them."""

import jax
import numpy as np


def local_token(token: jax.Array) -> np.ndarray | None:
    """Handle and version, of the first device if devices do not agree, or if tokens are stacked.

    Returns:
      int32 (2,); None if this process has only part of it.
    """
    shards = token.addressable_shards
    if not shards:
        return None
    if shards[0].data.shape[-1:] == (2,):
        return np.asarray(shards[0].data).reshape(-1)[:2]
    parts = {shard.index[0].start or 0: shard.data for shard in shards if shard.index}
    if set(parts) != {0, 1}:
        return None
    return np.concatenate([np.asarray(parts[0]), np.asarray(parts[1])])


def local_handle(token: jax.Array) -> int | None:
    """The handle; None if this process does not have it."""
    found = local_token(token)
    return None if found is None else int(found[0])
