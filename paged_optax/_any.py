"""Any optax transformation, with its state outside of XLA's memory."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType

from . import _calls
from ._in_place import in_place
from ._leafwise import Mixed, Program
from ._like_params import find_layout
from ._options import Options, Paging, Quantization, make_options
from ._partition import align
from ._refusals import guard
from ._refused import stopping_at_once
from ._rule import Rule
from ._skip import Skip, follow, skipping
from ._state import Token, check_state, make_beside, new_token, paged_state
from ._step import Step, make_step, numbers_of, part_of
from ._transformation import count_on, flatten
from ._validate import check_choice, check_dtypes, leaf_name


@paged_state
class PagedArraysState(NamedTuple):
    """The part of `PagedTransformationState` that stands for the paged arrays."""

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  int32 (): updates so far
    token: Token  # its `value`, int32 (2,): handle of the arrays, version of their contents


class PagedTransformationState(NamedTuple):
    """State of `paged`."""

    arrays: PagedArraysState
    # The wrapped state, with an `optax.MaskedNode` in the place of each paged array.
    inner_state: Any


def paged(
    tx: optax.GradientTransformation,
    *,
    replay: bool = False,
    non_finite: str = "propagate",
    quantization: Quantization | None = None,
    paging: Paging | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of any optax transformation outside of XLA's memory.

    For optimizers that have no paged form of their own (`docs/optimizers.md` lists those that do,
    which are faster). Arrays of the state that look like a parameter are kept in the formats of
    `Quantization`, where `Paging` says. Each step loads them into XLA's memory, runs the
    equations of `tx` and stores them again: leaf after leaf, and small leaves together. So no more
    than about twice the state of the largest leaf is in XLA's memory at a time.

    An array looks like a parameter if its path in the state ends in the parameter's, and it has its
    shape. Everything else stays in the state as it is: counts, scalars, keys, factors of matrices.

    With ``Quantization("float32")`` updates are equal to those of `tx` alone. In the ``"ratio"``
    format a block without a negative value is stored as second moments are, with a relative
    precision; other blocks are stored as momentum is. NaN is stored as 0 except in float32. What
    `scale_by_paged_adam8bit` says of states that change in place holds here too.

    Args:
      tx: a transformation that updates every leaf by itself. What happens to the gradients alone
        before may mix leaves, such as `optax.clip_by_global_norm`.
      replay: whether the last step may be discarded and run again; doubles the arrays' memory.
      non_finite: ``"propagate"``, or ``"skip_step"`` to leave out a step with a gradient that is
        not finite.
      quantization: how the arrays are stored; see `Quantization`. The format of a parameter is that
        of all arrays that look like it.
      paging: where they live; see `Paging`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which takes the extra arguments of `tx`. Its
      state is a `PagedTransformationState`. `moments` returns the arrays as the field ``state``, in
      the tree of the wrapped state.

    Raises:
      ValueError: from `init`, if no array of the state looks like a parameter; from `update`, if
        `tx` mixes leaves, so that it cannot be run leaf by leaf, or needs the parameters for
        initial values that are not zero and gets none.
      TypeError: from `update`, for a state of another optimizer.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), paged_optax.paged(optax.adan(1e-3)))
      >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{updates['w'][0, 0]:.6f}")
      -0.001000
      >>> print(sorted(paged_optax.moments(state).state[0]._asdict()))
      ['g', 'm', 'n', 't', 'v']

    .. note::
      Initial values that are not zero are made at the first step, of the parameters of that step.

      `apply_gradients` takes a step with it too, and saves no memory of updates.
    """
    options = make_options(
        replay=replay, non_finite=non_finite, quantization=quantization, paging=paging
    )
    check_choice("non_finite", non_finite, ("propagate", "skip_step"))
    stepper = _Stepper(optax.with_extra_args_support(tx), options)
    wrapped = optax.GradientTransformationExtraArgs(stepper.init, stepper.update)
    if non_finite == "propagate":
        return wrapped
    return skipping(wrapped, "step", f"non_finite={non_finite!r}")


class _Stepper:
    """Makes and steps states of `paged`."""

    def __init__(self, tx: optax.GradientTransformationExtraArgs, options: Options):
        self.tx = tx
        self.options = options

    def init(self, params: Any) -> PagedTransformationState:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        check_dtypes("parameter", leaves)
        guard(*(leaf for _, leaf in leaves if isinstance(leaf, Tracer)))
        layout = find_layout(self.tx.init, params)
        if leaves and not layout.paged:
            raise ValueError(
                "no array of the transformation's state looks like a parameter, so there is nothing"
                " to page: use the transformation as it is"
            )
        program = self.trace_init(params)
        others = program.run_for([program.outputs[i] for i in layout.others])
        arrays = make_beside(
            [leaf for _, leaf in leaves],
            lambda: PagedArraysState(jnp.zeros([], jnp.int32), new_token(len(layout.paged))),
        )
        return PagedTransformationState(arrays, layout.others_alone(others))

    def trace_init(self, params: Any) -> Program:
        """The wrapped `init`, of these parameters; nothing is evaluated yet."""
        leaves, treedef = jax.tree.flatten(params)
        program = Program(
            lambda *leaves: jax.tree.leaves(self.tx.init(jax.tree.unflatten(treedef, leaves))),
            leaves,
        )
        for number, leaf in zip(program.inputs, leaves, strict=True):
            program[number] = leaf
        return program

    def update(
        self, updates: Any, state: Any, params: Any = None, *, skip: Skip | None = None, **extra: Any
    ) -> tuple[Any, PagedTransformationState]:
        if not isinstance(state, PagedTransformationState):
            raise TypeError(
                f"the optimizer state is a {type(state).__name__}, not the PagedTransformationState"
                " that paged(...).init returns: start with init(params)"
            )
        token = check_state(state.arrays, PagedArraysState)
        paths, grads, treedef = flatten(updates, params)
        skip_step, _, _ = follow(skip, paths, grads)
        if not grads:
            return updates, state
        count, next_count = count_on(state.arrays.count, skip_step)
        with stopping_at_once(token) as stop:
            step = _Step(self, jax.tree.unflatten(treedef, grads), state, params, extra)
            new_token, results, others = step.run(token, count)
            stop(new_token)
        arrays = PagedArraysState(next_count, Token(new_token))
        inner = jax.tree.unflatten(jax.tree.structure(state.inner_state), others)
        return jax.tree.unflatten(treedef, results), PagedTransformationState(arrays, inner)


class _Step:
    """One update."""

    def __init__(self, stepper: _Stepper, updates: Any, state: Any, params: Any, extra: Any):
        self._tx, self._options = stepper.tx, stepper.options
        self._trace_init = stepper.trace_init
        self._params, self._extra = params, extra
        grads, self._treedef = jax.tree.flatten(updates)
        self._like = updates if params is None else params
        self._likes = [jnp.asarray(leaf) for leaf in jax.tree.leaves(self._like)]
        # Otherwise new parameters would be cut like the gradients, and not like what is stored.
        self._grads = grads if params is None else align(grads, self._likes)
        self._layout = find_layout(self._tx.init, self._like)
        self._others = jax.tree.leaves(state.inner_state)
        if len(self._others) != len(self._layout.others):
            raise TypeError(
                f"the optimizer state has {len(self._others)} arrays that are not paged, and this"
                f" optimizer has {len(self._layout.others)}: it was made by another one, or for"
                " other parameters. Start with init(params)."
            )
        self._owners = [self._layout.owners[i] for i in self._layout.paged]
        self._program = self._trace()

    def _trace(self, **options: bool) -> Program:
        """The update as a program of the paged arrays and the gradients.

        Its outputs are the paged arrays, the other leaves of the state, and the updates. As in
        optax, arrays may take another dtype in the first step, and then keep it.
        """
        layout = self._layout
        dtypes = [layout.leaves[i].dtype for i in layout.paged]
        for _ in range(3):
            inputs = [*map(self._input, self._owners, dtypes), *self._grads]
            program = Program(self._function, inputs, **options)
            made = [aval.dtype for aval in program.types[: len(dtypes)]]
            if made == dtypes:
                break
            dtypes = made
        self._dtypes = dtypes
        return program

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
        is_left = jnp.all(opened == token)  # the step was refused or skipped
        self._initial = self._find_initial(jnp.all(token[1:] == 0))
        for number, grad in zip(program.inputs[num_paged:], self._grads, strict=True):
            program[number] = grad
        program.run(common)
        groups, new_token = self._groups(), opened
        for group in groups:
            new_token = self._run_group(group, new_token, count, closes=group is groups[-1])
        others = [
            jnp.where(is_left, old, program[number])
            for old, number in zip(self._others, self._numbers("others"), strict=True)
        ]
        updates = [program[number] for number in self._numbers("updates")]
        if self._params is not None:
            updates = align(updates, self._likes)
        updates = [jnp.where(is_left, jnp.zeros_like(update), update) for update in updates]
        if destination := in_place():
            params = jax.tree.leaves(self._params)
            updates = destination.send(optax.apply_updates(params, updates), params)
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
        arrays = [*self._program.inputs[: len(self._owners)], *self._numbers("paged")]
        return self._program.split(dict(zip(arrays, self._owners * 2, strict=True)))

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
        program = self._trace_init(self._like)
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
    ) -> jax.Array:
        """Loads, steps and stores the states of some parameters. Returns the token."""
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
        token = _calls.store(part, token, count, new, likes)
        if any(equation.is_large for equation in equations):
            made = [n for n in self._numbers("updates") if program.leaf_of.get(n) in group]
            token = self._in_order(token, made)
        return token

    def _in_order(self, token: jax.Array, numbers: list[int]) -> jax.Array:
        """The token, once these values are there."""
        if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
            return token  # jax 0.10 would take the token for one that differs between devices
        token, *values = jax.lax.optimization_barrier([token, *map(self._program.__getitem__, numbers)])
        for number, value in zip(numbers, values, strict=True):
            self._program[number] = value
        return token

    def _mixed(self, error: Mixed) -> ValueError:
        names = [
            leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(self._like)
        ]
        return ValueError(
            f"paged() runs a transformation leaf by leaf, and this one brings the states of"
            f" {names[error.one]} and {names[error.other]} together (in {error.operation}). Put what"
            " mixes updates of several leaves, such as a clip by their global norm, after it:"
            " optax.chain(paged(tx), ...). In place of optax.MultiSteps use"
            " paged_optax.MultiSteps(paged(tx), ...). Optimizers that measure all parameters"
            " together (prodigy, dadapt, mechanic) cannot be paged."
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
