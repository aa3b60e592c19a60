"""How one call is spread over devices: each works on its own shards, and no data moves.

A bare custom call on sharded operands is compiled as an all-gather and the whole work on every
device. To keep it local, mesh axes are dealt with by their type. Explicit axes are in the types of
the operands, and `jax.shard_map` cuts along them. Auto axes are settled by the compiler, and
`custom_partitioning` tells it that every dimension may be cut in any way. Manual axes have been cut
already, by the user or by the first rule. A mesh may have axes of all three types.

Tokens are replicated: every device keeps the moments of its shards under the same handle.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.extend
import jax.numpy as jnp
from jax._src import distributed
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from . import _ext, _ffi
from ._shards import Cuts, Shards, cuts_of


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a compiled call knows of the devices that its program runs on."""

    num_devices: int = 1
    shared: bool = False  # other processes take part
    shards: str = ""  # see `Shards`; empty where that is not known, or the device is the only one

    def part(self) -> jax.Array:
        """Which parts of the leaves the device has; its position if that is not known. int32 ()."""
        if self.num_devices == 1:
            return jnp.zeros([], jnp.int32)
        position = _ffi.position_p.bind()
        return Shards.decode(self.shards).part(position) if self.shards else position


def issue(seed: jax.typing.ArrayLike) -> jax.Array:
    """Makes a token for a new state.

    Args:
      seed: int32 of shape (2,), any value. Two calls in one program must differ in it, or the
        compiler may merge them.

    Returns:
      int32 of shape (2,): a handle that no other state has, and version 0.
    """
    if jax.distributed.is_initialized():
        _share_base()
    (token,) = _spread(_Issue(), (jnp.asarray(seed),), num_replicated=1)
    return token


def update(
    token: jax.Array,
    count: jax.Array,
    hyperparams: jax.typing.ArrayLike,
    grads: Sequence[jax.Array],
    params: Sequence[jax.Array],
    **static: Any,
) -> tuple[jax.Array, list[jax.Array]]:
    """Advances the moments of `token` by one step.

    Args:
      token: int32 of shape (2,).
      count: int32 of shape (), the number of steps already taken; -1 skips this one.
      hyperparams: float32 of shape (4,): b1, b2, eps, eps_root; where parameters are rounded, of
        shape (6,), with learning rate and weight decay.
      grads: gradients, in tree order.
      params: their parameters, or nothing. Unless they are rounded, only their shardings matter:
        where the compiler decides, gradients are cut as their parameters are.
      **static: ``codecs`` (tuple of int, the codec of each leaf), ``nesterov`` (bool), ``replay``
        (bool), ``tree`` (int, names the tree structure), ``paths`` (int, names the leaves),
        ``device_bytes`` and ``headroom_bytes`` (int), ``pinned`` (bool), ``directory`` (str),
        ``skip_elements`` (bool), ``param_rounding`` (int, enum ParamRounding) and, where that is
        not 0, ``decayed`` (tuple of bool) and ``keys`` (tuple of int) of the leaves, else ().

    Returns:
      The token of the advanced moments, and the updates with the gradients' shapes and dtypes.

    Raises:
      NotImplementedError: under `jax.vmap`.
      TypeError: under differentiation.
    """
    call = _Update(tuple(sorted(static.items())))
    models = params
    if not call.takes_models:  # then the step does not depend on their values
        models = [jax.lax.stop_gradient(param) for param in params]
    operands = guard(token, count, jnp.asarray(hyperparams), *grads, *models)
    num_scalars = len(operands) - len(grads) - len(models)
    end = num_scalars + len(grads)
    token, *updates = _spread(call, operands[:end], num_scalars, operands[end:])
    return token, updates


def guard(*operands: jax.Array) -> list[jax.Array]:
    """The operands as they are; refuses `jax.vmap` and differentiation with an explanation."""
    return _guard_p.bind(*operands)


@functools.cache
def _share_base() -> None:
    """Has all processes count the handles of states that they share from one random number."""
    client, key = distributed.global_state.client, "paged_optax/base"
    assert client is not None
    try:
        client.key_value_set(key, str(random.SystemRandom().getrandbits(29)))
    except jax.errors.JaxRuntimeError:
        pass  # another process was first
    _ext.set_shared_base(int(client.blocking_key_value_get(key, 60_000)))


# Calls are values: equal ones are traced and compiled once.


@dataclasses.dataclass(frozen=True)
class _Issue:
    takes_models = False

    def __call__(self, place: _Place, seed: jax.Array):
        return _fence(functools.partial(_ffi.issue_call_p.bind, shared=place.shared), seed)


@dataclasses.dataclass(frozen=True)
class _Update:
    static: tuple[tuple[str, Any], ...]

    @property
    def takes_models(self) -> bool:
        return dict(self.static)["param_rounding"] != 0

    def __call__(self, place: _Place, *operands: jax.Array):
        call = functools.partial(
            _ffi.update_call_p.bind,
            num_devices=place.num_devices,
            shards=place.shards,
            **dict(self.static),
        )
        token, count, hyperparams, *grads = operands
        return _fence(call, token, count, hyperparams, place.part(), *grads)


def _fence(call, *operands):
    """A custom call between barriers, which cost nothing at run time.

    XLA:GPU fuses slices of operands and results into a copy of a call. Where the call has a side
    effect, some versions leave the original in place as well, and it runs twice.
    """
    return tuple(_barrier(call(*_barrier(operands))))


def _barrier(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """An optimization barrier for each kind of array.

    In jax 0.10 the results of one barrier all vary along the axes that any operand varies along, so
    that `jax.shard_map` would not see that a token is the same on all devices.
    """
    kinds: dict[Any, list[int]] = {}
    for i, array in enumerate(arrays):
        kinds.setdefault(getattr(jax.typeof(array), "manual_axis_type", None), []).append(i)
    results = list(arrays)
    for indices in kinds.values():
        fenced = jax.lax.optimization_barrier([arrays[i] for i in indices])
        for i, array in zip(indices, fenced, strict=True):
            results[i] = array
    return results


def _spread(
    call: _Issue | _Update,
    operands: Sequence[jax.Array],
    num_replicated: int,
    models: Sequence[jax.Array] = (),
    cuts: Cuts | None = None,
):
    """Calls `call(place, *operands)` on every device with its shards of the operands.

    Args:
      call: a hashable function of a `_Place` and operands; if `call.takes_models`, the models are
        its last operands.
      operands: arrays; the first `num_replicated` are the same on every device.
      num_replicated: as many as that; of the results, the first one is.
      models: arrays to be cut like, for the operands behind those, or nothing.
      cuts: how the operands behind those were cut already, if that is known.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = list(zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True))
    explicit = {name for name, _, kind in axes if kind == AxisType.Explicit}
    with jax.disable_jit(False):  # a custom call has to be compiled, also under jax.disable_jit()
        if explicit:
            leaves = operands[num_replicated:]
            # Without `unreduced`: what is a sum over devices is summed before it is a gradient.
            specs = tuple(P(*jax.typeof(x).sharding.spec.partitions) for x in models or leaves)
            taken = models if call.takes_models else ()
            return _explicit(call, num_replicated, frozenset(explicit), specs)(*operands, *taken)
        # custom_partitioning fails where some axes are manual and the others leave nothing to cut.
        nothing_left = all(kind == AxisType.Manual or size == 1 for _, size, kind in axes)
        if AxisType.Manual in mesh.axis_types and nothing_left:
            taken = models if call.takes_models else ()
            return call(_place(mesh.size, cuts), *operands, *taken)
        return _automatic(call, num_replicated, len(models))(*operands, *models)


@functools.lru_cache(maxsize=256)
def _explicit(
    call: _Issue | _Update,
    num_replicated: int,
    explicit: frozenset[str],
    specs: tuple[P, ...],
):
    @jax.jit  # shard_map over some axes of several has to be compiled
    def function(*operands):
        mesh = jax.sharding.get_abstract_mesh()
        end = num_replicated + len(specs)
        models = operands[end:]  # none, or cut as specs say
        leaves = [
            jax.sharding.reshard(leaf, spec)
            for leaf, spec in zip(operands[num_replicated:end], specs, strict=True)
        ]
        cuts = None
        if AxisType.Manual not in mesh.axis_types:  # along those, the user has cut already
            cuts = tuple(cuts_of(mesh, spec, x.ndim) for spec, x in zip(specs, leaves, strict=True))
        return jax.shard_map(
            lambda *shards: _spread(call, shards[:end], num_replicated, shards[end:], cuts),
            in_specs=(*[P()] * num_replicated, *specs, *specs[: len(models)]),
            out_specs=(P(), *specs),
            axis_names=explicit,
            check_vma=False,
        )(*operands[:num_replicated], *leaves, *models)

    return function


def _place(num_devices: int, cuts: Cuts | None) -> _Place:
    # Devices are not known while a program is traced or compiled, only how many there are.
    shared = jax.distributed.is_initialized() and num_devices > jax.local_device_count()
    return _Place(num_devices, shared, "" if cuts is None else Shards(cuts).encode())


@functools.lru_cache(maxsize=256)
def _automatic(call: _Issue | _Update, num_replicated: int, num_models: int):
    def partition(mesh, operands, results):
        del results
        # A model's sharding goes before that of its leaf.
        end = len(operands) - num_models
        leaves = operands[end:] if num_models else operands[num_replicated:]
        shardings = [_even(mesh, leaf.sharding, leaf.shape) for leaf in leaves]
        cuts = None
        if not mesh.empty:  # it is where some axes are manual: shardings then do not name axes
            named: list[Any] = shardings
            dims = [len(leaf.shape) for leaf in leaves]
            cuts = tuple(cuts_of(mesh, x.spec, ndim) for x, ndim in zip(named, dims, strict=True))
        place = _place(operands[0].sharding.num_devices, cuts)
        everywhere = NamedSharding(mesh, P())
        return (
            mesh,
            lambda *operands: call(place, *(operands if call.takes_models else operands[:end])),
            (everywhere, *shardings),
            (*[everywhere] * num_replicated, *shardings, *shardings[:num_models]),
        )

    def sharding_rule(mesh, operand_types, result_types):
        del mesh, result_types
        # A factor of its own for every dimension; a result's are those of its model, or else leaf.
        terms = _terms(operand_types)
        results = terms[-num_models:] if num_models else terms[num_replicated:]
        return f"{', '.join(terms)} -> {', '.join([terms[0], *results])}"

    def everywhere(*operands):
        end = len(operands) - (0 if call.takes_models else num_models)
        return call(_Place(), *operands[:end])

    function = custom_partitioning(everywhere)
    function.def_partition(partition=partition, sharding_rule=sharding_rule)
    if not num_models:
        return jax.jit(function)
    lead = _lead(num_models)

    @jax.jit
    def led(*operands):
        end = len(operands) - num_models
        leaves = lead(*operands[num_replicated:])
        return function(*operands[:num_replicated], *leaves, *operands[end:])

    return led


def _lead(num_models: int):
    """Leaves as they are, told to the compiler to be cut like their models where that is free.

    It then makes gradients in shards. In the rule of the update itself this would work the other
    way round as well: the sharding of a gradient would come to the update, and with it to the new
    parameter, which the next step would find cut in another way than its moments.
    """

    def partition(mesh, operands, results):
        leaves = tuple(_even(mesh, leaf.sharding, leaf.shape) for leaf in results)
        models = tuple(model.sharding for model in operands[num_models:])
        return mesh, lambda *operands: operands[:num_models], leaves, (*leaves, *models)

    def sharding_rule(mesh, operand_types, result_types):
        del mesh, result_types
        terms = ", ".join(_terms(operand_types[:num_models]))
        return f"{terms}, {terms} -> {terms}"

    function = custom_partitioning(lambda *operands: operands[:num_models])
    function.def_partition(partition=partition, sharding_rule=sharding_rule)
    return function


def _terms(types: Sequence[Any]) -> list[str]:
    """Terms of a sharding rule in which every dimension of every array is a factor of its own."""
    factors = (f"f{i}" for i in itertools.count())
    return [" ".join(next(factors) for _ in array.shape) for array in types]


def _even(mesh: Mesh, sharding: Sharding, shape: Sequence[int]) -> Sharding:
    """The sharding, or none at all for parts of unequal size, which would be padded with garbage.

    Blocks of moments must not see that. Users cannot cut an array so, but the compiler does.
    """
    try:
        sharding.shard_shape(tuple(shape))
    except ValueError:
        return NamedSharding(mesh, P())
    return sharding


_guard_p = jax.extend.core.Primitive("paged_optax_guard")
_guard_p.multiple_results = True
_guard_p.def_impl(lambda *operands: operands)
_guard_p.def_abstract_eval(lambda *operands: operands)
mlir.register_lowering(_guard_p, lambda ctx, *operands: operands)


def _no_vmap(*args, **static) -> NoReturn:
    del args, static
    raise NotImplementedError(
        "a paged optimizer cannot be vmapped: its moments are one memory that every mapped copy"
        " would write to. Stack the models' parameters along a leading axis and update them as one"
        " tree, or step each model in a loop."
    )


def _no_gradient(*args, **static) -> NoReturn:
    del args, static
    raise TypeError(
        "a paged optimizer's update cannot be differentiated: its moments are outside JAX. Use"
        " optax.adamw to differentiate through a step, or jax.lax.stop_gradient on the gradients"
        " that go into it."
    )


batching.primitive_batchers[_guard_p] = _no_vmap
ad.primitive_jvps[_guard_p] = _no_gradient
