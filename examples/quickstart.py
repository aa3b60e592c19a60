"""A small regression in plain optax, trained with 8-bit AdamW moments outside XLA's memory."""

import jax
import jax.numpy as jnp
import optax

from paged_optax import memory_report, paged_adamw8bit

inputs = jax.random.normal(jax.random.key(0), (512, 64))
targets = jnp.sin(inputs @ jax.random.normal(jax.random.key(1), (64, 1)))
init = jax.nn.initializers.he_normal()
params = {"hidden": init(jax.random.key(2), (64, 256)), "out": jnp.zeros((256, 1))}
tx = optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(3e-3, weight_decay=0.01))
opt_state = tx.init(params)


def loss_fn(params):
    prediction = jax.nn.relu(inputs @ params["hidden"]) @ params["out"]
    return jnp.mean((prediction - targets) ** 2)


@jax.jit
def step(params, opt_state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


for i in range(101):
    params, opt_state, loss = step(params, opt_state)
    if i % 25 == 0:
        print(f"step {i:3}  loss {loss:.4f}")
print(memory_report(opt_state))  # "hidden" is 8-bit; "out" is under 4,096 elements: float32
