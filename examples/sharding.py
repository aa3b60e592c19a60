"""Models of `llama.py` in shards over a line of devices (FSDP), in one process or in several.

Every device keeps an equal part of each array, and works on an equal part of the rows. A layer is
gathered where it runs, and once more in the backward pass. The gradients of a gather are summed
over the devices, and come back as shards. Without a mesh all functions here leave things as they
are. With one, set it with `jax.set_mesh`: its shardings are part of array types (Explicit).
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
    """Returns a line of the first devices."""
    kinds = (AxisType.Explicit,)
    return jax.make_mesh((count,), (AXIS,), axis_types=kinds, devices=jax.devices()[:count])


# -------------------------------------------------------------------------------------- the shards


def spec_of(axis: int | None, ndim: int) -> P:
    """Returns the cut of an array along `axis`; None leaves it whole on each device."""
    return P() if axis is None else P(*[None] * (axis % ndim), AXIS)


def axis_for(parts: Any, rows: int) -> int | None:
    """Returns the axis that the devices can share equally: rows or else columns (-1), or None.

    Codes and scales of a matrix have one answer, because they are made from the same weights.
    """
    devices = jax.sharding.get_mesh().size or 1
    sizes = [x.shape for x in jax.tree.leaves(parts)]
    return next((i for i in (rows, -1) if not any(shape[i] % devices for shape in sizes)), None)


def specs_of(arrays: Any) -> Any:
    """Cuts arrays of a model, or their shapes, along their rows: those of each layer if stacked.

    Each device gets whole rows, so that blocks of moments are the same on any number of devices.
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
    """Returns the array of which `read` gives any part; it is asked for those of this process."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec_of(axis, len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


def share(batch: np.ndarray, axis: int) -> Any:
    """Hands each device its part of the rows, which lie along `axis`."""
    if jax.sharding.get_mesh().empty:
        return batch
    return put(batch.__getitem__, batch.shape, axis)


def on_host(arrays: Any) -> Any:
    """Returns whole arrays, if other processes have parts of them."""
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
    """A device's part of an array. The axis stays what it is where a scan takes a layer of it."""

    part: jax.Array
    axis: int | None = dataclasses.field(metadata={"static": True})


def whole(shards: Any) -> Any:
    """Returns the arrays of which each device has a part, for `whole` in `llama.py`."""
    is_shard = {"is_leaf": lambda x: isinstance(x, Shard)}
    return jax.tree.map(lambda x: gather(x.part, x.axis), shards, **is_shard)


def specs_in(arrays: Any) -> Any:
    """Returns how arrays are cut, which is part of their types."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arrays)


def on_parts(f: Callable, arrays: Any, *rest) -> Any:
    """Returns `f(arrays, *rest)`, which has the shapes of `arrays`; a device sees its parts."""
    if jax.sharding.get_abstract_mesh().empty:
        return f(arrays, *rest)
    specs = specs_in((arrays, *rest))
    return jax.shard_map(f, in_specs=specs, out_specs=specs[0])(arrays, *rest)


def on_shards(f: Callable, base: Any, lora: Any, *rest, add: bool, **options) -> jax.Array:
    """Returns `f(base, lora, *rest, **options)`, a function of `llama.py`, on all devices.

    With `add` each device has a part of the rows, and results are added. Without, each device does
    the same work, and all have the result.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return f(base, lora, *rest, **options)
    specs = specs_in((base, lora, *rest))

    def local(base, lora, *rest):
        shards = jax.tree.map(lambda x, spec: Shard(x, axis_of(spec)), (base, lora), specs[:2])
        result = f(*shards, *rest, whole=whole, **options)
        return jax.lax.psum(result, AXIS) if add else result

    run = jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=add)
    return run(base, lora, *rest)
