"""The state is a value: what it holds, when memory is made for it, every way to run an update."""

import functools
import pickle
import threading
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paged_optax
from helpers import ALL_QUANTIZED, assert_trees_equal, num_arenas, share_base_of, stack
from optimizers import BY_NAME, Specification
from paged_optax import moments, release, scale_by_paged_adam8bit

pytestmark = pytest.mark.usefixtures("device")

# Small enough for float32 moments; a partial last block; blocks for several threads.
LEAVES = {
    "b": ((7,), jnp.float32),
    "h": ((5000,), jnp.bfloat16),
    "w": ((256, 160), jnp.float32),
}
NUM_STEPS = 5


def make_grads(step):
    rng = np.random.default_rng(step)
    return {
        name: jnp.asarray(rng.standard_normal(shape), dtype)
        for name, (shape, dtype) in LEAVES.items()
    }


class Result(NamedTuple):
    updates: dict
    mu: dict
    nu: dict


@pytest.fixture(scope="module")
def expected():
    """The last updates and the moments after `NUM_STEPS`, from the NumPy specification."""
    grads = [jax.device_get(make_grads(i)) for i in range(NUM_STEPS)]
    specification = Specification.fresh(BY_NAME["adam"], grads[0])
    for grad in grads:
        updates, specification = specification.update(grad)
    return Result(updates, **specification.moments({k: g.shape for k, g in grads[0].items()}))


def assert_as_expected(updates, state, expected):
    assert_trees_equal(jax.tree.map(np.asarray, updates), expected.updates)
    stored = moments(state)
    assert_trees_equal(stored.mu, expected.mu)
    assert_trees_equal(stored.nu, expected.nu)
    assert int(state.count) == NUM_STEPS


@pytest.fixture
def tx():
    return scale_by_paged_adam8bit()


# --- What the state is --------------------------------------------------------------------------


def test_state_is_a_named_tuple_of_int32(tx):
    state = tx.init(make_grads(0))
    assert isinstance(state, tuple) and state._fields == ("count", "token")
    for _ in range(2):
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)] == [
            ((), jnp.int32),
            ((2,), jnp.int32),
        ]
        _, state = tx.update(make_grads(0), state)


@pytest.mark.parametrize("wrap", [lambda tx: tx, optax.chain], ids=["bare", "chain"])
def test_count_is_found_by_optax(tx, wrap):
    tx = wrap(tx)
    state = tx.init(make_grads(0))
    for i in range(3):
        assert optax.tree.get(state, "count") == i
        _, state = tx.update(make_grads(i), state)


def test_count_stops_at_its_largest_value(tx):
    _, state = tx.update(make_grads(0), tx.init(make_grads(0)))
    largest = jnp.iinfo(jnp.int32).max
    updates, state = tx.update(make_grads(1), optax.tree.set(state, count=jnp.int32(largest)))
    assert state.count == largest
    assert all(np.isfinite(u.astype(np.float32)).all() for u in jax.tree.leaves(updates))


def test_state_has_the_same_types_before_and_after_an_update(tx):
    state = tx.init(make_grads(0))
    _, new_state = jax.jit(tx.update)(make_grads(0), state)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)
    assert jax.eval_shape(tx.init, make_grads(0)) == jax.eval_shape(lambda: new_state)


# --- When memory is made ------------------------------------------------------------------------

SHAPES = jax.eval_shape(lambda: make_grads(0))

INITS = {
    "eager": lambda tx: tx.init(make_grads(0)),
    "jit": lambda tx: jax.jit(tx.init)(make_grads(0)),
    "eval_shape": lambda tx: jax.eval_shape(tx.init, make_grads(0)),
    "ShapeDtypeStruct": lambda tx: tx.init(SHAPES),
    "no leaves": lambda tx: tx.init({"a": None, "b": ()}),
    "map_params": lambda tx: optax.tree.map_params(tx, jnp.zeros_like, tx.init(make_grads(0))),
    "masked": lambda tx: optax.masked(tx, False).init(make_grads(0)),
    "lowered update": lambda tx: (
        jax.jit(tx.update).lower(make_grads(0), tx.init(make_grads(0))).compile()
    ),
    "eval_shape of update": lambda tx: jax.eval_shape(
        tx.update, make_grads(0), tx.init(make_grads(0))
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
def test_init_allocates_nothing(tx, init):
    before = num_arenas()
    jax.block_until_ready(init(tx))
    assert num_arenas() == before


def test_first_update_allocates_once(tx):
    before = num_arenas()
    state = tx.init(make_grads(0))
    for i in range(3):
        _, state = tx.update(make_grads(i), state)
        jax.block_until_ready(state)
        assert num_arenas() == before + 1
    release(state)
    assert num_arenas() == before


@pytest.mark.parametrize(
    "tree", [{}, {"a": None, "b": [()]}, optax.MaskedNode()], ids=["dict", "None", "MaskedNode"]
)
def test_update_without_leaves(tx, tree):
    before = num_arenas()
    updates, state = jax.jit(tx.update)(tree, tx.init(tree))
    assert updates == tree
    assert state.count == 1
    assert num_arenas() == before


def test_state_of_shapes_can_be_updated(tx, expected):
    state = tx.init(SHAPES)
    for i in range(NUM_STEPS):
        updates, state = tx.update(make_grads(i), state)
    assert_as_expected(updates, state, expected)


def eager_inits(init):
    return [init(make_grads(0)) for _ in range(3)]


def jitted_inits(init):
    return eager_inits(jax.jit(init))


def inits_in_one_program(init):
    return jax.jit(eager_inits, static_argnums=0)(init)


def calls_of_one_jitted_init_in_one_program(init):
    init = jax.jit(init)
    return jax.jit(lambda: eager_inits(init))()


def inits_in_a_scan(init):
    states = jax.jit(lambda: jax.lax.scan(lambda _, x: ((), init(make_grads(0))), (), None, 3)[1])()
    return [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(3)]


@pytest.mark.fast
@pytest.mark.parametrize(
    "inits",
    [
        eager_inits,
        jitted_inits,
        inits_in_one_program,
        calls_of_one_jitted_init_in_one_program,
        inits_in_a_scan,
    ],
    ids=lambda inits: inits.__name__,
)
def test_every_init_makes_a_state_of_its_own(tx, inits):
    states = inits(tx.init)
    assert len({int(state.token.value[0]) for state in states}) == 3
    for i, state in enumerate(states):  # and so does its first update
        updates, states[i] = tx.update(make_grads(i), state)
        assert_trees_equal(updates, tx.update(make_grads(i), tx.init(make_grads(i)))[0])
    tx.update(make_grads(3), states[0])


# --- Ways to run it: each must give the bits of the specification -------------------------------


def eager(tx, grads):
    state = tx.init(grads[0])
    for g in grads:
        updates, state = tx.update(g, state)
    return updates, state


def with_numpy_gradients(tx, grads):
    return eager(tx, jax.tree.map(np.asarray, grads))


def jit(tx, grads):
    return eager(tx._replace(update=jax.jit(tx.update)), grads)


def jit_and_donate(tx, grads):
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    return eager(tx._replace(update=update), jax.tree.map(jnp.copy, grads))


def jit_init(tx, grads):
    return jit(tx._replace(init=jax.jit(tx.init)), grads)


def one_program(tx, grads):
    return jax.jit(functools.partial(eager, tx))(grads)


def nested_jit(tx, grads):
    return jax.jit(functools.partial(jit, tx))(grads)


def disable_jit(tx, grads):
    with jax.disable_jit():
        return jit(tx, grads)


def compiled_ahead(tx, grads):
    update = jax.jit(tx.update).lower(grads[0], tx.init(grads[0])).compile()
    return eager(tx._replace(update=update), grads)


def exported(tx, grads):
    """JAX has to be told which custom calls may be exported."""
    check = jax.export.DisabledSafetyCheck.custom_call("paged_optax_update")
    update = jax.export.export(jax.jit(tx.update), disabled_checks=[check])
    return eager(tx._replace(update=update(grads[0], tx.init(grads[0])).call), grads)


def scan(tx, grads, state):
    def body(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    state, updates = jax.lax.scan(body, state, stack(grads))
    return jax.tree.map(lambda u: u[-1], updates), state


def scan_with_init_outside(tx, grads):
    return jax.jit(functools.partial(scan, tx))(grads, tx.init(grads[0]))


def scan_with_init_inside(tx, grads):
    return jax.jit(lambda grads: scan(tx, grads, tx.init(grads[0])))(grads)


def unrolled_scan(tx, grads):
    with jax.disable_jit():
        return scan(tx, grads, tx.init(grads[0]))


def fori_loop(tx, grads):
    stacked = stack(grads)

    def body(i, carry):
        return tx.update(jax.tree.map(lambda g: g[i], stacked), carry[1])

    return jax.lax.fori_loop(0, len(grads), body, (grads[0], tx.init(grads[0])))


def while_loop(tx, grads):
    stacked = stack(grads)

    def body(carry):
        _, state = carry
        return tx.update(jax.tree.map(lambda g: g[state.count], stacked), state)

    carry = grads[0], tx.init(grads[0])
    return jax.lax.while_loop(lambda carry: carry[1].count < len(grads), body, carry)


def either_branch_of_cond(tx, grads):
    @jax.jit
    def update(even, g, state):
        return jax.lax.cond(even, tx.update, lambda *args: tx.update(*args), g, state)

    state = tx.init(grads[0])
    for i, g in enumerate(grads):
        updates, state = update(i % 2 == 0, g, state)
    return updates, state


def skipped_by_cond(tx, grads):
    @jax.jit
    def update(wanted, g, state):
        return jax.lax.cond(wanted, tx.update, lambda g, state: (g, state), g, state)

    state = tx.init(grads[0])
    for g in grads:
        _, state = update(False, make_grads(99), state)
        updates, state = update(True, g, state)
    return updates, state


def switch(tx, grads):
    @jax.jit
    def update(i, g, state):
        return jax.lax.switch(i, [tx.update, lambda g, s: (g, s), tx.update], g, state)

    state = tx.init(grads[0])
    for i in range(NUM_STEPS):
        _, state = update(1, grads[i], state)
        updates, state = update(i % 2 * 2, grads[i], state)
    return updates, state


def checkpoint(tx, grads):
    return eager(tx._replace(update=jax.jit(jax.checkpoint(tx.update))), grads)


def custom_vjp(tx, grads):
    """A step whose derivative is given beside it."""
    update = jax.custom_vjp(lambda g, state: tx.update(g, state))
    update.defvjp(lambda g, state: (tx.update(g, state), None), lambda _, cotangents: cotangents)
    eager(tx._replace(update=update), grads)
    return eager(tx._replace(update=jax.jit(update)), grads)


def differentiated_custom_vjp(tx, grads):
    """Straight through: the updates' cotangents are passed on as the gradients'."""

    def backward(state, cotangents):
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), state)
        return cotangents[0], zeros

    update = jax.custom_vjp(lambda g, state: tx.update(g, state))
    update.defvjp(lambda g, state: (tx.update(g, state), state), backward)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def differentiate(grads, state):
        updates, state = update(grads, state)
        return sum(jnp.sum(u.astype(jnp.float32)) for u in updates.values()), (updates, state)

    state = tx.init(grads[0])
    for g in grads:
        derivatives, (updates, state) = differentiate(g, state)
        assert all(np.all(d == 1) for d in jax.tree.leaves(derivatives))
    return updates, state


def clear_caches(tx, grads):
    update = jax.jit(tx.update)

    def update_and_clear(g, state):
        jax.clear_caches()
        return update(g, state)

    return eager(tx._replace(update=update_and_clear), grads)


def init_again(tx, grads):
    eager(tx, grads[::-1])
    return eager(tx, grads)


def same_fresh_state_again(tx, grads):
    state = tx.init(grads[0])
    fresh = tx._replace(init=lambda params: state)
    eager(fresh, grads[::-1])
    return eager(fresh, grads)


def another_factory_per_step(tx, grads):
    """As `optax.inject_hyperparams` does."""
    _, state = tx.update(grads[0], tx.init(grads[0]))
    replay = paged_optax.memory_report(state).replay > 0

    def update(g, state):
        return scale_by_paged_adam8bit(replay=replay).update(g, state)

    return eager(tx._replace(update=update), grads)


def state_through(convert, tx, grads):
    def update(g, state):
        updates, state = tx.update(g, state)
        return updates, convert(state)

    return eager(tx._replace(update=update), grads)


WAYS = [
    eager,
    with_numpy_gradients,
    jit,
    jit_and_donate,
    jit_init,
    one_program,
    nested_jit,
    disable_jit,
    compiled_ahead,
    exported,
    scan_with_init_outside,
    scan_with_init_inside,
    unrolled_scan,
    fori_loop,
    while_loop,
    either_branch_of_cond,
    skipped_by_cond,
    switch,
    checkpoint,
    custom_vjp,
    differentiated_custom_vjp,
    clear_caches,
    init_again,
    same_fresh_state_again,
    another_factory_per_step,
]
CONVERSIONS = {
    "numpy": lambda state: jax.tree.map(np.asarray, state),
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "flatten": lambda state: jax.tree.unflatten(*jax.tree.flatten(state)[::-1]),
    "device_put": jax.device_put,
}


@pytest.mark.parametrize("replay", [False, True], ids=["", "replay"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_way_to_run(way, replay, expected):
    tx = scale_by_paged_adam8bit(replay=replay)
    grads = [make_grads(i) for i in range(NUM_STEPS)]
    updates, state = way(tx, grads)
    assert_as_expected(updates, state, expected)
    if way is not jit_and_donate:  # the update takes over no buffer that it was not given
        assert_trees_equal(grads, [make_grads(i) for i in range(NUM_STEPS)])


@pytest.mark.fast
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_state_survives_conversion(tx, convert, expected):
    updates, state = state_through(convert, tx, [make_grads(i) for i in range(NUM_STEPS)])
    assert_as_expected(updates, state, expected)


def test_loss_under_checkpoint(tx):
    """Rematerialization runs the loss twice, not the update."""

    def loss(params, rematerialize):
        def layer(w):
            return jnp.sum(jnp.sin(w) ** 2)

        return (jax.checkpoint(layer) if rematerialize else layer)(params["w"])

    @functools.partial(jax.jit, static_argnums=2)
    def step(params, state, rematerialize):
        updates, state = tx.update(jax.grad(loss)(params, rematerialize), state)
        return optax.apply_updates(params, updates), state

    results = []
    for rematerialize in (False, True):
        params = {"w": make_grads(0)["w"]}
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state, rematerialize)
        results.append(params["w"])
        assert state.count == 3
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_two_states_take_turns_in_one_jitted_step(tx, expected):
    update = jax.jit(tx.update)
    states = [tx.init(make_grads(0)) for _ in range(2)]
    updates = [None, None]
    for i in range(NUM_STEPS):
        for j in range(2):
            updates[j], states[j] = update(make_grads(i if j else NUM_STEPS - i), states[j])
    assert_as_expected(updates[1], states[1], expected)
    assert not np.array_equal(moments(states[0]).mu["w"], expected.mu["w"])


def test_states_side_by_side_in_one_program(tx, expected):
    """The compiler may run them at the same time."""

    @jax.jit
    def update(grads, states):
        return list(zip(*(tx.update(grads, state) for state in states), strict=True))

    states = [tx.init(make_grads(0)) for _ in range(8)]
    for i in range(NUM_STEPS):
        updates, states = update(make_grads(i), states)
    for u, state in zip(updates, states, strict=True):
        assert_as_expected(u, state, expected)


def test_threads_train_states_of_their_own(tx, expected, device):
    update = jax.jit(tx.update)
    grads = [make_grads(i) for i in range(NUM_STEPS)]
    num_threads = 4
    start = threading.Barrier(num_threads)
    results = []

    def train():
        start.wait()
        with jax.default_device(device):  # holds for one thread
            for _ in range(10):
                results.append(eager(tx._replace(update=update), grads))

    threads = [threading.Thread(target=train) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 10 * num_threads
    for updates, state in results:
        assert_as_expected(updates, state, expected)
        release(state)


# --- What is compiled ---------------------------------------------------------------------------


def make_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.fast
@pytest.mark.parametrize("donate", [(), (0, 1)], ids=["", "donated"])
def test_nothing_is_compiled_after_the_first_step(donate, caplog):
    tx = optax.chain(optax.clip(1.0), paged_optax.paged_adamw8bit(1e-3))
    step = jax.jit(make_step(tx), donate_argnums=donate)
    grads = make_grads(0)
    params = jax.tree.map(jnp.copy, grads)
    step(params, tx.init(params), grads)
    params = jax.tree.map(jnp.copy, grads)
    caplog.clear()
    with jax.log_compiles():
        for _ in range(2):  # the second time with a fresh state
            state = tx.init(params)
            for _ in range(3):
                params, state = step(params, state, grads)
    assert state[1][0].count == 3
    assert not [message for message in caplog.messages if "ompil" in message]
    assert step._cache_size() == 1


def test_hyperparameters_do_not_recompile():
    update = jax.jit(lambda g, s, *hyperparams: scale_by_paged_adam8bit(*hyperparams).update(g, s))
    grads = make_grads(0)
    for hyperparams in ((0.9, 0.999, 1e-8, 0.0), (0.7, 0.9, 1e-3, 1e-4)):
        tx = scale_by_paged_adam8bit(*hyperparams)
        state, traced_state = tx.init(grads), tx.init(grads)
        for i in range(3):
            updates, state = tx.update(make_grads(i), state)
            traced_updates, traced_state = update(make_grads(i), traced_state, *hyperparams)
        assert_trees_equal(traced_updates, updates)
        assert_trees_equal(moments(traced_state), moments(state))
    assert update._cache_size() == 1


def test_update_has_no_jax_effect(tx):
    grads = make_grads(0)
    assert not jax.make_jaxpr(tx.init)(grads).effects
    assert not jax.make_jaxpr(tx.update)(grads, tx.init(grads)).effects


def test_update_is_one_custom_call_in_the_gradients_buffers():
    tx = paged_optax.paged_adamw8bit(1e-3)
    params = {i: make_grads(i) for i in range(5)}
    num_leaves = len(jax.tree.leaves(params))
    lowered = jax.jit(make_step(tx)).lower(params, tx.init(params), params)
    calls = [line for line in lowered.as_text().splitlines() if "custom_call" in line]
    assert len(calls) == 1
    assert "@paged_optax_update" in calls[0]
    assert "has_side_effect = true" in calls[0]
    assert calls[0].count("#stablehlo.output_operand_alias<") == num_leaves
    target = 'custom_call_target="paged_optax_update"'
    calls = [line for line in lowered.compile().as_text().splitlines() if target in line]
    assert len(calls) == 1
    assert "custom_call_has_side_effect=true" in calls[0]
    assert "output_to_operand_aliasing={{1}: (4, {}), {2}: (5, {})" in calls[0]


def test_update_in_a_loop_that_never_runs(tx):
    """XLA must not move an update out of a loop, where it would run although the loop does not."""
    grads = make_grads(0)
    _, state = tx.update(grads, tx.init(grads))

    @jax.jit
    def search(num_trials, grads, state):
        def trial(_, total):
            updates, _ = tx.update(grads, state)
            return total + sum(jnp.sum(u.astype(jnp.float32)) for u in jax.tree.leaves(updates))

        return jax.lax.fori_loop(0, num_trials, trial, jnp.float32(0))

    assert search(0, grads, state) == 0
    jax.block_until_ready(tx.update(grads, state))


def sliced_gradients(tx, stacked, state):
    for i in range(3):
        updates, state = tx.update(jax.tree.map(lambda g, i=i: g[i], stacked), state)
    return updates, state


def scanned_gradients(tx, stacked, state):
    def body(carry, grads):
        updates, state = tx.update(grads, carry[1])
        return (updates, state), None

    return jax.lax.scan(body, (jax.tree.map(lambda g: g[0], stacked), state), stacked)[0]


def scanned_updates(tx, stacked, state):
    def body(state, i):
        updates, state = tx.update(jax.tree.map(lambda g: g[i], stacked), state)
        return state, updates

    state, updates = jax.lax.scan(body, state, jnp.arange(3))
    return jax.tree.map(lambda u: u[-1], updates), state


@pytest.mark.parametrize(
    "way", [sliced_gradients, scanned_gradients, scanned_updates], ids=lambda way: way.__name__
)
def test_slices_around_an_update(tx, way):
    """XLA:GPU fuses slices that are multiples of 128 bytes into calls; each must still run once."""
    stacked = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((3, 64, 64)), jnp.float32)}
    expected, expected_state = eager(tx, [{"w": w} for w in stacked["w"]])
    state = tx.init(jax.tree.map(lambda g: g[0], stacked))
    updates, state = jax.jit(functools.partial(way, tx))(stacked, state)
    assert_trees_equal(updates, expected)
    assert_trees_equal(moments(state), moments(expected_state))
    paged_optax.memory_report(state)  # raises if a step was refused


def test_updates_take_the_place_of_donated_gradients(tx):
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    grads = jax.tree.map(jnp.copy, make_grads(0))
    state = tx.init(grads)
    where = jax.tree.map(lambda g: g.unsafe_buffer_pointer(), grads)
    updates, _ = update(grads, state)
    assert all(g.is_deleted() for g in jax.tree.leaves(grads))
    assert jax.tree.map(lambda u: u.unsafe_buffer_pointer(), updates) == where


def test_update_whose_results_are_not_used_does_not_run(tx):
    """What JAX drops from a program leaves the state as it was."""
    _, state = tx.update(make_grads(0), tx.init(make_grads(0)))

    @jax.jit
    def drop(grads, state):
        tx.update(grads, state)
        return state

    state = drop(make_grads(1), state)
    before = moments(state)
    _, state = tx.update(make_grads(1), state)
    assert state.count == 2
    assert not np.array_equal(moments(state).mu["w"], before.mu["w"])


def test_jobs_that_follow_each_other_agree_anew(monkeypatch):
    """`jax.distributed` may shut down and start again: the processes of a job share its number."""

    class Client:
        def __init__(self):
            self.values = {}

        def key_value_set(self, key, value):
            if key in self.values:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value

        def blocking_key_value_get(self, key, timeout):
            assert timeout > 0
            return self.values[key]

    jobs = [Client(), Client()]
    bases = [share_base_of(monkeypatch, job) for job in jobs]
    assert [len(each) for each in bases] == [1, 1] and bases[0] != bases[1]
    assert share_base_of(monkeypatch, jobs[0]) == bases[0]  # another process of the first job


@functools.total_ordering
class Key:
    """Of a dict. It has no text of its own, only an address."""

    def __init__(self, number):
        self.number = number

    def __hash__(self):
        return hash(self.number)

    def __eq__(self, other):
        return self.number == other.number

    def __lt__(self, other):
        return self.number < other.number


def test_keys_without_a_text_of_their_own():
    """Equal trees have equal names, so each step finds its leaves, with the same random bits."""
    tx = scale_by_paged_adam8bit(quantization=ALL_QUANTIZED)

    def two_steps():
        def grads():
            return {Key(i): {"w": jnp.full((40, 30), 0.1 * i)} for i in (1, 2)}

        state = tx.init(grads())
        for _ in range(2):
            _, state = jax.block_until_ready(tx.update(grads(), state))
        found = jax.tree.leaves(moments(state)), paged_optax.states()[-1].names
        masks = jax.tree.map(lambda _: False, grads())
        masks[Key(2)] = {"w": True}
        reset = paged_optax.reset(state, masks)
        assert [np.any(mu) for mu in jax.tree.leaves(moments(reset).mu)] == [True, False]
        with pytest.raises(ValueError, match=r"where needs a mask for each .* none for"):
            paged_optax.reset(reset, {Key(1): {"w": True}})
        return found

    (once, names), (again, _) = two_steps(), two_steps()
    assert_trees_equal(once, again)
    assert len(set(names)) == 2 and " at 0x" not in "".join(names)
