"""The optimizer inside optax: hyperparameters, wrappers, and finding the state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import paged_optax
from helpers import (
    assert_found_and_freed,
    assert_trees_close,
    assert_trees_equal,
    make_tree,
    to_jax,
)
from paged_optax import (
    memory_report,
    moments,
    paged_adam8bit,
    paged_adamw8bit,
    release,
    scale_by_paged_adam8bit,
)

pytestmark = pytest.mark.usefixtures("device", "standard_promotion")

NUM_STEPS = 6


def make_params(step=0):
    return to_jax(make_tree(step, {"bias": (80,), "kernel": (64, 80)}))


def make_grads(step):
    return make_params(1000 + step)


def train(tx, num_steps=NUM_STEPS, update=None, params=None):
    """Parameters and state after steps in the same gradients."""
    update = jax.jit(tx.update) if update is None else update
    params = make_params() if params is None else params
    state = tx.init(params)
    for i in range(num_steps):
        updates, state = update(make_grads(i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


NUM_BYTES = 64 * 80 // 256 * 520 + 2048  # kernel in 8 bits, bias in float32: one block of 256


# --- The aliases --------------------------------------------------------------------------------

DECAY_KERNELS = {"bias": False, "kernel": True}

ALIASES = {
    "adam": (
        lambda: paged_adam8bit(1e-2, 0.8, 0.99, 1e-6, 1e-9),
        lambda: optax.chain(
            scale_by_paged_adam8bit(0.8, 0.99, 1e-6, 1e-9), optax.scale_by_learning_rate(1e-2)
        ),
    ),
    "adam, nesterov": (
        lambda: paged_adam8bit(1e-2, nesterov=True),
        lambda: optax.chain(scale_by_paged_adam8bit(nesterov=True), optax.scale(-1e-2)),
    ),
    "adamw": (
        lambda: paged_adamw8bit(1e-2, 0.8, 0.99, 1e-6, 1e-9, 0.1),
        lambda: optax.chain(
            scale_by_paged_adam8bit(0.8, 0.99, 1e-6, 1e-9),
            optax.add_decayed_weights(0.1),
            optax.scale(-1e-2),
        ),
    ),
    "adamw, masked decay": (
        lambda: paged_adamw8bit(1e-2, weight_decay=0.1, mask=DECAY_KERNELS),
        lambda: optax.chain(
            scale_by_paged_adam8bit(),
            optax.masked(optax.add_decayed_weights(0.1), DECAY_KERNELS),
            optax.scale(-1e-2),
        ),
    ),
    "adamw, decay masked by a function": (
        lambda: paged_adamw8bit(1e-2, weight_decay=0.1, mask=lambda params: DECAY_KERNELS),
        lambda: paged_adamw8bit(1e-2, weight_decay=0.1, mask=DECAY_KERNELS),
    ),
    "adamw, scheduled decay": (
        lambda: paged_adamw8bit(1e-2, weight_decay=lambda count: 0.1 * (count >= 0)),
        lambda: paged_adamw8bit(1e-2, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("alias, chain", ALIASES.values(), ids=ALIASES)
def test_alias_is_a_chain(alias, chain):
    params, state = train(alias())
    expected_params, expected_state = train(chain())
    assert_trees_equal(params, expected_params)
    assert_trees_equal(moments(state), moments(expected_state))


def test_defaults_are_those_of_optax():
    """Leaves that keep float32 moments follow optax.adamw to float32 accuracy."""
    float32 = paged_optax.Quantization(min_size=1 << 20)
    for ours, theirs in (
        (paged_adamw8bit(1e-2, quantization=float32), optax.adamw(1e-2)),
        (paged_adam8bit(1e-2, quantization=float32), optax.adam(1e-2)),
        (
            paged_adamw8bit(1e-2, weight_decay=0.1, nesterov=True, quantization=float32),
            optax.adamw(1e-2, weight_decay=0.1, nesterov=True),
        ),
    ):
        assert_trees_close(train(ours)[0], train(theirs)[0])


def test_training_follows_optax_adamw():
    """A network of two layers learns a fixed random one; 8-bit moments cost it little."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (256, 64))
    y = jnp.tanh(x @ jax.random.normal(keys[1], (64, 64)) / 8)
    init = {
        "w1": jax.random.normal(keys[2], (64, 128)) / 8,
        "b1": jnp.zeros(128),
        "w2": jax.random.normal(keys[3], (128, 64)) / 16,
    }

    def loss(params):
        hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
        return jnp.mean((hidden @ params["w2"] - y) ** 2)

    @functools.partial(jax.jit, static_argnums=0)
    def run(optimizer):
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 150)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer(schedule, weight_decay=1e-3))

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (init, tx.init(init)), length=150)[1]

    theirs, ours = run(optax.adamw), run(paged_adamw8bit)
    assert theirs[-1] < theirs[0] / 20
    np.testing.assert_allclose(ours[-1], theirs[-1], rtol=0.05)


# --- Learning rates and other numbers -----------------------------------------------------------


def first_update(factory, rate, params):
    tx = factory(rate)
    return tx.update(make_grads(0), tx.init(params), params)[0]


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["static", "traced"])
@pytest.mark.parametrize("factory", [paged_adam8bit, paged_adamw8bit], ids=["adam", "adamw"])
def test_learning_rate_of_any_kind(factory, transform):
    params = make_params()
    tx = scale_by_paged_adam8bit()
    direction, _ = tx.update(make_grads(0), tx.init(params))
    decay = 1e-4 if factory is paged_adamw8bit else 0.0
    expected = jax.tree.map(lambda u, p: -0.1 * (u + decay * p), direction, params)
    rates = [0.1, np.float32(0.1), jnp.float32(0.1)]
    if transform is not jax.jit:
        rates += [lambda count: 0.1 / (count + 1), optax.constant_schedule(0.1)]
    for rate in rates:
        updates = transform(lambda rate: first_update(factory, rate, params))(rate)
        assert_trees_close(updates, expected)


@pytest.mark.fast
def test_schedule_counts_steps():
    rates = [0.3, 0.2, 0.1]
    tx = paged_adam8bit(lambda count: jnp.array(rates)[count])
    plain = scale_by_paged_adam8bit()
    params = make_params()
    state, plain_state = tx.init(params), plain.init(params)
    for i, rate in enumerate(rates):
        updates, state = tx.update(make_grads(i), state)
        direction, plain_state = plain.update(make_grads(i), plain_state)
        assert_trees_close(updates, jax.tree.map(lambda u, rate=rate: -rate * u, direction))


INJECTED = {
    "number": {"learning_rate": 1e-2},
    "schedule": {"learning_rate": optax.linear_schedule(1e-2, 1e-3, 4), "b1": 0.8},
    "scheduled b1": {"learning_rate": 1e-2, "b1": optax.linear_schedule(0.8, 0.9, 4)},
    "static options": {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "mask": DECAY_KERNELS,
        "nesterov": True,
        "quantization": paged_optax.Quantization(min_size=1 << 20),
        "paging": paged_optax.Paging(),
    },
}


@pytest.mark.parametrize("hyperparams", INJECTED.values(), ids=INJECTED)
def test_inject_hyperparams(hyperparams):
    tx = optax.inject_hyperparams(paged_adamw8bit)(**hyperparams)
    params, state = train(tx)
    # The same, built anew for each step from numbers.
    expected_params = make_params()
    expected_state = None
    for i in range(NUM_STEPS):
        now = {k: v(i) if callable(v) else v for k, v in hyperparams.items()}
        if expected_state is None:
            expected_state = paged_adamw8bit(**now).init(expected_params)
        updates, expected_state = paged_adamw8bit(**now).update(
            make_grads(i), expected_state, expected_params
        )
        expected_params = optax.apply_updates(expected_params, updates)
    assert_trees_close(params, expected_params)
    assert_trees_close(moments(state), moments(expected_state))
    assert_found_and_freed(state, NUM_BYTES)


def test_injected_learning_rate_changes_without_compiling():
    tx = optax.inject_hyperparams(paged_adamw8bit)(learning_rate=0.1, weight_decay=0.0)
    update = jax.jit(tx.update)
    params = make_params()
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)  # so that every direction is 1
    for rate in (0.1, 0.2, 0.3):
        state.hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
        updates, state = update(grads, state, params)
        np.testing.assert_allclose(updates["bias"], -rate, rtol=1e-5)
    assert update._cache_size() == 1
    assert optax.tree.get(state, "learning_rate") == np.float32(0.3)


# --- Optax's wrappers: the numbers of the bare optimizer, and a state that is found -------------


def both_labels(tx):
    return optax.partition({"a": tx, "b": tx}, {"bias": "a", "kernel": "b"})


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx, optax.scale(1.0)),
    "nested chain": lambda tx: optax.chain(optax.chain(optax.chain(tx))),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1e9)), ("adam", tx)),
    "masked": lambda tx: optax.masked(tx, True),
    "masked by a tree": lambda tx: optax.masked(tx, {"bias": True, "kernel": True}),
    "partition, one tx under two labels": both_labels,
    "partition, one label": lambda tx: optax.partition({"a": tx}, "a"),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda count: True),
    "with_extra_args_support": optax.with_extra_args_support,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda scale: tx)(scale=1.0),
}


@pytest.mark.parametrize("replay", [False, True], ids=["", "replay"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapper(wrap, replay):
    make = functools.partial(paged_adamw8bit, 1e-2, weight_decay=0.1)
    params, state = train(wrap(make(replay=replay)))
    expected_params, expected_state = train(make())
    assert_trees_close(params, expected_params)
    assert_trees_equal(moments(state), moments(expected_state))
    assert_found_and_freed(state, NUM_BYTES)


def test_flatten():
    """One vector of all leaves: the bias is in 8 bits too."""
    params, state = train(optax.flatten(paged_adamw8bit(1e-2)))
    tx = paged_adamw8bit(1e-2)

    def vector(tree):
        return jnp.concatenate([leaf.ravel() for leaf in tree.values()])

    expected = vector(make_params())
    expected_state = tx.init(expected)
    for i in range(NUM_STEPS):
        updates, expected_state = tx.update(vector(make_grads(i)), expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_trees_close(vector(params), expected)
    assert_trees_equal(moments(state), moments(expected_state))
    assert memory_report(state).total >= 21 * 520  # blocks of 256


def test_masked_leaves_have_no_moments():
    tx = optax.masked(scale_by_paged_adam8bit(), {"bias": False, "kernel": True})
    _, state = train(tx)
    assert moments(state).mu["bias"] == optax.MaskedNode()
    assert moments(state).mu["kernel"].shape == (64, 80)
    (device,) = memory_report(state).devices
    if device.device.startswith("cpu"):  # a GPU gives memory in units of 2 MiB
        assert device.total < NUM_BYTES


@pytest.mark.fast
def test_partition_with_another_optimizer():
    tx = optax.partition(
        {"paged": paged_adamw8bit(1e-2), "plain": optax.sgd(1e-2)},
        {"bias": "plain", "kernel": "paged"},
    )
    params, state = train(tx)
    assert_trees_close(params["bias"], train(optax.sgd(1e-2))[0]["bias"])
    assert_trees_close(params["kernel"], train(paged_adamw8bit(1e-2))[0]["kernel"])
    assert moments(state).mu["kernel"].shape == (64, 80)


def test_moments_keep_the_tree_they_were_made_for():
    """Another tree with the same paths must not take its place."""
    w, b = make_params()["kernel"], make_params()["bias"]
    tx = scale_by_paged_adam8bit()
    trees = [[w, b], (w, b), {"w": w, "b": None}, {"w": w, "b": optax.MaskedNode()}, {"w": w}]
    states = [tx.update(tree, tx.init(tree))[1] for tree in trees]
    for tree, state in zip(trees, states, strict=True):
        assert jax.tree.structure(moments(state).mu) == jax.tree.structure(tree)
        assert jax.tree.structure(moments(state).nu) == jax.tree.structure(tree)


def test_apply_if_finite_skips_a_step():
    tx = optax.apply_if_finite(paged_adamw8bit(1e-2), 5)
    update = jax.jit(tx.update)
    params, state = train(tx, update=update)
    before = moments(state)
    bad = {**make_grads(0), "bias": jnp.full(80, jnp.nan)}
    updates, state = update(bad, state, params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert_trees_equal(moments(state), before)
    _, state = update(make_grads(0), state, params)
    assert optax.tree.get(state, "notfinite_count") == 0
    assert state.inner_state[0].count == NUM_STEPS + 1


def test_extra_arguments_are_accepted():
    tx = optax.with_extra_args_support(paged_adamw8bit(1e-2))
    params = make_params()
    tx.update(make_grads(0), tx.init(params), params, value=1.0, unknown="argument")


# --- Optax's wrappers that change numbers: parameters, moments and their own state as with optax -


def normalized_ascent():
    return optax.chain(contrib.normalize(), optax.sgd(0.1))


def in_lookahead(reset_state=False):
    return lambda tx: optax.lookahead(tx, 3, 0.5, reset_state)


def on_plateau(tx):
    return optax.chain(tx, contrib.reduce_on_plateau(0.5, patience=2))


def then(transformation):
    return lambda tx: optax.chain(tx, transformation)


def in_multi_steps(tx):
    """Cycles of two micro-steps; those that are not finite do not count."""
    return optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite)


FREEZE_BIAS = {"bias": True, "kernel": False}


class Around(NamedTuple):
    """How `wrap` is run.

    Attributes:
      wrap: from an optimizer to a transformation.
      discards: whether it throws results of updates away, for which ``replay=True`` is made.
      options: keyword arguments of the optimizer.
      params: from parameters to those that `wrap` wants.
      extra: keyword arguments of the update.
      bad_steps: those whose gradients are NaN.
    """

    wrap: Callable[[optax.GradientTransformation], Any]
    discards: bool = False
    options: dict[str, Any] = {}
    params: Callable[[Any], Any] = lambda params: params
    extra: dict[str, Any] = {}
    bad_steps: tuple[int, ...] = ()


AROUND = {
    "lookahead": Around(in_lookahead(), params=optax.LookaheadParams.init_synced),
    "lookahead with reset_state": Around(
        in_lookahead(reset_state=True), params=optax.LookaheadParams.init_synced
    ),
    "schedule_free": Around(lambda tx: contrib.schedule_free(tx, 1e-2), options={"b1": 0.0}),
    "mechanize": Around(contrib.mechanize),
    "reduce_on_plateau": Around(on_plateau, extra={"value": 1.0}),
    "sam": Around(lambda tx: contrib.sam(tx, normalized_ascent(), sync_period=3), discards=True),
    "sam in opaque mode": Around(
        lambda tx: contrib.sam(tx, normalized_ascent(), sync_period=3, opaque_mode=True),
        extra={"grad_fn": lambda params, step: jax.tree.map(lambda p: jnp.sin(3 * p), params)},
    ),
    "ema": Around(then(optax.ema(0.9))),
    "apply_every": Around(then(optax.apply_every(3))),
    "keep_params_nonnegative": Around(
        then(optax.keep_params_nonnegative()), params=lambda params: jax.tree.map(jnp.abs, params)
    ),
    "conditionally_mask": Around(lambda tx: optax.conditionally_mask(tx, lambda i: i % 2 == 0)),
    "conditionally_transform": Around(
        lambda tx: optax.conditionally_transform(tx, lambda i: i % 2 == 0)
    ),
    "selective_transform": Around(
        lambda tx: optax.selective_transform(tx, freeze_mask=FREEZE_BIAS)
    ),
    "apply_if_finite": Around(lambda tx: optax.apply_if_finite(tx, 5), bad_steps=(0, 2, 5)),
    "optax.MultiSteps": Around(in_multi_steps, discards=True, bad_steps=(2, 5)),
    "scale_by_galore": Around(lambda tx: contrib.scale_by_galore(64, base_optimizer=tx)),
    "split_real_and_imaginary": Around(
        contrib.split_real_and_imaginary, params=lambda params: jax.tree.map(make_complex, params)
    ),
}


def make_complex(leaf):
    return leaf + 1j * leaf[::-1]


def train_around(around, tx):
    """As `train`, with gradients for the parameters that the wrapper wants."""
    tx = around.wrap(tx)
    params = around.params(make_params())
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **around.extra))
    state = tx.init(params)
    for i in range(10):
        grads = make_grads(i)
        if jax.tree.leaves(params)[0].dtype == jnp.complex64:
            grads = jax.tree.map(make_complex, grads)
        if i in around.bad_steps:
            grads = jax.tree.map(lambda g: g * jnp.nan, grads)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


FLOAT32 = paged_optax.Quantization(min_size=1 << 20)


def split_off_adam(state):
    """The state with a count in the place of Adam's, and the moments, where they are optax's."""

    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState | paged_optax.ScaleByPagedAdam8bitState)

    nodes, treedef = jax.tree.flatten(state, is_leaf=is_adam)
    ((mu, nu),) = [
        (node.mu, node.nu) if isinstance(node, optax.ScaleByAdamState) else (None, None)
        for node in nodes
        if is_adam(node)
    ]
    return jax.tree.unflatten(treedef, [n.count if is_adam(n) else n for n in nodes]), (mu, nu)


@functools.cache
def adam_around(name, device):
    del device  # for the cache
    return train_around(AROUND[name], optax.adam(1e-2, **AROUND[name].options))


REPLAYS = [
    (name, replay) for name, around in AROUND.items() for replay in sorted({around.discards, True})
]


@pytest.mark.parametrize("name, replay", REPLAYS)
@jax.default_matmul_precision("highest")
def test_wrapper_as_around_adam(name, replay, device):
    """Float32 moments, so that all numbers follow optax.adam's."""
    around = AROUND[name]
    tx = paged_adam8bit(1e-2, quantization=FLOAT32, replay=replay, **around.options)
    params, state = train_around(around, tx)
    expected_params, expected_state = adam_around(name, device)
    assert_trees_close(params, expected_params, rtol=2e-5)
    state_of_wrapper, _ = split_off_adam(state)
    expected_state_of_wrapper, expected_moments = split_off_adam(expected_state)
    assert_trees_close(state_of_wrapper, expected_state_of_wrapper, rtol=2e-5)
    assert_trees_close(tuple(moments(state)[:2]), expected_moments)
    assert_found_and_freed(state, 8 * 64 * 64)


def test_lookahead_that_resets_leaves_moments_behind():
    """A reset begins a new state, and the old one keeps its memory until it is released."""
    tx = optax.lookahead(paged_adam8bit(1e-2), 2, 0.5, reset_state=True)
    params = optax.LookaheadParams.init_synced(make_params())
    state = tx.init(params)
    for i in range(6):
        before = state
        updates, state = tx.update(make_grads(i), state, params)
        params = optax.apply_updates(params, updates)
        if i % 2:  # reset
            assert (
                optax.tree.get(state, "token").value[0] != optax.tree.get(before, "token").value[0]
            )
            assert release(before) >= NUM_BYTES
            with pytest.raises(RuntimeError, match="never updated"):
                moments(state)


INJECTED_AS_OPTAX = {
    "numbers": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "schedules": {
        "learning_rate": optax.linear_schedule(1e-2, 1e-3, 4),
        "b1": optax.linear_schedule(0.8, 0.9, 4),
        "eps": 1e-6,
    },
    "static options": {"learning_rate": 1e-2, "nesterov": True, "mask": DECAY_KERNELS},
}


@pytest.mark.parametrize("hyperparams", INJECTED_AS_OPTAX.values(), ids=INJECTED_AS_OPTAX)
def test_inject_hyperparams_as_with_optax(hyperparams):
    """Parameters, moments, and names, dtypes and values of the hyperparameters in the state."""
    paged = functools.partial(paged_adamw8bit, quantization=FLOAT32)
    params, state = train(optax.inject_hyperparams(paged)(**hyperparams))
    expected_params, expected_state = train(optax.inject_hyperparams(optax.adamw)(**hyperparams))
    assert_trees_close(params, expected_params)
    state_of_wrapper, _ = split_off_adam(state)
    expected_state_of_wrapper, expected_moments = split_off_adam(expected_state)
    assert_trees_close(state_of_wrapper, expected_state_of_wrapper)
    assert jax.tree.map(jnp.result_type, state.hyperparams) == jax.tree.map(
        jnp.result_type, expected_state.hyperparams
    )
    assert_trees_close(tuple(moments(state)[:2]), expected_moments)


# --- optax.tree ---------------------------------------------------------------------------------

TREES = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"bias": True, "kernel": False}),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda scale: tx)(scale=1.0),
}


@pytest.mark.parametrize("wrap", TREES.values(), ids=TREES)
def test_map_params_touches_no_paged_state(wrap):
    """None of its leaves is for a parameter; so are all sharding rules of users: replicate it."""
    tx = wrap(optax.chain(paged_adamw8bit(1e-2), optax.trace(0.9)))
    params = make_params()
    state = tx.init(params)
    specs = jax.tree.map(lambda leaf: f"like {leaf.shape}", params)
    rules = optax.tree.map_params(
        tx,
        lambda leaf, spec: leaf if isinstance(leaf, optax.MaskedNode) else spec,
        state,
        specs,
        transform_non_params=lambda leaf: "replicated",
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert jax.tree.structure(rules) == jax.tree.structure(state)
    (paged,) = optax.tree.get_all_with_path(rules, "ScaleByPagedAdam8bitState")
    assert paged[1].count == paged[1].token.value == "replicated"
    assert "like (80,)" in jax.tree.leaves(rules)

    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
    updates, _ = tx.update(make_grads(0), doubled, params)
    assert_trees_equal(updates, tx.update(make_grads(0), tx.init(params), params)[0])


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_get_and_set(wrap):
    """By name, in whatever the optimizer is wrapped."""
    tx = wrap(scale_by_paged_adam8bit())
    params, state = train(tx, num_steps=2)

    def is_ours(path, value):
        del value
        return getattr(path[-1], "tuple_name", "") == "ScaleByPagedAdam8bitState"

    counts = optax.tree.get_all_with_path(state, "count", is_ours)
    assert counts and all(count == 2 for _, count in counts)
    state = optax.tree.set(state, is_ours, count=jnp.int32(5))
    _, state = tx.update(make_grads(2), state, params)
    counts = optax.tree.get_all_with_path(state, "count", is_ours)
    assert counts and all(count == 6 for _, count in counts)


def test_optax_tree_set_puts_a_whole_state_in_place():
    """The state of one optimizer goes on in another that wraps it otherwise."""
    tx, wrapped = paged_adamw8bit(1e-2), optax.chain(optax.identity(), paged_adamw8bit(1e-2))
    params, state = train(tx)
    inner = optax.tree.get(state, "ScaleByPagedAdam8bitState")
    moved = optax.tree.set(wrapped.init(params), ScaleByPagedAdam8bitState=inner)
    updates, moved = wrapped.update(make_grads(9), moved, params)
    expected_params, expected_state = train(tx)
    expected, expected_state = tx.update(make_grads(9), expected_state, expected_params)
    assert_trees_equal(updates, expected)
    assert_trees_equal(moments(moved), moments(expected_state))


# --- moments() puts disjoint states together ----------------------------------------------------

NESTED = {"a": {"x": (64, 64), "y": (3,)}, "b": {"z": (70, 70)}}


@pytest.mark.parametrize("how", ["partition", "masked"])
def test_moments_of_states_for_whole_subtrees(how):
    grads = jax.tree.map(jnp.ones, NESTED, is_leaf=lambda x: isinstance(x, tuple))
    inner = scale_by_paged_adam8bit()
    if how == "partition":
        tx = optax.partition({"u": inner, "v": inner}, {"a": "u", "b": "v"})
    else:
        first, second = {"a": True, "b": False}, {"a": False, "b": True}
        tx = optax.chain(optax.masked(inner, first), optax.masked(inner, second))
    _, state = tx.update(grads, tx.init(grads))
    mu = moments(state).mu
    assert jax.tree.map(np.shape, mu) == NESTED
    for leaf in jax.tree.leaves(mu):
        np.testing.assert_allclose(leaf, 0.1, rtol=0.02)  # 8 bits
