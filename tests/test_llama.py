"""The model and the NF4 codec of the examples, without a checkpoint (test_parity.py has those)."""

import dataclasses

import jax
import jax.numpy as jnp
import llama
import nf4
import numpy as np
import pytest

CONFIG = llama.Config(vocab=300, dim=64, layers=2, heads=4, kv_heads=2, hidden=128, head_dim=16)
FULL = dataclasses.replace(
    CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, window=9, tied=True
)


quantize = jax.jit(nf4.quantize, static_argnums=1)
dequantize = jax.jit(nf4.dequantize, static_argnums=1)
random_base = jax.jit(llama.random_base, static_argnums=(1, 2, 3))
logits = jax.jit(llama.logits, static_argnums=(3, 4, 5))  # compiled whole, which is faster


def random_ids(*shape):
    return np.random.default_rng(0).integers(CONFIG.vocab, size=shape)


@pytest.mark.parametrize("double", [False, True])
def test_every_weight_takes_the_nearest_level_of_its_block(double):
    weights = np.random.default_rng(0).normal(size=(2, 192, 40)).astype(np.float32)
    weights[0, :64, 0] = 0
    stored = quantize(weights, double)
    scales = np.asarray(nf4.read_scales(stored.scales, stored.steps))
    most = np.abs(weights.reshape(2, 3, 64, 40)).max(axis=2)
    steps = np.ptp(most) / 255 if double else most / 128  # bfloat16 has 8 bits
    assert np.all(np.abs(scales - most) <= steps / 2 + 1e-6)

    levels = np.multiply.outer(np.repeat(scales, 64, axis=1), nf4.LEVELS)
    choice = np.abs(levels - weights[..., None]).argmin(-1)
    nearest = np.take_along_axis(levels, choice[..., None], -1)[..., 0]
    np.testing.assert_allclose(dequantize(stored, "float32"), nearest, rtol=1e-6)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(stored))
    scale_bytes = scales.size + 2 * 4 * scales.size // 8 if double else 2 * scales.size
    assert nbytes == weights.size // 2 + scale_bytes  # 40 outputs have groups of 8 scales


def test_inputs_that_blocks_do_not_divide():
    with pytest.raises(ValueError, match="a weight has 96 of them; keep this model in bfloat16"):
        nf4.quantize(jnp.ones((96, 64)))


@pytest.mark.parametrize(
    ("config", "quantized"), [(CONFIG, False), (FULL, True)], ids=["plain", "full"]
)
def test_tokens_sampled_one_by_one_are_those_of_whole_sequences(config, quantized):
    base = random_base(jax.random.key(0), config, quantized, "float32")
    prompt, none = jnp.asarray(random_ids(1, 7)), jnp.array([config.vocab])
    options = {"config": config, "scale": 1.0, "dtype": "float32"}
    tokens = llama.sample(base, {}, prompt, jax.random.key(0), none, length=20, **options)
    whole = jnp.concatenate([prompt[0], tokens])[None]
    scores = logits(base, {}, whole, config, 1.0, "float32")
    np.testing.assert_array_equal(tokens, jnp.argmax(scores[0, 6:-1], axis=-1))

    stop = tokens[3:4]  # from its first occurrence on, all tokens are this one
    stopped = llama.sample(base, {}, prompt, jax.random.key(0), stop, length=20, **options)
    first = int(jnp.argmax(tokens == stop))
    np.testing.assert_array_equal(stopped[:first], tokens[:first])
    assert (stopped[first:] == stop).all()


def test_loss_in_chunks(monkeypatch):
    base = random_base(jax.random.key(0), FULL, True, "float32")
    lora = llama.init_lora(jax.random.key(1), FULL, 4)
    ids, weights = random_ids(2, 24), np.random.default_rng(1).random((2, 23)).astype(np.float32)
    monkeypatch.setattr(llama, "LOSS_CHUNK", 10)  # 5 chunks of 5 tokens, so 2 are padding
    loss_sum = jax.jit(llama.loss_sum, static_argnums=(4, 5, 6))
    loss = loss_sum(base, lora, ids, weights, FULL, 0.5, "float32")
    scores = np.asarray(logits(base, lora, ids[:, :-1], FULL, 0.5, "float32"), np.float64)
    chosen = np.take_along_axis(scores, ids[:, 1:, None], -1)[..., 0]
    expected = ((np.log(np.exp(scores).sum(-1)) - chosen) * weights).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_new_adapters_change_nothing_and_learn():
    base = random_base(jax.random.key(0), CONFIG, True, "float32")
    lora = llama.init_lora(jax.random.key(1), CONFIG, 4, ("q_proj", "down_proj"))
    ids, ones = random_ids(2, 24), np.ones((2, 23), np.float32)
    loss_and_grads = jax.jit(
        jax.value_and_grad(
            lambda lora: llama.loss_sum(base, lora, ids, ones, CONFIG, 2.0, "float32")
        )
    )
    before, grads = loss_and_grads(lora)
    nothing, _ = loss_and_grads(jax.tree.map(jnp.zeros_like, lora))
    np.testing.assert_allclose(before, nothing, rtol=1e-6)
    assert set(grads) == {"q_proj", "down_proj"}
    stepped = jax.tree.map(lambda x, g: x - 0.01 * jnp.sign(g), lora, grads)
    assert loss_and_grads(stepped)[0] < before
