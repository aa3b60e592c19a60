"""Runs that are saved half-way and resumed: what tests of checkpoints and their processes share."""

import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import paged_optax
from paged_optax import Quantization, moments

HALF = 50  # steps

SHAPES = {"a": (64, 80), "b": (7,), "c": (33, 40), "d": (4096, 2)}

# Optimizers by name, and the dtype of their parameters.
RUNS = {
    "ratio": (lambda: paged_optax.paged_adamw8bit(1e-2, quantization=SMALL), jnp.float32),
    "ratio6": (lambda: paged_optax.paged_adamw8bit(1e-2, quantization=SIX_BITS), jnp.float32),
    "ratio4": (lambda: paged_optax.paged_adamw8bit(1e-2, quantization=FOUR_BITS), jnp.float32),
    "dynamic": (lambda: paged_optax.paged_adamw8bit(1e-2, quantization=DYNAMIC), jnp.float32),
    "float32": (lambda: paged_optax.paged_adamw8bit(1e-2, quantization=FLOAT32), jnp.float32),
    "replay": (lambda: paged_optax.paged_adam8bit(1e-2, replay=True), jnp.float32),
    "compensated": (
        lambda: paged_optax.paged_adamw8bit(1e-3, param_rounding="compensated"),
        jnp.bfloat16,
    ),
    "skip_step": (lambda: paged_optax.paged_adam8bit(1e-2, non_finite="skip_step"), jnp.float32),
    "skip_element": (
        lambda: paged_optax.paged_adam8bit(1e-2, non_finite="skip_element"),
        jnp.float32,
    ),
    "lion": (lambda: paged_optax.paged_lion8bit(1e-3), jnp.bfloat16),
    "partition": (
        lambda: optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.partition(
                {
                    "adam": paged_optax.paged_adam8bit(optax.cosine_decay_schedule(1e-2, 200)),
                    "lion": paged_optax.paged_lion8bit(1e-3),
                },
                {"a": "adam", "b": "lion", "c": "lion", "d": "adam"},
            ),
        ),
        jnp.float32,
    ),
}
SMALL = Quantization(min_size=0)
SIX_BITS = Quantization("ratio6", min_size=0)
FOUR_BITS = Quantization("ratio4", min_size=0)
DYNAMIC = Quantization("dynamic")
FLOAT32 = Quantization(min_size=2**62)


def make_params(dtype, mesh=None):
    rng = np.random.default_rng(1)
    params = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    params = {name: jnp.asarray(param, dtype) for name, param in params.items()}
    if mesh is None:
        return params
    specs = {"a": P("x"), "b": P(), "c": P(None, "y"), "d": P(("x", "y"))}
    return {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}


def make_grads(params, step):
    rng = np.random.default_rng(1000 + step)
    grads = {name: rng.standard_normal(p.shape) for name, p in params.items()}
    if step % 10 == 3:
        grads["c"][0, 0] = np.nan
    return {k: jax.device_put(grads[k].astype(p.dtype), p.sharding) for k, p in params.items()}


def make_step(tx):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def advance(step, params, state, first, count):
    for i in range(first, first + count):
        params, state = step(params, state, make_grads(params, i))
    return params, state


def results(params, state):
    """Everything that a run leads to, as a flat dict of arrays."""
    both = {"params": params, "moments": list(moments(state))}
    leaves = jax.tree_util.tree_leaves_with_path(both)
    return {jax.tree_util.keystr(path): np.asarray(x).astype(np.float32) for path, x in leaves}


# --- What rounding once may change ---------------------------------------------------------------


def check_rounded_once(codec, before, after, like):
    """That moments of a leaf are `before`, at most rounded once into new blocks.

    docs/checkpoints.md derives the bounds. `before` and `after` are (mu, nu), nu None for Lion;
    `like` is an array that is cut as the new moments are.
    """
    indices = {str(i): i for i in like.sharding.devices_indices_map(like.shape).values()}
    for index in indices.values():
        parts = [None if x is None else _in_blocks(x[index]) for x in (*before, *after)]
        for old, new, bound in zip(parts[:2], parts[2:], _bounds(codec, *parts), strict=True):
            if old is not None:
                assert (np.abs(new - old) <= bound * (1 + 1e-4)).all(), (codec, index)


def _in_blocks(part):
    flat = np.asarray(part, np.float64).ravel()
    return np.pad(flat, (0, -flat.size % 256)).reshape(-1, 256)


def _bounds(codec, mu, nu, new_mu, new_nu):
    largest = [None if x is None else np.abs(x).max(1, keepdims=True) for x in (mu, nu)]
    if codec == "dynamic":
        return 0.9 / 128 * largest[0], None if nu is None else 0.9 / 256 * largest[1]
    last, step, coarsest = 126.5 / 16129, 1.275 / 512, 2**-3
    if codec == "ratio6":
        last, step, coarsest = 30.5 / 961, 1.25 * 17 / 16 / 128, 2**-1
    if codec == "ratio4":
        last, step, coarsest = 6.5 / 49, 1.25 * 21 / 16 / 32, 2
    if nu is None:
        return last * largest[0], None
    not_zero = np.where(nu > 0, nu, np.inf).min(1, keepdims=True)
    octaves = (_bits(largest[1]) - _bits(np.where(np.isinf(not_zero), 0, not_zero))) / 2**23
    relative = np.clip(step * octaves, 2**-8, coarsest)  # in octaves, of which the second doubles
    relative = np.where(relative > 1, 2 * relative - 1, relative)
    is_idle = (mu == 0) & (nu > 0)
    nu_bound = relative * nu + np.where(is_idle, 2**-15 * largest[1], 0)
    unit = ((_bits(new_nu) >> 23 << 22) + (127 << 22)).astype(np.uint32).view(np.float32)
    ratio = np.where(mu == 0, 0, np.abs(mu) / unit).max(1, keepdims=True)
    return last * ratio * unit, nu_bound


def _bits(values):
    return values.astype(np.float32).view(np.uint32).astype(np.int64)


# --- Ways to save and restore a state -----------------------------------------------------------
# Saving takes a state and a folder, and may return what waits for the end of it. Restoring takes a
# fresh state, and the folder.


def save_file(state, folder):
    save_leaves(state, folder)
    paged_optax.save_moments(state, folder / "m.safetensors")


def load_file(fresh, folder):
    return paged_optax.load_moments(load_leaves(fresh, folder), folder / "m.safetensors")


def load_abstract(fresh, folder):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), fresh)
    state = paged_optax.load_moments(shapes, folder / "m.safetensors")
    rest = load_leaves(fresh, folder)  # counts of schedules, and of what was skipped
    return jax.tree.map(lambda x, y: x if isinstance(x, jax.Array) else y, state, rest)


def save_arrays(state, folder):
    save_leaves(state, folder)
    np.savez(folder / "m.npz", **paged_optax.export_moments(state))


def load_arrays(fresh, folder):
    with np.load(folder / "m.npz") as arrays:
        return paged_optax.import_moments(load_leaves(fresh, folder), dict(arrays))


def save_leaves(state, folder):
    """A checkpoint of a format that knows nothing of moments."""
    np.savez(folder / "leaves.npz", *map(np.asarray, jax.tree.leaves(state)))


def load_leaves(fresh, folder):
    leaves, treedef = jax.tree.flatten(fresh)
    with np.load(folder / "leaves.npz") as file:
        return jax.tree.unflatten(
            treedef, [jnp.asarray(file[f"arr_{i}"]) for i in range(len(leaves))]
        )


def save_pickle(state, folder):
    (folder / "m.pickle").write_bytes(pickle.dumps(state))


def load_pickle(fresh, folder):
    del fresh
    return pickle.loads((folder / "m.pickle").read_bytes())


def save_flax(state, folder):
    from flax import serialization

    (folder / "m.msgpack").write_bytes(serialization.to_bytes(state))


def load_flax(fresh, folder):
    from flax import serialization

    return serialization.from_bytes(fresh, (folder / "m.msgpack").read_bytes())


def abstract(fresh):
    """The state as Orbax wants a target: with shardings and without values."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {"opt": fresh}
    )


def save_standard(state, folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "c", {"opt": state})


def load_standard(fresh, folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "c", abstract(fresh))["opt"]


def load_standard_fresh(fresh, folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "c", {"opt": fresh})["opt"]


def load_untyped(fresh, folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        leaves = jax.tree.leaves(checkpointer.restore(folder / "c"))
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def save_pytree(state, folder):
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(folder / "c", {"opt": state})


def load_pytree(fresh, folder):
    import orbax.checkpoint as ocp

    target = abstract(fresh)
    args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=args, partial_restore=True)
    return ocp.PyTreeCheckpointer().restore(folder / "c", args)["opt"]


def save_manager(state, folder):
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(folder / "c")
    items = {"opt": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave({"a": 1})}
    manager.save(3, args=ocp.args.Composite(**items))
    return manager.close


def load_manager(fresh, folder):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder / "c") as manager:
        item = ocp.args.StandardRestore(abstract(fresh)["opt"])
        return manager.restore(3, args=ocp.args.Composite(opt=item))["opt"]


def save_manager_item(state, folder):
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(folder / "c")
    manager.save(3, args=ocp.args.StandardSave({"opt": state}))
    return manager.close


def load_manager_item(fresh, folder):
    """After somebody else registered a handler for arrays, as MaxText does."""
    import orbax.checkpoint as ocp

    handlers = ocp.type_handlers
    for handler in (handlers.SingleReplicaArrayHandler, handlers.ArrayHandler):
        handlers.register_type_handler(jax.Array, handler(), override=True)
    with ocp.CheckpointManager(folder / "c") as manager:
        return manager.restore(3, args=ocp.args.StandardRestore(abstract(fresh)))["opt"]


def save_v1(state, folder):
    import orbax.checkpoint.experimental.v1 as v1

    save = v1.save if hasattr(v1, "save") else v1.save_pytree  # the name until 0.12
    save(folder / "c", {"opt": state})


def load_v1(fresh, folder):
    import orbax.checkpoint.experimental.v1 as v1

    load = v1.load if hasattr(v1, "load") else v1.load_pytree
    return load(folder / "c", abstract(fresh))["opt"]


def save_v1_checkpointer(state, folder):
    import orbax.checkpoint.experimental.v1 as v1

    checkpointer = v1.training.Checkpointer(folder / "c")
    return checkpointer.save_checkpointables_async(3, {"opt": state}).result


def load_v1_checkpointer(fresh, folder):
    import orbax.checkpoint.experimental.v1 as v1

    checkpointer = v1.training.Checkpointer(folder / "c")
    return checkpointer.load_checkpointables(3, abstract(fresh))["opt"]


def save_linen(state, folder):
    from flax.training import checkpoints

    checkpoints.save_checkpoint(folder / "c", {"opt": state}, 3)


def load_linen(fresh, folder):
    from flax.training import checkpoints

    return checkpoints.restore_checkpoint(folder / "c", {"opt": fresh})["opt"]


def save_linen_host(state, folder):
    from flax.training import checkpoints

    checkpoints.save_checkpoint(folder / "c", {"opt": jax.device_get(state)}, 3)


class Saver:
    """Saves a state again and again in one folder, by `save_moments` or by Orbax."""

    def __init__(self, way, folder):
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)
        self.manager = None
        if way == "orbax":
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(max_to_keep=2)
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.manager:
            self.manager.close()

    def save(self, step, state):
        if not self.manager:
            paged_optax.save_moments(state, self.folder / "m.safetensors")
            return
        import orbax.checkpoint as ocp

        self.manager.save(step, args=ocp.args.StandardSave({"opt": state}))

    def restore(self, fresh):
        """The newest state that is there; the fresh one if there is none."""
        if not self.manager:
            path = self.folder / "m.safetensors"
            return paged_optax.load_moments(fresh, path) if path.exists() else fresh
        if self.manager.latest_step() is None:
            return fresh
        import orbax.checkpoint as ocp

        args = ocp.args.StandardRestore(abstract(fresh))
        return self.manager.restore(self.manager.latest_step(), args=args)["opt"]


WAYS = {
    "file": (save_file, load_file),
    "file_abstract": (save_file, load_abstract),
    "arrays": (save_arrays, load_arrays),
    "pickle": (save_pickle, load_pickle),
    "flax": (save_flax, load_flax),
}


ORBAX_WAYS = {
    "standard": (save_standard, load_standard),
    "standard_fresh": (save_standard, load_standard_fresh),
    "untyped": (save_standard, load_untyped),
    "pytree": (save_pytree, load_pytree),
    "composite": (save_manager, load_manager),
    "manager": (save_manager_item, load_manager_item),
    "v1": (save_v1, load_v1),
    "v1_checkpointer": (save_v1_checkpointer, load_v1_checkpointer),
    "linen": (save_linen, load_linen),
    "linen_host": (save_linen_host, load_linen),
}
ALL_WAYS = WAYS | ORBAX_WAYS


# --- What the processes do ----------------------------------------------------------------------


def first_half(folder, name, ways, mesh=None, saved_at=HALF):
    """Trains, saves half-way in every way, and writes down where the run ends."""
    make, dtype = RUNS[name]
    tx = make()
    step, params = make_step(tx), make_params(dtype, mesh)
    params, state = advance(step, params, tx.init(params), 0, saved_at)
    ends = []
    for way, (save, _) in ways.items():
        place = Path(folder, name, way)
        place.mkdir(parents=True)
        ends.append(save(state, place))
    np.savez(Path(folder, name, "params.npz"), **jax.tree.map(to_float32, params))
    params, state = advance(step, params, state, saved_at, HALF)
    np.savez(Path(folder, name, "end.npz"), **results(params, state))
    for end in filter(None, ends):  # training went on while these were saved
        end()
    paged_optax.release(state)


def second_half(folder, name, ways, mesh=None, saved_at=HALF):
    """Resumes in every way, in another process; returns those that end elsewhere."""
    make, dtype = RUNS[name]
    tx = make()
    step = make_step(tx)
    with np.load(Path(folder, name, "end.npz")) as file:
        expected = dict(file)
    wrong = []
    for way, (_, load) in ways.items():
        params = make_params(dtype, mesh)
        with np.load(Path(folder, name, "params.npz")) as file:
            params = {
                k: jax.device_put(jnp.asarray(file[k], dtype), p.sharding)
                for k, p in params.items()
            }
        fresh = tx.init(params)
        if mesh is not None:
            fresh = jax.device_put(fresh, NamedSharding(mesh, P()))
        state = load(fresh, Path(folder, name, way))
        params, state = advance(step, params, state, saved_at, HALF)
        actual = results(params, state)
        if not all(np.array_equal(actual[k], expected[k], equal_nan=True) for k in expected):
            wrong.append(f"{name} {way}")
        paged_optax.release(state)
    return wrong


def to_float32(x):
    return np.asarray(x).astype(np.float32)
