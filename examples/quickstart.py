"""A linear regression in plain optax, with 8-bit AdamW moments outside XLA's memory."""

import jax
import jax.numpy as jnp
import optax

from paged_optax import memory_report, paged_adamw8bit

tx = optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(1e-2, weight_decay=0.01))
params = {"w": jnp.zeros((256, 64)), "b": jnp.zeros(64)}
opt_state = tx.init(params)


@jax.jit
def step(params, opt_state, x, y):
    def loss(p):
        return jnp.mean((x @ p["w"] + p["b"] - y) ** 2)

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss(params)


x = jax.random.normal(jax.random.key(0), (512, 256))
for i in range(101):
    params, opt_state, value = step(params, opt_state, x, jnp.sin(x[:, :64]))
    if i % 25 == 0:
        print(f"step {i:3}  loss {value:.4f}")
print(memory_report(opt_state))  # 8 bits for "w"; float32 for "b", which has under 4,096 elements
