"""How one call is spread over devices: each works on its own shards, and no data moves.

A bare custom call on sharded operands is compiled as an all-gather and the whole work on every
device. To keep it local, mesh axes are treated by their type. Explicit axes are in the types of
the operands, and `jax.shard_map` cuts along them. Auto axes are settled by the compiler, and
`custom_partitioning` tells it that every dimension may be cut in any way. Manual axes have been cut
already, by the user or by the first rule. A mesh may have axes of all three types.

Tokens are replicated: every device keeps the moments of its shards under the same handle.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from ._shards import Cuts, Shards, cuts_of


@dataclasses.dataclass(frozen=True)
class Place:
    """What a compiled call knows of the devices that its program runs on."""

    num_devices: int = 1
    shards: str = ""  # see `Shards`; empty where that is not known, or the device is the only one


class Call(Protocol):
    """What runs on each device. Equal calls are traced and compiled once, so it is hashable."""

    @property
    def takes_guides(self) -> bool:
        """Whether the guides (see `spread`) are its last operands."""
        ...

    def __call__(self, place: Place, *operands: jax.Array) -> tuple[jax.Array, ...]: ...


def spread(
    call: Call,
    operands: Sequence[jax.Array],
    num_replicated: int,
    guides: Sequence[jax.Array] = (),
    cuts: Cuts | None = None,
) -> Any:
    """Calls ``call(place, *operands)`` on every device with its shards of the operands.

    Args:
      call: what to run.
      operands: arrays.
      num_replicated: number of leading operands that are the same on every device. The first
        result is the same everywhere too; the others are cut like the remaining operands.
      guides: arrays whose sharding the remaining operands follow, one each; empty to keep their
        own.
      cuts: how the remaining operands were cut already, if that is known.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = list(zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True))
    explicit = frozenset(name for name, _, kind in axes if kind == AxisType.Explicit)
    taken = guides if call.takes_guides else ()
    with jax.disable_jit(False):  # a custom call has to be compiled, also under jax.disable_jit()
        if explicit:
            leaves = operands[num_replicated:]
            # Without `unreduced`: what is a sum over devices is summed before it is a gradient.
            specs = tuple(P(*jax.typeof(x).sharding.spec.partitions) for x in guides or leaves)
            return _explicit(call, num_replicated, explicit, specs)(*operands, *taken)
        # custom_partitioning fails where some axes are manual and the others leave nothing to cut.
        nothing_left = all(kind == AxisType.Manual or size == 1 for _, size, kind in axes)
        if AxisType.Manual in mesh.axis_types and nothing_left:
            return call(_place(mesh.size, cuts), *operands, *taken)
        return _automatic(call, num_replicated, len(guides))(*operands, *guides)


def _place(num_devices: int, cuts: Cuts | None) -> Place:
    return Place(num_devices, "" if cuts is None else Shards(cuts).encode())


@functools.lru_cache(maxsize=256)
def _explicit(
    call: Call, num_replicated: int, explicit: frozenset[str], specs: tuple[P, ...]
) -> Any:
    """Cuts along the explicit axes, and then calls `spread` for the others.

    Inside of `jax.shard_map` the explicit axes have become manual ones, so `spread` does not come
    back here. It finds what is left to do: nothing, or to cut along automatic axes.
    """

    @jax.jit  # shard_map over some axes of several has to be compiled
    def function(*operands):
        mesh = jax.sharding.get_abstract_mesh()
        end = num_replicated + len(specs)
        # A user's rule may have cut the token.
        whole = [jax.sharding.reshard(operand, P()) for operand in operands[:num_replicated]]
        guides = operands[end:]  # none, or cut as specs say
        leaves = [
            jax.sharding.reshard(leaf, spec)
            for leaf, spec in zip(operands[num_replicated:end], specs, strict=True)
        ]
        cuts = None
        if AxisType.Manual not in mesh.axis_types:  # along those, the user has cut already
            cuts = tuple(cuts_of(mesh, spec, x.ndim) for spec, x in zip(specs, leaves, strict=True))
        return jax.shard_map(
            lambda *shards: spread(call, shards[:end], num_replicated, shards[end:], cuts),
            in_specs=(*[P()] * num_replicated, *specs, *specs[: len(guides)]),
            out_specs=(P(), *specs),
            axis_names=explicit,
            check_vma=False,
        )(*whole, *leaves, *guides)

    return function


@functools.lru_cache(maxsize=256)
def _automatic(call: Call, num_replicated: int, num_guides: int) -> Any:
    """Leaves the cutting to the compiler."""

    def partition(mesh, operands, results):
        del results
        # A guide's sharding goes before that of its leaf.
        end = len(operands) - num_guides
        leaves = operands[end:] if num_guides else operands[num_replicated:]
        shardings = [even(mesh, leaf.sharding, leaf.shape) for leaf in leaves]
        cuts = None
        if not mesh.empty:  # it is where some axes are manual: shardings then do not name axes
            named: list[Any] = shardings
            dims = [len(leaf.shape) for leaf in leaves]
            cuts = tuple(cuts_of(mesh, x.spec, ndim) for x, ndim in zip(named, dims, strict=True))
        place = _place(operands[0].sharding.num_devices, cuts)
        everywhere = NamedSharding(mesh, P())
        return (
            mesh,
            lambda *operands: call(place, *(operands if call.takes_guides else operands[:end])),
            (everywhere, *shardings),
            (*[everywhere] * num_replicated, *shardings, *shardings[:num_guides]),
        )

    def sharding_rule(mesh, operand_types, result_types):
        del mesh, result_types
        # A result is cut like its guide, or else like its leaf.
        terms = sharding_terms(operand_types)
        results = terms[-num_guides:] if num_guides else terms[num_replicated:]
        return f"{', '.join(terms)} -> {', '.join([terms[0], *results])}"

    def on_one_device(*operands):
        end = len(operands) - (0 if call.takes_guides else num_guides)
        return call(Place(), *operands[:end])

    function = custom_partitioning(on_one_device)
    function.def_partition(partition=partition, sharding_rule=sharding_rule)
    if not num_guides:
        return jax.jit(function)
    follow = _follow(num_guides)

    @jax.jit
    def guided(*operands):
        end = len(operands) - num_guides
        leaves = follow(*operands[num_replicated:])
        return function(*operands[:num_replicated], *leaves, *operands[end:])

    return guided


def _follow(num_guides: int) -> Any:
    """Identity that tells the compiler to cut each leaf like its guide, if that is still open.

    It then makes gradients in shards. In the rule of the update itself this would work the other
    way round as well: the sharding of a gradient would come to the update, and with it to the new
    parameter, which the next step would find cut in another way than its moments.
    """

    def partition(mesh, operands, results):
        leaves = tuple(even(mesh, leaf.sharding, leaf.shape) for leaf in results)
        guides = tuple(guide.sharding for guide in operands[num_guides:])
        return mesh, lambda *operands: operands[:num_guides], leaves, (*leaves, *guides)

    def sharding_rule(mesh, operand_types, result_types):
        del mesh, result_types
        terms = ", ".join(sharding_terms(operand_types[:num_guides]))
        return f"{terms}, {terms} -> {terms}"

    function = custom_partitioning(lambda *operands: operands[:num_guides])
    function.def_partition(partition=partition, sharding_rule=sharding_rule)
    return function


def sharding_terms(types: Sequence[Any]) -> list[str]:
    """Terms of a sharding rule in which every dimension of every array is a factor of its own."""
    factors = (f"f{i}" for i in itertools.count())
    return [" ".join(next(factors) for _ in array.shape) for array in types]


def even(mesh: Mesh, sharding: Sharding, shape: Sequence[int]) -> Sharding:
    """The sharding, or none at all for parts of unequal size, which would be padded with garbage.

    Blocks of moments must not see that. Users cannot cut an array so, but the compiler does.
    """
    try:
        sharding.shard_shape(tuple(shape))
    except ValueError:
        return NamedSharding(mesh, P())
    return sharding
