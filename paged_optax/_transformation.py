"""The update of a paged optimizer: what `optax.scale_by_adam` does, with the moments elsewhere."""

import contextvars
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from . import _calls
from ._clip import unclipped
from ._ffi import SKIP_STEP
from ._in_place import in_place, not_in_place
from ._names import names_of, number_tree
from ._non_finite import varying
from ._options import Options
from ._refusals import guard
from ._refused import stopping_at_once
from ._rule import Rule, stack
from ._skip import Skip, follow, skipping
from ._state import Token, check_state, is_paged, make_beside, new_token
from ._step import make_step
from ._validate import check_dtypes, check_flag, check_rate, check_shapes

# Called with the token and the updates of each step that rounds parameters, in the thread that
# set it.
Observer = Callable[[jax.Array, list[jax.Array]], None]
observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer", default=None)


def transformation(
    rule: Rule, options: Options, state_type: type[Any]
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates to the direction of a rule.

    Args:
      rule: the optimizer, with its hyperparameters.
      options: what all paged optimizers have.
      state_type: a NamedTuple of ``count`` and ``token``, registered by `paged_state`.
    """
    return _finish([_Paged(rule, options, state_type).direction()], options)


def descend(
    rule: Rule,
    learning_rate: optax.ScalarOrSchedule,
    options: Options,
    state_type: type[Any],
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A step against the direction of a rule, with weight decay unless that is None.

    It is a chain, as in optax; in place, or with a `param_rounding` other than ``"nearest"``, one
    call does it all. Arguments are those of `transformation` and of `paged_optax.paged_adamw8bit`.
    """
    check_rate("learning_rate", learning_rate)
    paged = _Paged(rule, options, state_type)
    descent = _Descent(learning_rate, 0.0 if weight_decay is None else weight_decay, mask)
    if options.param_rounding != "nearest":
        return _finish([paged.descent(descent)], options)
    links: list[Any] = [paged.direction()]
    if weight_decay is not None:
        links.append(optax.add_decayed_weights(weight_decay, mask))
    links.append(optax.scale_by_learning_rate(learning_rate))
    return _finish(links, options, paged.chain_in_place(descent))


def compose(
    options: Options, *links: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """A chain of any links, which skips as a whole what `non_finite` says.

    Its paged links must not skip by themselves: see `part_of`. Those with other links after them
    are `before_others`.
    """
    mode, tx = options.non_finite, _chain(list(links), None)
    if mode == "propagate":
        return tx
    return skipping(tx, mode.removeprefix("skip_"), f"non_finite={mode!r}")


def before_others(
    rule: Rule, options: Options, state_type: type[Any]
) -> optax.GradientTransformationExtraArgs:
    """`transformation`, as a link of `compose` that returns directions in place too."""
    tx = transformation(rule, part_of(options), state_type)

    def update_fn(updates, state, params=None, **extra_args):
        with not_in_place():
            return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def ascend(
    rule: Rule, options: Options, state_type: type[Any]
) -> optax.GradientTransformationExtraArgs:
    """A step along the direction of a rule, of updates that have the learning rate already."""
    if options.param_rounding == "nearest":
        return transformation(rule, options, state_type)
    return descend(rule, -1.0, options, state_type)


def part_of(options: Options, param_rounding: str = "nearest") -> Options:
    """The options of a link inside of `compose`."""
    return dataclasses.replace(options, non_finite="propagate", param_rounding=param_rounding)


class _Paged:
    """A paged optimizer: makes states, and steps them by the custom call."""

    def __init__(self, rule: Rule, options: Options, state_type: type[Any]):
        self._rule = rule
        self._options = options
        self._state_type = state_type

    def init(self, params: Any) -> Any:
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        check_dtypes("parameter", leaves)
        guard(*(leaf for _, leaf in leaves if isinstance(leaf, Tracer)))
        # `moments` of a state that is restored before any update shows them in this tree.
        number_tree(names_of([path for path, _ in leaves]), tree)
        return make_beside(
            [leaf for _, leaf in leaves],
            lambda: self._state_type(jnp.zeros([], jnp.int32), new_token(num_leaves=len(leaves))),
        )

    def direction(self) -> optax.GradientTransformationExtraArgs:
        """Returns directions. In place, they are what parameters change by."""

        def update_fn(updates, state, params=None, *, skip: Skip | None = None, **extra_args):
            del extra_args
            rates = None
            if in_place():
                rates = _Rates((-1.0, 0.0), (False,) * len(jax.tree.leaves(updates)))
            return self._step(updates, state, params, skip, rates)

        return optax.GradientTransformationExtraArgs(self.init, update_fn)

    def descent(self, descent: "_Descent") -> optax.GradientTransformationExtraArgs:
        """Returns updates of the parameters."""

        def update_fn(updates, state, params=None, *, skip: Skip | None = None, **extra_args):
            del extra_args
            check_state(state, self._state_type)
            rates = descent.resolve([state.count] * 2, updates, params)
            return self._step(updates, state, params, skip, rates)

        return optax.GradientTransformationExtraArgs(self.init, update_fn)

    def chain_in_place(self, descent: "_Descent") -> Callable[..., Any]:
        """The update, in place, of a chain of the direction, weight decay and the learning rate.

        The states of the latter two hold a count each if they are schedules, and nothing else.
        """

        def update_fn(updates, state, params=None, *, skip: Skip | None = None, **extra_args):
            del extra_args
            counts = [(jax.tree.leaves(link) or [None])[0] for link in (state[-1], state[1])]
            rates = descent.resolve(counts, updates, params)
            results, paged_state = self._step(updates, state[0], params, skip, rates)
            others = jax.tree.map(optax.safe_increment, state[1:])
            refused = _is_refused(state[0], paged_state, updates)
            return results, (paged_state, *_unless(refused, state[1:], others))

        return update_fn

    def _step(
        self, updates: Any, state: Any, params: Any, skip: Skip | None, rates: "_Rates | None"
    ) -> tuple[Any, Any]:
        """Directions (without `rates`), updates or `NewParam`s of one step, and the next state."""
        token = check_state(state, self._state_type)
        paths, grads, treedef = flatten(updates, params)
        grads, limits = unclipped(updates, grads)
        skip_step, grads, has_masks = follow(skip, paths, grads)
        count, next_count = count_on(state.count, skip_step)
        if not grads:
            return updates, self._state_type(next_count, Token(token))
        destination = in_place()
        olds = jax.tree.leaves(params)
        with stopping_at_once(token) as stop:
            new_token, results = _calls.update(
                make_step(
                    self._rule,
                    self._options,
                    grads,
                    paths,
                    treedef,
                    output="direction" if rates is None else "params" if destination else "update",
                    decays=rates.decays if rates else (),
                    skip_elements=has_masks,
                    clips=bool(limits),
                ),
                token,
                count,
                stack(
                    (
                        *self._rule.hyperparams(state.count),
                        *(rates.values if rates else ()),
                        *limits,
                    )
                ),
                grads,
                [jnp.asarray(param) for param in olds],
            )
            stop(new_token)
        next_count = _unless(jnp.all(token == new_token), state.count, next_count)
        if destination:
            results = destination.send(results, olds)
        elif rates and (observe := observer.get()):
            observe(new_token, results)
        new_state = self._state_type(next_count, Token(new_token))
        return jax.tree.unflatten(treedef, results), new_state


def flatten(updates: Any, params: Any) -> tuple[tuple[str, ...], list[jax.Array], Any]:
    """Paths and gradients of all leaves, checked, and the structure of their tree."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    check_dtypes("gradient", leaves)
    check_shapes(leaves, params)
    paths = names_of([path for path, _ in leaves])
    return paths, [jnp.asarray(grad) for _, grad in leaves], treedef


def count_on(count: jax.Array, skip: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The count for the call, which skips a step at SKIP_STEP, and that of the next state."""
    # A count below 0 is refused, and stays so: it must not grow into a good one.
    next_count = jnp.where(count < 0, count, optax.safe_increment(count))
    if skip is None:
        return count, next_count
    return jnp.where(skip, SKIP_STEP, count), jnp.where(skip, count, next_count)


class _Rates(NamedTuple):
    """What remains to be done with the direction in one step."""

    values: tuple[Any, Any]  # learning rate and weight decay
    decays: tuple[bool, ...]  # of each leaf, whether weight decay applies


@dataclasses.dataclass(frozen=True)
class _Descent:
    """What remains to be done with the direction, for a custom call that does it too."""

    learning_rate: optax.ScalarOrSchedule
    weight_decay: optax.ScalarOrSchedule
    mask: Any

    def resolve(self, counts: Sequence[Any], updates: Any, params: Any) -> _Rates:
        """Those of this step.

        Args:
          counts: the steps so far, for the learning rate's and for the weight decay's schedule.
          updates: gradients, for a mask that is a function.
          params: parameters.
        """
        if params is None:
            raise ValueError(
                "param_rounding other than 'nearest' needs the parameters: pass them to update"
                " as its third argument"
            )
        check_dtypes("parameter", jax.tree_util.tree_leaves_with_path(params))
        rates = []
        for name, count in zip(("learning_rate", "weight_decay"), counts, strict=True):
            value = getattr(self, name)
            if callable(value):
                value = value(count)
                check_rate(f"{name}, from its schedule,", value)
            rates.append(value)
        return _Rates((rates[0], rates[1]), _decays(self.mask, updates))


def _decays(mask: Any, updates: Any) -> tuple[bool, ...]:
    """Of each leaf, whether weight decay applies."""
    if mask is None:
        return (True,) * len(jax.tree.leaves(updates))
    tree = mask(updates) if callable(mask) else mask
    flags = jax.tree.map(
        lambda m, part: jax.tree.map(lambda _: check_flag("mask", m), part), tree, updates
    )
    return tuple(jax.tree.leaves(flags))


def _finish(
    links: list[Any], options: Options, in_place_fn: Callable[..., Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The links as one transformation, which skips what `non_finite` says.

    Args:
      links: the first is the paged optimizer.
      options: the user's.
      in_place_fn: the update of all of them, in place; None if there is but one.
    """
    mode = options.non_finite
    if mode == "propagate":
        return links[0] if len(links) == 1 else _chain(links, in_place_fn)
    return skipping(
        _chain(links, in_place_fn),
        mode.removeprefix("skip_"),
        f"non_finite={mode!r}",
        sends_masks=False,
        makes_zeros=len(links) > 1,
    )


def _chain(
    links: list[Any], in_place_fn: Callable[..., Any] | None
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, which says what is wrong with a state that was made with other options.

    After a paged link whose step was refused, parameters count as zero for the links that are not
    paged, so that weight decay does nothing either, and the counts of these links stay.
    """
    extended = [optax.with_extra_args_support(link) for link in links]

    def update_fn(updates, state, params=None, **extra_args):
        if not isinstance(state, tuple) or len(state) != len(links) or hasattr(state, "_fields"):
            raise TypeError(
                f"the optimizer state is a {type(state).__name__} that this optimizer's init did"
                " not return; was it made with another param_rounding or non_finite? Start with"
                " init(params)."
            )
        if in_place_fn and in_place():
            return in_place_fn(updates, state, params, **extra_args)
        seen, new_states, refused = params, [], None
        for i, (link, old) in enumerate(zip(extended, state, strict=True)):
            link_params = params if is_paged(old) else seen
            updates, new = link.update(updates, old, link_params, **extra_args)
            if is_paged(new) and i + 1 < len(links):
                refused = _is_refused(old, new, updates)
                seen = _zero_if(refused, seen)
            else:
                new = _unless(refused, old, new)
            new_states.append(new)
        return updates, tuple(new_states)

    return optax.GradientTransformationExtraArgs(optax.chain(*links).init, update_fn)


def _is_refused(old: Any, new: Any, updates: Any) -> jax.Array | None:
    """Whether the step between two paged states was refused or skipped; None without updates."""
    if not jax.tree.leaves(updates):
        return None
    before, after = (getattr(state.token, "value", state.token) for state in (old, new))
    return jnp.all(before == after)  # whole: jax 0.10 takes no part of a token that is cut


def _unless(refused: jax.Array | None, old: Any, new: Any) -> Any:
    """New counts, or the old ones after a step that was refused."""

    def select(before: jax.Array, after: jax.Array) -> jax.Array:
        if refused is None or not varying(refused) <= varying(before):
            return after
        return jnp.where(refused, before, after)

    return jax.tree.map(select, old, new)


def _zero_if(refused: jax.Array | None, params: Any) -> Any:
    """Parameters, or zeros after a step that was refused.

    A select of the updates would do as well, but may keep XLA from contracting what comes before
    it, and so change bits. Outside of `jax.jit` a refused update has raised, and the parameters are
    not copied.
    """
    if not isinstance(refused, Tracer):
        return params
    return jax.tree.map(lambda p: jnp.where(refused, jnp.zeros_like(p), p), params)
