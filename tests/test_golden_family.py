"""The states of bitsandbytes' other optimizers, after 5 and 25 steps (see golden/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paged_optax
from helpers import f32, stored_leaves
from paged_optax import Quantization, release
from test_golden import SIZE, inputs, load

DYNAMIC = Quantization("dynamic")
WHOLE = slice(256, 37 * 256)  # without the first and the last block

RUNS = {
    "lion8": paged_optax.paged_lion8bit(1e-4, weight_decay=0.1, quantization=DYNAMIC),
    "sgd8": optax.chain(
        optax.add_decayed_weights(0.1), paged_optax.paged_sgd8bit(1e-2, 0.9, quantization=DYNAMIC)
    ),
    "rmsprop8": paged_optax.paged_rmsprop8bit(
        1e-3, decay=0.99, eps_in_sqrt=False, quantization=DYNAMIC
    ),
    "adagrad8": paged_optax.paged_adagrad8bit(1e-3, 0.0, 1e-10, quantization=DYNAMIC),
    "ademamix8": paged_optax.paged_ademamix8bit(1e-3, weight_decay=1e-2, quantization=DYNAMIC),
}


@pytest.mark.parametrize("optimizer", RUNS)
def test_has_the_states_of_bitsandbytes(optimizer, device):
    """Every code, and scales up to the last bits of their reduction.

    With AdEMAMix theirs has a fault where the size is no multiple of 256: the scales of the slow
    mean start a place too early, where that of the last block of the fast one is. Their other
    blocks are compared.
    """
    golden = load(optimizer, "float32")
    tx = RUNS[optimizer]
    params, grads = inputs("float32")
    params = jax.device_put(params, device)
    state = tx.init(params)

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    for t, grad in enumerate(grads):
        params, state = step(params, state, jnp.asarray(grad))
        if t in (4, 24):
            (stored,) = stored_leaves(state)
            half = len(stored) // 2
            theirs = states_of(golden, t)
            for codes, scales, (their_codes, their_scales) in zip(
                stored[:half], stored[half:], theirs, strict=True
            ):
                part = WHOLE if optimizer == "ademamix8" else slice(SIZE)
                np.testing.assert_array_equal(codes[:SIZE][part], their_codes[part])
                blocks = slice(1, 37) if optimizer == "ademamix8" else slice(None)
                np.testing.assert_allclose(scales[blocks], their_scales[blocks], rtol=2e-6)
    release(state)


def states_of(golden, t):
    """Codes and scales of each state, in our order."""
    first, scales = golden[f"state1_{t}"].reshape(-1, SIZE), golden[f"absmax1_{t}"].ravel()
    starts = [i * (SIZE // 256) for i in range(len(first))]
    pairs = [(codes, scales[at : at + 38]) for codes, at in zip(first, starts, strict=True)]
    if f"state2_{t}" in golden:
        pairs.append((golden[f"state2_{t}"], golden[f"absmax2_{t}"]))
    return pairs


@pytest.mark.parametrize("rule", ["rms", "rss"])
def test_a_state_that_is_alone_takes_the_signed_map(rule):
    """As theirs: half of the codes are never used."""
    make = {"rms": paged_optax.scale_by_paged_rms8bit, "rss": paged_optax.scale_by_paged_rss8bit}
    tx = make[rule](quantization=DYNAMIC)
    grad = np.random.default_rng(0).standard_normal(5000).astype(f32)
    _, state = tx.update(grad, tx.init(grad))
    ((codes, _),) = stored_leaves(state)
    assert codes[:5000].min() >= 127
