"""Models of `llama.py` in shards over a line of devices (FSDP), in one process or in several.

Every device keeps an equal part of each array, and works on an equal part of the rows of a batch. A
layer is gathered where it runs, and once more in the backward pass. The gradients of a gather are
summed over the devices, and come back as shards.

The functions ask for the mesh that `jax.set_mesh` has set. If there is none, they leave arrays as
they are, and call functions as they are. How an array is cut is part of its type (Explicit axes).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from nf4 import NF4

AXIS = "fsdp"


# ------------------------------------------------------------------------------------- the devices


def join(job: list[str], cpu_devices: int) -> None:
    """Makes this process one of a job. Without arguments JAX asks Slurm, Open MPI or Kubernetes.

    Args:
      job: address of the first process, the number of processes, and which one this is; or none.
      cpu_devices: how many devices the CPUs of all processes act as.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if not job:
        jax.distributed.initialize()
        return
    address, processes, process = job
    jax.config.update("jax_num_cpu_devices", max(1, cpu_devices // int(processes)))
    jax.distributed.initialize(address, int(processes), int(process))


def make_mesh(count: int) -> jax.sharding.Mesh:
    """Returns a line of the first `count` devices."""
    kinds = (AxisType.Explicit,)
    return jax.make_mesh((count,), (AXIS,), axis_types=kinds, devices=jax.devices()[:count])


# -------------------------------------------------------------------------------------- the shards


def spec_of(axis: int | None, ndim: int) -> P:
    """Returns the cut of an array along `axis`. With None each device has all of it."""
    return P() if axis is None else P(*[None] * (axis % ndim), AXIS)


def axis_for(parts: Any, rows: int) -> int | None:
    """Returns the axis that devices can share equally: rows, or else columns (-1), or else None.

    Codes and scales of a matrix are cut alike, because they are made from the same weights.
    """
    devices = jax.sharding.get_mesh().size or 1
    sizes = [x.shape for x in jax.tree.leaves(parts)]
    return next((i for i in (rows, -1) if not any(shape[i] % devices for shape in sizes)), None)


def specs_of(arrays: Any) -> Any:
    """Cuts arrays of a model (or their shapes) along their rows, the rows of each layer if stacked.

    Each device gets whole rows, so that blocks of moments are the same on any number of devices.
    Where devices cannot share the rows equally, `axis_for` says what they do.
    """

    def cut(path, part):
        single = {"embed", "norm", "head"} & {getattr(step, "key", None) for step in path}
        axis = axis_for(part, rows=0 if single else 1)
        return jax.tree.map(lambda x: spec_of(axis, x.ndim), part)

    return jax.tree_util.tree_map_with_path(cut, arrays, is_leaf=lambda x: isinstance(x, NF4))


def make(f: Callable, *args) -> Any:
    """Returns the arrays that `f` makes, in shards. None of them is ever whole on a device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return f(*args)
    specs = specs_of(jax.eval_shape(f, *args))
    return jax.jit(f, out_shardings=jax.tree.map(lambda x: NamedSharding(mesh, x), specs))(*args)


def put(read: Callable, shape: tuple[int, ...], axis: int | None) -> jax.Array:
    """Returns an array cut along `axis`. `read` gives each part of this process by its slices."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec_of(axis, len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


def share(batch: np.ndarray, axis: int) -> Any:
    """Hands each device its part of the rows of a batch, which lie along `axis`."""
    if jax.sharding.get_mesh().empty:
        return batch
    return put(batch.__getitem__, batch.shape, axis)


def on_host(arrays: Any) -> Any:
    """Returns whole arrays of NumPy where other processes have parts of them."""
    several = jax.process_count() > 1
    return multihost_utils.process_allgather(arrays, tiled=True) if several else arrays


def wait_for_all(what: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def axis_of(spec: P) -> int | None:
    """Returns the axis of an array's type along which it is cut, counted from the last one."""
    return list(spec).index(AXIS) - len(spec) if AXIS in spec else None


def gather(shard: jax.Array, axis: int | None) -> jax.Array:
    """Returns the whole array that was cut along `axis`. Its gradient is scattered likewise."""
    return shard if axis is None else jax.lax.all_gather(shard, AXIS, axis=axis, tiled=True)


# ------------------------------------------------------------------------------------- the programs


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Shard:
    """A device's part of an array, and the axis of the cut, which counts from the last one.

    So it stays what it is where `jax.lax.scan` takes a layer of a stack.
    """

    part: jax.Array
    axis: int | None = dataclasses.field(metadata={"static": True})


def whole(shards: Any) -> Any:
    """Returns the arrays of which each device has a part: the argument `whole` of `llama.py`."""
    return jax.tree.map(
        lambda x: gather(x.part, x.axis), shards, is_leaf=lambda x: isinstance(x, Shard)
    )


def specs_in(arrays: Any) -> Any:
    """Returns how arrays are cut."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arrays)


def on_parts(f: Callable, arrays: Any, *rest) -> Any:
    """Returns `f(arrays, *rest)`, cut like `arrays`. Each device calls `f` with its own parts."""
    if jax.sharding.get_abstract_mesh().empty:
        return f(arrays, *rest)
    specs = specs_in((arrays, *rest))
    return jax.shard_map(f, in_specs=specs, out_specs=specs[0])(arrays, *rest)


def run(f: Callable, base: Any, lora: Any, *rest, add: bool, **options) -> jax.Array:
    """Returns what a function of `llama.py` does with a model in shards.

    With `add` each device calls it with a part of the rows, and the results are added. Without it
    all devices do the same work.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return f(base, lora, *rest, **options)
    specs = specs_in((base, lora, *rest))

    def local(base, lora, *rest):
        shards = jax.tree.map(lambda x, spec: Shard(x, axis_of(spec)), (base, lora), specs[:2])
        result = f(*shards, *rest, whole=whole, **options)
        return jax.lax.psum(result, AXIS) if add else result

    by_device = jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=add)
    return by_device(base, lora, *rest)
