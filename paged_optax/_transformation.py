"""The update of a paged optimizer: what `optax.scale_by_adam` does, with the moments elsewhere."""

import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from . import _calls
from ._ffi import SKIP_STEP
from ._options import Options
from ._refusals import guard
from ._rule import Rule, stack
from ._skip import Skip, follow, skipping
from ._state import Token, check_state, new_token
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
    return _finish([_paged(rule, options, state_type)], options)


def descend(
    rule: Rule,
    learning_rate: optax.ScalarOrSchedule,
    options: Options,
    state_type: type[Any],
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A step against the direction of a rule, with weight decay unless that is None.

    It is a chain, as in optax; with a `param_rounding` other than ``"nearest"``, it is one
    transformation that does the same in one call. Arguments are those of `transformation` and of
    `paged_optax.paged_adamw8bit`.
    """
    check_rate("learning_rate", learning_rate)
    if options.param_rounding != "nearest":
        descent = _Descent(learning_rate, 0.0 if weight_decay is None else weight_decay, mask)
        return _finish([_paged(rule, options, state_type, descent)], options)
    links: list[optax.GradientTransformation] = [_paged(rule, options, state_type)]
    if weight_decay is not None:
        links.append(optax.add_decayed_weights(weight_decay, mask))
    return _finish([*links, optax.scale_by_learning_rate(learning_rate)], options)


def compose(
    options: Options, *links: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """A chain of any links, which skips as a whole what `non_finite` says.

    Its paged links must not skip by themselves: see `part_of`.
    """
    mode = options.non_finite
    if mode == "propagate":
        return _chain(list(links))
    return skipping(_chain(list(links)), mode.removeprefix("skip_"), f"non_finite={mode!r}")


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


def _paged(
    rule: Rule,
    options: Options,
    state_type: type[Any],
    descent: "_Descent | None" = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that makes the custom call, for the direction or all of `descent`."""

    def init_fn(params):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        check_dtypes("parameter", leaves)
        guard(*(leaf for _, leaf in leaves if isinstance(leaf, Tracer)))
        return state_type(count=jnp.zeros([], jnp.int32), token=new_token(num_leaves=len(leaves)))

    def update_fn(updates, state, params=None, *, skip: Skip | None = None, **extra_args):
        del extra_args
        token = check_state(state, state_type)
        paths, grads, treedef = _flatten(updates, params)
        skip_step, grads, has_masks = follow(skip, paths, grads)
        count, next_count = _count(state.count, skip_step)
        if not grads:
            return updates, state_type(next_count, Token(token))
        rates, decays = descent.resolve(state.count, updates, params) if descent else ((), None)
        step = make_step(
            rule, options, grads, paths, treedef, decays=decays, skip_elements=has_masks
        )
        token, results = _calls.update(
            step,
            token,
            count,
            stack((*rule.hyperparams(state.count), *rates)),
            grads,
            [jnp.asarray(param) for param in jax.tree.leaves(params)],
        )
        if descent and (observe := observer.get()):
            observe(token, results)
        return jax.tree.unflatten(treedef, results), state_type(next_count, Token(token))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _flatten(updates: Any, params: Any) -> tuple[tuple[str, ...], list[jax.Array], Any]:
    """Paths and gradients of all leaves, checked, and the structure of their tree."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    check_dtypes("gradient", leaves)
    check_shapes(leaves, params)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in leaves)
    return paths, [jnp.asarray(grad) for _, grad in leaves], treedef


def _count(count: jax.Array, skip: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The count for the call, which skips a step at SKIP_STEP, and that of the next state."""
    next_count = jnp.asarray(optax.safe_increment(count))
    if skip is None:
        return count, next_count
    return jnp.where(skip, SKIP_STEP, count), jnp.where(skip, count, next_count)


@dataclasses.dataclass(frozen=True)
class _Descent:
    """What remains to be done with the direction, for a custom call that does it too."""

    learning_rate: optax.ScalarOrSchedule
    weight_decay: optax.ScalarOrSchedule
    mask: Any

    def resolve(self, count: jax.Array, updates: Any, params: Any) -> tuple[tuple, tuple]:
        """Learning rate and weight decay of this step, and which leaves decay."""
        if params is None:
            raise ValueError(
                "param_rounding other than 'nearest' needs the parameters: pass them to update"
                " as its third argument"
            )
        check_dtypes("parameter", jax.tree_util.tree_leaves_with_path(params))
        rates = []
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if callable(value):
                value = value(count)
                check_rate(f"{name}, from its schedule,", value)
            rates.append(value)
        return tuple(rates), _decays(self.mask, updates)


def _decays(mask: Any, updates: Any) -> tuple[bool, ...]:
    """Of each leaf, whether weight decay applies."""
    if mask is None:
        return (True,) * len(jax.tree.leaves(updates))
    tree = mask(updates) if callable(mask) else mask
    flags = jax.tree.map(
        lambda m, part: jax.tree.map(lambda _: check_flag("mask", m), part), tree, updates
    )
    return tuple(jax.tree.leaves(flags))


def _finish(links: list[Any], options: Options) -> optax.GradientTransformationExtraArgs:
    """The links as one transformation, which skips what `non_finite` says."""
    mode = options.non_finite
    if mode == "propagate":
        return links[0] if len(links) == 1 else _chain(links)
    return skipping(
        _chain(links),
        mode.removeprefix("skip_"),
        f"non_finite={mode!r}",
        sends_masks=False,
        makes_zeros=len(links) > 1,
    )


def _chain(links: list[Any]) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, which says what is wrong with a state that was made with other options."""
    tx = optax.chain(*links)

    def update_fn(updates, state, params=None, **extra_args):
        if not isinstance(state, tuple) or len(state) != len(links) or hasattr(state, "_fields"):
            raise TypeError(
                f"the optimizer state is a {type(state).__name__} that this optimizer's init did"
                " not return; was it made with another param_rounding or non_finite? Start with"
                " init(params)."
            )
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)
