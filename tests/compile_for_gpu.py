"""XLA:GPU's memory for training steps of examples/llama.py. Compiles them and runs nothing.

    python compile_for_gpu.py EXAMPLES 65b:64:1:2048 24b:0:1:4096 ...

A step is a model, the rank of its adapters (0 to train all of it), sequences and tokens in each.
The last line printed is a JSON object of bytes in XLA's pool.

Where there is no GPU, jax-cuda13-plugin compiles for a described one. cuDNN then cannot build its
attention, and a custom call with the same operands and results stands in for it.
"""

import json
import sys

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from helpers import ext, let_cpu_build_compile_for_gpus
from paged_optax import paged_adamw8bit

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 } device_vendor: "NVIDIA Corporation" device_address_bits: 64
  name: "NVIDIA H200" driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def find_gpu():
    """A GPU, and whether it is only described."""
    if jax.default_backend() == "gpu":
        return jax.devices()[0], False
    let_cpu_build_compile_for_gpus()
    topology = topologies.get_topology_desc(
        "", "cuda", target_config=H200.strip(), topology="1x1x1"
    )
    return topology.devices[0], True


def stand_in(q, k, v, config, past):
    del config, past
    return attend(q, k, v)


@jax.custom_vjp
def attend(q, k, v):
    return attend_forward(q, k, v)[0]


def attend_forward(q, k, v):
    batch, time, heads, _ = q.shape
    sums = jax.ShapeDtypeStruct((batch, heads, time), jnp.float32)
    call = jax.ffi.ffi_call("attention", (like(q), sums))
    mixed, sums = call(q, k, v)
    return mixed, (q, k, v, mixed, sums)


def attend_backward(saved, grad):
    call = jax.ffi.ffi_call("attention", tuple(map(like, saved[:3])))
    return tuple(call(*saved, grad))


attend.defvjp(attend_forward, attend_backward)


def like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def pool_bytes(llama, gpu, name, rank, batch, time):
    """What XLA's pool has in use at one time."""
    config, key = llama.SHAPES[name], jax.random.key(0)
    base = jax.eval_shape(lambda: llama.random_base(key, config, bool(rank)))
    rounding = "nearest" if rank else "compensated"
    tx = optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(1e-4, param_rounding=rounding))
    if rank:
        params = jax.eval_shape(lambda: llama.init_lora(key, config, rank))
    else:
        params, base = base, {}

    def loss(params, base, ids, weights):
        model = (base, params) if rank else (params, {})
        return llama.loss_sum(*model, ids, weights, config) / weights.sum()

    def step(params, state, *inputs):
        value, grads = jax.value_and_grad(loss)(params, *inputs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    ids = jax.ShapeDtypeStruct((batch, time + 1), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, time), jnp.float32)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(gpu)),
        (params, jax.eval_shape(tx.init, params), base, ids, weights),
    )
    stats = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile().memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes


def main():
    sys.path.insert(0, sys.argv[1])
    import llama

    gpu, is_described = find_gpu()
    if is_described:
        handler = ext.targets()[0][2]  # never called
        jax.ffi.register_ffi_target("attention", handler, platform="CUDA")
        llama.attend = stand_in
    runs = {}
    for run in sys.argv[2:]:
        name, *sizes = run.split(":")
        runs[run] = pool_bytes(llama, gpu, name, *map(int, sizes))
    print(json.dumps(runs))


main()
