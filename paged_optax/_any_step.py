"""One step of a transformation whose state is paged: leaf by leaf, on one token."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType

from . import _calls
from ._in_place import in_place
from ._leafwise import Mixed, Program
from ._like_params import find_layout
from ._options import Options
from ._partition import align
from ._rule import Rule
from ._step import Step, make_step, numbers_of, part_of
from ._validate import leaf_name


def trace_init(init: Callable[[Any], Any], params: Any) -> Program:
    """A transformation's `init`, of these parameters; nothing is evaluated yet."""
    leaves, treedef = jax.tree.flatten(params)
    program = Program(
        lambda *leaves: jax.tree.leaves(init(jax.tree.unflatten(treedef, leaves))), leaves
    )
    for number, leaf in zip(program.inputs, leaves, strict=True):
        program[number] = leaf
    return program


class LeafwiseStep:
    """One update of `paged`.

    Args:
      tx: the wrapped transformation.
      options: the user's.
      updates: gradients.
      inner_state: the wrapped state without the paged arrays.
      params: parameters, or None.
      extra: further arguments of the wrapped update.
    """

    def __init__(
        self,
        tx: optax.GradientTransformationExtraArgs,
        options: Options,
        updates: Any,
        inner_state: Any,
        params: Any,
        extra: dict[str, Any],
    ):
        self._tx, self._options = tx, options
        self._params, self._extra = params, extra
        grads, self._treedef = jax.tree.flatten(updates)
        self._like = updates if params is None else params
        self._likes = [jnp.asarray(leaf) for leaf in jax.tree.leaves(self._like)]
        # Otherwise new parameters would be cut like the gradients, and not like what is stored.
        self._grads = grads if params is None else align(grads, self._likes)
        self._layout = find_layout(self._tx.init, self._like)
        self._others = jax.tree.leaves(inner_state)
        if len(self._others) != len(self._layout.others):
            raise TypeError(
                f"the optimizer state has {len(self._others)} arrays that are not paged, and this"
                f" optimizer has {len(self._layout.others)}: it was made by another one, or for"
                " other parameters. Start with init(params)."
            )
        self._owners = [owner for owner in self._layout.owners if owner is not None]
        self._program = self._trace()

    def _trace(self, **options: bool) -> Program:
        """The update as a program of the paged arrays and the gradients.

        Its outputs are the paged arrays, the other leaves of the state, and the updates. As in
        optax, arrays may take another dtype in the first step, and then keep it.
        """
        layout = self._layout
        dtypes = [layout.leaves[i].dtype for i in layout.paged]
        for _ in range(4):
            inputs = [*map(self._input, self._owners, dtypes), *self._grads]
            program = Program(self._function, inputs, **options)
            made = program.dtypes[: len(dtypes)]
            if made == dtypes:
                self._dtypes = dtypes
                return program
            dtypes = made
        raise ValueError("the transformation's update changes the dtype of an array at every step")

    def _input(self, owner: int, dtype: Any) -> Any:
        like = self._likes[owner]
        if isinstance(like, Tracer):
            return jnp.zeros_like(like, dtype)
        return jax.ShapeDtypeStruct(like.shape, dtype)

    def _function(self, *inputs: jax.Array) -> list[Any]:
        layout = self._layout
        num_paged = len(layout.paged)
        state = layout.join(inputs[:num_paged], self._others)
        updates = jax.tree.unflatten(self._treedef, inputs[num_paged:])
        results, state = self._tx.update(updates, state, self._params, **self._extra)
        leaves, treedef = jax.tree.flatten(state)
        if treedef != layout.treedef:
            raise ValueError(
                "the transformation's update returns a state of another structure than its init, so"
                " it cannot be paged"
            )
        for i in layout.paged:
            if leaves[i].shape != layout.leaves[i].shape:
                raise ValueError("the transformation's update changes the shape of an array")
        results = jax.tree.leaves(results)
        if len(results) != len(self._grads):
            raise ValueError("the transformation's update returns another tree than the gradients'")
        return [*(leaves[i] for i in layout.paged), *(leaves[i] for i in layout.others), *results]

    def run(self, token: jax.Array, count: jax.Array) -> tuple[jax.Array, list[Any], list[Any]]:
        """The new token, the updates, and the leaves of the state that are not paged."""
        common, self._by_leaf = self._split()
        program, num_paged = self._program, len(self._owners)
        self._open_step, opened = self._open(token, count)
        is_version = np.array([False, True])  # a token that is cut over devices cannot be sliced
        self._initial = self._find_initial(jnp.all((token == 0) | ~is_version))
        self._was_refused = jnp.all(opened == token)  # or skipped
        closed = jnp.where(is_version, -opened, opened)
        for number, grad in zip(program.inputs[num_paged:], self._grads, strict=True):
            program[number] = grad
        program.run(common)
        groups, new_token = self._groups(), opened
        lefts: dict[int | None, jax.Array] = {}  # by parameter, whether its update is left out
        left = self._was_refused
        for group in groups:
            closes = group is groups[-1]
            new_token, stored = self._run_group(group, new_token, count, closes=closes)
            left = self._was_refused | jnp.any(stored != (closed if closes else opened))
            # Else XLA compares the tokens of all groups at once, after the last one, and until then
            # every parameter's new arrays take memory.
            new_token, (left,) = _in_order(new_token, [left])
            lefts.update(dict.fromkeys(group, left))
        self.is_left = is_left = left
        (old_token,) = align([token], [new_token])
        new_token = jnp.where(is_left, old_token, new_token)
        others = [
            jnp.where(is_left, old, program[number])
            for old, number in zip(self._others, self._numbers("others"), strict=True)
        ]
        # Each update waits for the end of its own group only: all would take memory until the last
        # one. So if a step is lost in the middle, an update is the right one, or zero.
        first = lefts[groups[0][0]]
        numbers = self._numbers("updates")
        lefts_of = [lefts.get(program.leaf_of.get(number), first) for number in numbers]
        updates = [program[number] for number in numbers]
        if self._params is not None:
            updates = align(updates, self._likes)
        updates = [
            jnp.where(left, jnp.zeros_like(update), update)
            for left, update in zip(lefts_of, updates, strict=True)
        ]
        if destination := in_place():
            params: Any = jax.tree.leaves(self._params)
            results: Any = optax.apply_updates(params, updates)
            updates = destination.send(results, params)
        return new_token, updates, others

    def _numbers(self, kind: str) -> list[int]:
        """Of the program's outputs of one kind."""
        outputs, num_paged = self._program.outputs, len(self._owners)
        end = num_paged + len(self._others)
        return {"paged": outputs[:num_paged], "others": outputs[num_paged:end]}.get(
            kind, outputs[end:]
        )

    def _split(self) -> Any:
        """The program's equations, see `Program.split`."""
        try:
            return self._split_once()
        except Mixed:  # optax chooses between two whole trees with jax.lax.cond
            self._program = self._trace(writes_out_branches=True)
        try:
            return self._split_once()
        except Mixed as error:
            raise self._mixed(error) from None

    def _split_once(self) -> Any:
        inputs = self._program.inputs[: len(self._owners)]
        return self._program.split(
            dict(zip(inputs, self._owners, strict=True)),
            list(zip(self._numbers("paged"), self._owners, strict=True)),
        )

    def _open(self, token: jax.Array, count: jax.Array) -> tuple[Step, jax.Array]:
        """Begins the step. Returns what the call was told, and the token."""
        formats = numbers_of(self._options.quantization, self._like)
        likes = [self._likes[owner] for owner in self._owners]
        step = make_step(
            Rule("array"),
            self._options,
            likes,
            self._layout.paths,
            self._layout.paged_alone(),
            output="open",
            formats=tuple(formats[owner] for owner in self._owners),
        )
        return step, _calls.open_step(step, token, count, likes)

    def _find_initial(self, is_fresh: jax.Array) -> dict[int, Any]:
        """By paged array whose initial values are not zero: what makes them of what is loaded."""
        program = trace_init(self._tx.init, self._like)
        numbers = {k: program.outputs[i] for k, i in enumerate(self._layout.paged)}
        values = {k: number for k, number in numbers.items() if not program.is_zero(number)}
        if self._params is None and program.depends(values.values()):
            raise ValueError(
                "this transformation begins with values of the parameters: pass them to update as"
                " its third argument"
            )
        made = program.run_for(values.values())
        return {
            k: lambda array, value=value: jnp.where(is_fresh, value.astype(array.dtype), array)
            for k, value in zip(values, made, strict=True)
        }

    def _run_group(
        self, group: list[int], token: jax.Array, count: jax.Array, *, closes: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Loads, steps and stores the states of some parameters.

        Returns the token to go on with, and the token that the store returned.
        """
        program, num_paged = self._program, len(self._owners)
        arrays = [k for k, owner in enumerate(self._owners) if owner in group]
        likes = [self._likes[self._owners[k]] for k in arrays]
        grads = [program.inputs[num_paged + owner] for owner in group]
        token = self._in_order(token, grads)  # so that nothing is loaded before there are gradients
        part = part_of(self._open_step, arrays, closes=closes)
        token, loaded = _calls.load(part, [self._dtypes[k] for k in arrays], token, likes)
        for k, array in zip(arrays, loaded, strict=True):
            make = self._initial.get(k, lambda array: array)
            program[program.inputs[k]] = make(array)
        equations = [equation for owner in group for equation in self._by_leaf.get(owner, ())]
        program.run(equations)
        new = [program[self._numbers("paged")[k]] for k in arrays]
        token = stored = _calls.store(part, token, count, new, likes)
        if any(equation.is_large for equation in equations):
            made = [n for n in self._numbers("updates") if program.leaf_of.get(n) in group]
            token = self._in_order(token, made)
        return token, stored

    def _in_order(self, token: jax.Array, numbers: list[int]) -> jax.Array:
        """The token, once these values of the program are there."""
        token, values = _in_order(token, [self._program[number] for number in numbers])
        for number, value in zip(numbers, values, strict=True):
            self._program[number] = value
        return token

    def _mixed(self, error: Mixed) -> ValueError:
        names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(self._like)]
        one, other = names[error.one], names[error.other]
        return ValueError(
            f"paged() runs a transformation leaf by leaf, but in this one the states of {one} and"
            f" {other} meet (in the operation {error.operation}). Leave out what mixes updates of"
            " several leaves, such as a clip by their global norm, and put it after:"
            " optax.chain(paged(tx), ...). Optimizers that measure all leaves together (prodigy,"
            " dadapt, dog, momo, mechanize) cannot be paged."
        )

    def _groups(self) -> list[list[int]]:
        """Parameters that are stepped together: no more than the largest has of states."""
        sizes = dict.fromkeys(range(len(self._likes)), 0)
        for owner, dtype in zip(self._owners, self._dtypes, strict=True):
            sizes[owner] += math.prod(self._likes[owner].shape) * dtype.itemsize
        most = max(sizes.values())
        groups: list[list[int]] = []
        room = -1
        for owner in sorted(set(self._owners)):
            if sizes[owner] > room or not groups:
                groups.append([])
                room = most
            groups[-1].append(owner)
            room -= sizes[owner]
        return groups


def _in_order(token: jax.Array, values: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """The token, once these values are there, and the values."""
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        return token, values  # jax 0.10 would take the token for one that differs between devices
    token, *values = jax.lax.optimization_barrier([token, *values])
    return token, values
