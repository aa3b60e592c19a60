"""Misuse: a clear error that names the remedy, nothing overwritten, and the newest state goes on.

What a refused step does, on the CPU and on a GPU, is in test_refused.py.
"""

import functools
import itertools
import pickle
import re
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import paged_optax
from helpers import (
    RAISES,
    arrays_on_cpu,
    assert_trees_equal,
    available_host_bytes,
    build_info,
    finish,
    hooks,
    make_tree,
    num_arenas,
    raise_if_refused,
    run_python,
    to_jax,
)
from paged_optax import (
    Paging,
    Quantization,
    StateRefused,
    memory_report,
    moments,
    paged_adam8bit,
    paged_adamw8bit,
    release,
    scale_by_paged_adam8bit,
)

pytestmark = pytest.mark.usefixtures("on_cpu")


def make_grads(step=0):
    return to_jax(make_tree(step, {"b": (7,), "w": (64, 80)}))


@pytest.fixture
def tx():
    return scale_by_paged_adam8bit()


@pytest.fixture
def states(tx):
    """The states of a run of three steps, oldest first."""
    states = [tx.init(make_grads())]
    for i in range(3):
        states.append(tx.update(make_grads(i), states[-1])[1])
    return states


def assert_refused(call, state, match, errors=RAISES):
    """`call` raises and leaves the moments of `state`, the newest, alone. Returns a step on."""
    before = moments(state)
    before_call = num_arenas()
    with pytest.raises(errors, match=match):
        finish(call())
    assert num_arenas() == before_call
    assert_trees_equal(moments(state), before)
    tx = scale_by_paged_adam8bit()
    _, state = tx.update(jax.tree.map(jnp.ones_like, before.mu), state)
    assert not np.array_equal(moments(state).mu["w"], before.mu["w"])
    return state


# --- A state that is not the newest -------------------------------------------------------------

NOT_THE_NEWEST = (
    r"not the newest one: its moments were at version \d+, .* moved them to version \d+."
    r".*replay=True.*paged_optax.MultiSteps.*jax.lax.cond.*init\(params\).*left as they were"
)


@pytest.mark.fast
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("version", [1, 2], ids=["retry of the last step", "rollback by two"])
def test_old_state(tx, states, version, transform):
    update = transform(tx.update)
    for _ in range(3):  # jitted functions raise differently once they are on the fast path
        with pytest.raises(RAISES, match=NOT_THE_NEWEST):
            finish(update(make_grads(), states[version]))
    assert_refused(lambda: update(make_grads(), states[version]), states[-1], NOT_THE_NEWEST)


def test_old_state_after_the_fast_path_was_taken(tx, states):
    update = jax.jit(tx.update)
    newest = states[-1]
    for i in range(4):
        _, newest = update(make_grads(i), newest)
    assert_refused(lambda: update(make_grads(), states[-1]), newest, NOT_THE_NEWEST)


def test_fork(tx, states):
    """Two branches from one state: the one that stepped first is the newest."""
    _, left = tx.update(make_grads(10), states[-1])
    assert_refused(lambda: tx.update(make_grads(11), states[-1]), left, NOT_THE_NEWEST)


def test_fork_in_one_program(tx, states):
    @jax.jit
    def both(grads, others, state):
        return tx.update(grads, state), tx.update(others, state)

    with pytest.raises(RAISES, match=NOT_THE_NEWEST):
        finish(both(make_grads(1), make_grads(2), states[-1]))


def test_fork_of_a_fresh_state(tx):
    """A fresh state may start again, which ends its first life."""
    fresh = tx.init(make_grads())
    _, first = tx.update(make_grads(0), fresh)
    _, second = tx.update(make_grads(1), fresh)
    assert_refused(lambda: tx.update(make_grads(), first), second, NOT_THE_NEWEST)


def test_copy_is_a_fork(tx, states):
    copy = jax.tree.map(jnp.copy, states[-1])
    _, newest = tx.update(make_grads(), copy)
    assert_refused(lambda: tx.update(make_grads(), states[-1]), newest, NOT_THE_NEWEST)


@pytest.mark.parametrize("count", [-1, -7, -(2**31) + 1])
def test_negative_count(tx, states, count):
    """It is refused, and not taken for a step to be skipped."""
    damaged = states[-1]._replace(count=jnp.int32(count))
    match = "count of this optimizer state is negative"
    assert_refused(lambda: tx.update(make_grads(), damaged), states[-1], match)


def test_where_keeps_the_old_state(tx, states):
    """As Flax's examples skip a step that is not finite."""

    @jax.jit
    def update(wanted, grads, state):
        updates, new_state = tx.update(grads, state)
        return updates, jax.tree.map(lambda *s: jnp.where(wanted, *s), new_state, state)

    _, state = update(True, make_grads(), states[-1])
    _, state = update(False, make_grads(), state)
    with pytest.raises(RAISES, match=r"jnp.where.*jax.lax.cond"):
        finish(update(True, make_grads(), state))


def test_multi_steps(tx):
    """`optax.MultiSteps` runs an update at every micro-step and throws most of them away."""
    accumulate = optax.MultiSteps(paged_adamw8bit(1e-2), every_k_schedule=2)
    params = make_grads()
    state = accumulate.init(params)
    match = r"optax.MultiSteps.*replay=True.*to accumulate gradients use paged_optax.MultiSteps"
    with jax.numpy_dtype_promotion("standard"), pytest.raises(RAISES, match=match):
        for i in range(4):  # the first cycle starts twice from a fresh state, which is allowed
            _, state = accumulate.update(make_grads(i), state, params)
            finish(state)


def test_sam():
    """`optax.contrib.sam` selects between an old and a new state by arithmetic."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    params = make_grads()

    def train(**options):
        tx = optax.contrib.sam(paged_adamw8bit(1e-2, **options), ascent, sync_period=2)
        state = tx.init(params)
        for i in range(4):
            _, state = tx.update(make_grads(i), state, params)
            finish(state)
        return state

    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(RAISES, match=NOT_THE_NEWEST):
            train()
        assert train(replay=True).opt_state[0].count == 2  # the remedy


@pytest.mark.parametrize("replay", [False, True], ids=["one slot", "replay"])
def test_debug_nans(replay):
    """JAX finds the NaN, and runs the step again to name where it came from.

    By then the state has moved on; with `replay=True` it can be used all the same.
    """
    tx = scale_by_paged_adam8bit(replay=replay)

    @jax.jit
    def step(x, state):
        return tx.update(jax.grad(lambda w: jnp.sum(jnp.log(w) ** 2))(x), state)

    x = jnp.ones((64, 64))
    _, state = step(x, tx.init(x))
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan.* in log"):
        step(-x, state)
    if replay:
        updates, state = step(x, state)
        assert state.count == 2 and np.isfinite(updates).all()
        assert moments(state).mu.shape == (64, 64)
    else:
        with pytest.raises(RAISES, match=NOT_THE_NEWEST):
            finish(step(x, state))


def test_scan_over_a_stale_state(tx, states):
    @jax.jit
    def run(state):
        def body(state, _):
            return tx.update(make_grads(), state)[1], ()

        return jax.lax.scan(body, state, length=3)[0]

    assert_refused(lambda: run(states[1]), states[-1], NOT_THE_NEWEST)


def race(update, grads, state):
    """Four threads step from one state. Returns the new states, and what was raised in all."""
    start = threading.Barrier(4)
    results, errors = [], []

    def step():
        with arrays_on_cpu():
            start.wait()
            try:
                results.append(jax.block_until_ready(update(grads, state)))
            except StateRefused as error:  # of a thread before this one
                errors.append(error)

    threads = [threading.Thread(target=step) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) + len(errors) == 4
    old = np.asarray(state.token.value)
    won = [new for _, new in results if not np.array_equal(new.token.value, old)]
    zeros = [updates for updates, _ in results if not np.any(updates["w"])]
    assert len(won) + len(zeros) == len(results)
    try:
        raise_if_refused()
    except StateRefused as error:
        errors.append(error)
    return won, errors


@pytest.mark.parametrize("is_restored", [False, True], ids=["", "restored"])
def test_threads_race_for_one_state(tx, is_restored):
    """One wins, whichever it is; the others are refused."""
    update = jax.jit(tx.update)
    grads = {"w": jnp.ones((256, 160))}
    for _ in range(10):
        _, state = update(grads, tx.init(grads))
        state = pickle.loads(pickle.dumps(state)) if is_restored else state
        (state,), errors = race(update, grads, state)
        assert errors and all("not the newest" in str(error) for error in errors)
        np.testing.assert_allclose(moments(state).mu["w"], 0.19, rtol=0.02)  # two steps of 1
        release(state)


@pytest.mark.parametrize("version", range(3))
def test_moments_of_an_old_state(states, version):
    message = "not the newest" if version else "never updated"
    assert_refused(lambda: moments(states[version]), states[-1], message, RuntimeError)


# --- A state without moments here ---------------------------------------------------------------

RELEASED = r"were released.*init\(params\)"


@pytest.mark.fast
def test_released_state(tx, states):
    before = num_arenas()
    assert release(states[1]) > 0  # any version will do
    assert num_arenas() == before - 1
    for state in states:
        with pytest.raises(RAISES, match=RELEASED):
            finish(tx.update(make_grads(), state))
    with pytest.raises(RuntimeError, match=RELEASED):
        moments(states[-1])
    with pytest.raises(RuntimeError, match=RELEASED):
        memory_report(states[-1])
    assert release(states[-1]) == 0
    assert num_arenas() == before - 1


def test_state_released_before_its_first_update(tx):
    state = tx.init(make_grads())
    assert release(state) == 0
    with pytest.raises(RAISES, match=RELEASED):
        finish(tx.update(make_grads(), state))


def test_release_leaves_other_states_alone(tx, states):
    _, other = tx.update(make_grads(), tx.init(make_grads()))
    before = moments(states[-1])
    release(other)
    assert_trees_equal(moments(states[-1]), before)
    tx.update(make_grads(), states[-1])


def test_release_while_another_thread_steps(tx):
    update = jax.jit(tx.update)
    grads = {"w": jnp.ones((256, 160))}
    before = num_arenas()

    def step(state, stepping, released, errors):
        with arrays_on_cpu():
            try:
                while not released.is_set():
                    _, state = finish(update(grads, state))
                    stepping.set()
                finish(update(grads, state))
            except RAISES as error:
                errors.append(str(error))

    for _ in range(10):
        _, state = update(grads, tx.init(grads))
        stepping, released, errors = threading.Event(), threading.Event(), []
        thread = threading.Thread(target=step, args=(state, stepping, released, errors))
        thread.start()
        stepping.wait()
        assert release(state) > 0
        released.set()
        thread.join()
        assert len(errors) == 1 and re.search(RELEASED, errors[0])
    assert num_arenas() == before


def test_state_on_another_device(tmp_path):
    process = run_python(
        """
        import jax
        jax.config.update("jax_num_cpu_devices", 2)
        import jax.numpy as jnp
        from paged_optax import memory_report, moments, scale_by_paged_adam8bit

        tx = scale_by_paged_adam8bit()
        grads = jnp.ones((64, 80))
        _, state = tx.update(grads, tx.init(grads))
        elsewhere = jax.device_put(grads, jax.devices()[1])
        for token in (state, jax.device_put(state, jax.devices()[1])):
            try:
                jax.block_until_ready(tx.update(elsewhere, token))
            except (RuntimeError, ValueError) as error:
                print(error)
        _, state = tx.update(grads, state)  # goes on where it was
        assert state.count == 2 and moments(state).mu.max() < 0.2
        _, other = tx.update(elsewhere, tx.init(elsewhere))
        print([device.device for device in memory_report((state, other)).devices])
        """,
        tmp_path,
    )
    *errors, devices = process.stdout.splitlines()
    assert len(errors) == 2
    for error in errors:
        assert "are on cpu:0 but the step ran on cpu:1" in error
        assert "run the step where the state was first used, or make a new state with" in error
    assert devices == "['cpu:0', 'cpu:1']"


NOT_HERE = r"not in this process: .* checkpoint.*a token carries no moments.*init\(params\)"


@pytest.fixture(scope="module")
def exported_states(tmp_path_factory):
    """States of another process, before and after its first two updates, without moments."""
    folder = tmp_path_factory.mktemp("foreign")
    run_python(
        """
        import pickle
        import jax, jax.numpy as jnp, numpy as np
        from paged_optax import scale_by_paged_adam8bit

        tx = scale_by_paged_adam8bit()
        grads = {"b": jnp.ones(7), "w": jnp.ones((64, 80))}
        states = [tx.init(grads)]
        for _ in range(2):
            states.append(tx.update(grads, states[-1])[1])
        with open("states", "wb") as file:
            pickle.dump([jax.device_get(jax.tree.leaves(state)) for state in states], file)
        """,
        folder,
    )
    treedef = jax.tree.structure(jax.eval_shape(scale_by_paged_adam8bit().init, jnp.ones(3)))
    states = pickle.loads((folder / "states").read_bytes())
    return [jax.tree.unflatten(treedef, map(jnp.asarray, leaves)) for leaves in states]


handles = itertools.count(1)


@pytest.fixture
def foreign_states(exported_states):
    """The same for every test, with a handle that no other test has used."""
    offset = jnp.array([next(handles), 0], jnp.int32)
    return [
        state._replace(token=type(state.token)(state.token.value + offset))
        for state in exported_states
    ]


@pytest.mark.parametrize("convert", [lambda x: x, np.asarray], ids=["jax", "numpy"])
@pytest.mark.parametrize("version", [1, 2], ids=["once", "twice"])
def test_state_of_another_process(tx, foreign_states, version, convert):
    state = jax.tree.map(convert, foreign_states[version])
    before_call = num_arenas()
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(RAISES, match=NOT_HERE):
            finish(update(make_grads(), state))
    assert num_arenas() == before_call


@pytest.mark.parametrize("convert", [lambda x: x, np.asarray], ids=["jax", "numpy"])
def test_state_that_another_process_never_updated(tx, foreign_states, convert):
    """It has no moments to lose, and is as good as a new one; until it is released."""
    state = jax.tree.map(convert, foreign_states[0])
    update = jax.jit(tx.update)
    expected, mine = update(make_grads(), tx.init(make_grads()))
    actual, theirs = update(make_grads(), state)
    assert_trees_equal(actual, expected)
    assert_trees_equal(update(make_grads(), theirs)[0], update(make_grads(), mine)[0])
    release(theirs)
    with pytest.raises(RAISES, match="were released"):
        finish(update(make_grads(), state))


def test_token_of_zeros_is_no_fresh_state(tx):
    state = jax.tree.map(jnp.zeros_like, tx.init(make_grads()))
    with pytest.raises(RAISES, match=r"token .* is zero.*paged_optax.reset.*init\(params\)"):
        jax.block_until_ready(tx.update(make_grads(), state))


@pytest.mark.parametrize("version", [-1, -5])
def test_nothing_starts_over_from_a_negative_version(version, foreign_states):
    """No state has one."""
    tx, state = scale_by_paged_adam8bit(missing="restart"), foreign_states[2]
    handle = state.token.value.tolist()[0]
    state = state._replace(token=type(state.token)(jnp.array([handle, version], jnp.int32)))
    with pytest.raises(RAISES):
        finish(tx.update(make_grads(), state))


@pytest.mark.parametrize("make", [scale_by_paged_adam8bit, paged_optax.scale_by_paged_lion8bit])
def test_missing_moments_start_over(make, foreign_states):
    """At zero, with bias correction from there; the count goes on."""
    tx = make(missing="restart")
    state = type(tx.init(make_grads()))(*foreign_states[2])
    state = state._replace(count=jnp.int32(100))
    fresh = tx.init(make_grads())
    with pytest.warns(RuntimeWarning, match=r"are not in this process.*start at zero on cpu:0"):
        for i in range(4):
            grads = jax.tree.map(lambda x: x * (i + 1.0), make_grads())  # noqa: B023
            expected, fresh = jax.jit(tx.update)(grads, fresh)
            actual, state = jax.jit(tx.update)(grads, state)
            assert_trees_equal(actual, expected)
            jax.block_until_ready(state)
    assert int(state.count) == 104
    assert_trees_equal(moments(state), moments(fresh))
    with pytest.raises(RAISES, match="not the newest"):
        stale = state._replace(token=type(state.token)(state.token.value - jnp.array([0, 2])))
        jax.block_until_ready(tx.update(make_grads(), stale))
    release(state)


def test_states_of_this_process_do_not_start_over():
    """A state that was used twice, or released, is a mistake, and no missing checkpoint."""
    tx = scale_by_paged_adam8bit(missing="restart")
    _, first = tx.update(make_grads(), tx.init(make_grads()))
    _, second = tx.update(make_grads(), first)
    assert_refused(lambda: tx.update(make_grads(), first), second, "not the newest")
    release(second)
    with pytest.raises(RAISES, match="were released"):
        jax.block_until_ready(tx.update(make_grads(), second))
    invented = tx.init(make_grads())
    token = type(invented.token)(invented.token.value + jnp.array([0, 3], jnp.int32))
    with pytest.raises(RAISES, match="claims version 3 but was never used"):
        jax.block_until_ready(tx.update(make_grads(), invented._replace(token=token)))
    with pytest.raises(ValueError, match="missing is 'zero'; it must be one of error, restart"):
        scale_by_paged_adam8bit(missing="zero")


def test_reports_of_a_state_of_another_process(foreign_states):
    for function in (moments, memory_report):
        with pytest.raises(RuntimeError, match=NOT_HERE):
            function(foreign_states[-1])
    assert release(foreign_states[-1]) == 0


def test_version_that_was_never_made(tx, states):
    token = states[-1].token.value + jnp.array([0, 5], jnp.int32)
    invented = states[-1]._replace(token=token)
    match = r"are at version \d+, and the state is of version \d+\. .*block_until_ready"
    assert_refused(lambda: tx.update(make_grads(), invented), states[-1], match)


# --- Gradients that do not belong to the moments or the parameters ------------------------------


def change(**leaves):
    return {k: v for k, v in {**make_grads(), **leaves}.items() if v is not None}


OTHER_LEAVES = {
    "fewer": (change(b=None), r"belong to 2 leaves but the gradients have 1 \(was the model"),
    "more": (change(c=jnp.ones(3)), "belong to 2 leaves but the gradients have 3"),
    "none": (change(b=None, w=jnp.ones(3)), "belong to 2 leaves but the gradients have 1"),
    "vector": (change(b=jnp.ones(8)), r"\['b'\] have shape \(7,\) but its gradient .* \(8,\)"),
    "scalar": (change(b=jnp.float32(1)), r"\['b'\] have shape \(7,\) but its gradient .* \(\)"),
    "transposed": (
        change(w=jnp.ones((80, 64))),
        r"\['w'\] have shape \(64, 80\) but its gradient has shape \(80, 64\)",
    ),
    "flattened": (change(w=jnp.ones(5120)), r"shape \(64, 80\) but .* shape \(5120,\)"),
}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("grads, match", OTHER_LEAVES.values(), ids=OTHER_LEAVES)
def test_gradients_against_moments(tx, states, grads, match, transform):
    match += r".*Make a new state with init\(params\).*left as they were"
    assert_refused(lambda: transform(tx.update)(grads, states[-1]), states[-1], match)


@pytest.mark.parametrize(
    "min_size, match",
    [
        (1, r"\['b'\] are stored in the format 'float32' but this step wants them in 'ratio'"),
        (
            1 << 20,
            r"\['w'\] are stored in the format 'ratio' but this step wants them in 'float32'",
        ),
    ],
    ids=["to 8 bits", "to float32"],
)
def test_changed_quantization(states, min_size, match):
    tx = scale_by_paged_adam8bit(quantization=Quantization(min_size=min_size))
    match += r" \(was the model, its sharding or the optimizer's `quantization` changed\?\)"
    match += r".*init\(params\)"
    assert_refused(lambda: tx.update(make_grads(), states[-1]), states[-1], match)


def test_fresh_state_for_other_gradients(tx, states):
    """A state that has moments cannot start again with another tree."""
    grads = change(b=jnp.ones(8))
    assert_refused(lambda: tx.update(grads, states[0]), states[-1], r"shape \(7,\) .* \(8,\)")


def test_dtypes_may_change(tx, states):
    """The moments are the same whatever the gradients' dtype."""
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), make_grads())
    updates, _ = tx.update(grads, states[-1])
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "params, match",
    [
        (change(b=None), "there are 2 gradients but 1 parameters"),
        (change(b=jnp.ones(8)), r"gradient \['b'\] has shape \(7,\) but its .* shape \(8,\)"),
        (change(w=jnp.ones((80, 64))), r"gradient \['w'\] has shape \(64, 80\)"),
    ],
    ids=["fewer", "vector", "transposed"],
)
@pytest.mark.parametrize("factory", [paged_adamw8bit, paged_adam8bit], ids=["adamw", "adam"])
def test_gradients_against_parameters(factory, params, match):
    tx = factory(1e-2)
    _, state = tx.update(make_grads(), tx.init(make_grads()), make_grads())
    before = moments(state)
    with pytest.raises(ValueError, match=match):
        tx.update(make_grads(), state, params)
    assert_trees_equal(moments(state), before)
    tx.update(make_grads(), state, make_grads())


# --- Dtypes -------------------------------------------------------------------------------------

DTYPES = ["float64", "complex64", "complex128", "int32", "uint8", "int4", "bool", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_refused(tx, dtype):
    remedy = r"take float32, bfloat16 and float16\. Cast it, or .*optax.masked or optax.partition"
    with jax.enable_x64(True):
        _, state = tx.update(make_grads(), tx.init(make_grads()))
        before = moments(state)
        odd = change(b=jnp.ones(7, dtype))
        for init in (tx.init, jax.jit(tx.init), lambda x: jax.eval_shape(tx.init, x)):
            with pytest.raises(TypeError, match=rf"parameter \['b'\] has dtype {dtype}.*{remedy}"):
                init(odd)
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises(TypeError, match=rf"gradient \['b'\] has dtype {dtype}.*{remedy}"):
                update(odd, state)
        assert_trees_equal(moments(state), before)
        _, state = tx.update(make_grads(), state)
        assert state.count == 2


def test_float32_works_where_64_bits_are_enabled():
    with jax.enable_x64(True):
        tx = paged_adamw8bit(1e-2)
        state = tx.init(make_grads())
        for update in (tx.update, jax.jit(tx.update)):
            updates, state = update(make_grads(), state, make_grads())
            assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
            assert {s.dtype for s in jax.tree.leaves(state)} == {jnp.dtype(jnp.int32)}


def test_masked_keeps_an_integer_leaf_out(tx):
    params = change(b=jnp.ones(7, jnp.int32))
    masked = optax.masked(tx, {"b": False, "w": True})
    updates, state = masked.update(params, masked.init(params))
    assert updates["b"].dtype == jnp.int32
    assert moments(state).mu["w"].shape == (64, 80)


# --- Transformations ----------------------------------------------------------------------------


def stack(tree):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), tree)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("mapped", ["gradients", "state", "both"])
def test_vmap_of_update(tx, states, mapped, transform):
    grads = make_grads() if mapped == "state" else stack(make_grads())
    state = states[-1] if mapped == "gradients" else stack(states[-1])
    in_axes = {"gradients": (0, None), "state": (None, 0), "both": 0}[mapped]
    assert_refused(
        lambda: transform(jax.vmap(tx.update, in_axes))(grads, state),
        states[-1],
        "cannot be vmapped.*Stack the models' parameters",
        NotImplementedError,
    )


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_vmap_of_init(tx, transform):
    with pytest.raises(NotImplementedError, match="cannot be vmapped"):
        transform(jax.vmap(tx.init))(stack(make_grads()))


def test_one_state_broadcast_to_many(tx):
    """Whatever vmap does not see is one token for all, so that a second copy is a fork."""
    state = jax.vmap(lambda i: tx.init(make_grads()))(jnp.arange(3))
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(2))
    _, first = tx.update(make_grads(), first)
    _, second = tx.update(make_grads(), second)
    assert_refused(lambda: tx.update(make_grads(), first), second, NOT_THE_NEWEST)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("grad", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
def test_gradient_through_update(tx, states, grad, transform):
    def norm(grads):
        return optax.tree.norm(tx.update(grads, states[-1])[0])

    assert_refused(
        lambda: transform(grad(norm))(make_grads()),
        states[-1],
        "cannot be differentiated.*optax.adamw.*jax.lax.stop_gradient",
        TypeError,
    )


def test_gradient_through_hyperparameters(states):
    def norm(eps):
        updates, _ = scale_by_paged_adam8bit(eps=eps).update(make_grads(), states[-1])
        return optax.tree.norm(updates)

    match = "cannot be differentiated"
    assert_refused(lambda: jax.grad(norm)(1e-8), states[-1], match, TypeError)


def test_stopped_gradient_goes_on(tx, states):
    """The remedy that the error names."""

    def loss(params):
        grads = jax.lax.stop_gradient(params)
        updates, state = tx.update(grads, states[-1])
        return optax.tree.norm(optax.apply_updates(params, updates)), state

    grads, state = jax.grad(loss, has_aux=True)(make_grads())
    assert state.count == 4
    assert np.isfinite(grads["w"]).all()


# --- Memory -------------------------------------------------------------------------------------


def test_host_memory_is_checked_before_it_is_asked_for():
    with pytest.raises(
        MemoryError,
        match=r"moments need 1\.00 PiB of host memory but .* are available.*Free host memory,"
        r" release\(\) .* shard.*Nothing was allocated",
    ):
        hooks.check_host_memory(1 << 50)
    hooks.check_host_memory(1 << 20)
    assert 1 << 20 < available_host_bytes() < 1 << 50


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space as Linux does")
def test_too_little_host_memory(tmp_path):
    """The step is refused, nothing is left behind, and its state steps once there is memory."""
    process = run_python(
        """
        import resource
        import jax, jax.numpy as jnp, numpy as np
        from helpers import num_arenas
        from paged_optax import Quantization, StateRefused, moments, scale_by_paged_adam8bit

        tx = scale_by_paged_adam8bit(quantization=Quantization(min_size=1 << 30))
        grads = {"w": jnp.ones(1 << 22)}  # 16 MiB, and 32 MiB of moments
        small, state = (tx.init(g) for g in ({"w": jnp.ones(8)}, grads))
        _, small = tx.update({"w": jnp.ones(8)}, small)
        before = moments(small)
        update = jax.jit(tx.update, donate_argnums=0).lower(grads, state).compile()

        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (8 << 20), hard))
        updates, state = jax.block_until_ready(update({"w": grads["w"]}, state))
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        try:
            update({"w": updates["w"]}, state)
        except StateRefused as error:
            print(error)
        assert not updates["w"].any()
        assert num_arenas() == 1
        np.testing.assert_array_equal(moments(small).mu["w"], before.mu["w"])
        updates, state = update({"w": jnp.ones(1 << 22)}, state)
        assert state.count == 1 and num_arenas() == 2
        print("went on")
        """,
        tmp_path,
    )
    error, went_on = process.stdout.splitlines()
    assert "RESOURCE_EXHAUSTED" in error
    assert "the optimizer's moments need 32.00 MiB of address space" in error
    assert "the limit of this process (ulimit -v) leaves" in error
    assert went_on == "went on"


# --- Options ------------------------------------------------------------------------------------

FACTORIES = {
    "scale_by_paged_adam8bit": scale_by_paged_adam8bit,
    "paged_adam8bit": lambda **kwargs: paged_adam8bit(1e-3, **kwargs),
    "paged_adamw8bit": lambda **kwargs: paged_adamw8bit(1e-3, **kwargs),
}
BAD_OPTIONS = {
    "b1 = 1": (dict(b1=1.0), r"b1 is 1.0; it must be in \[0, 1\)"),
    "b1 < 0": (dict(b1=-0.1), r"b1 is -0.1; it must be in \[0, 1\)"),
    "b1 = nan": (dict(b1=float("nan")), "b1 is nan"),
    "b2 = 1": (dict(b2=1), r"b2 is 1; it must be in \[0, 1\)"),
    "eps < 0": (dict(eps=-1e-8), "eps is -1e-08; it must be at least 0"),
    "eps_root < 0": (dict(eps_root=-1.0), "eps_root is -1.0; it must be at least 0"),
}


@pytest.mark.fast
@pytest.mark.parametrize("options, match", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_hyperparameter_out_of_range(factory, options, match):
    with pytest.raises(ValueError, match=match):
        factory(**options)


@pytest.mark.parametrize(
    "make, match",
    [
        (
            lambda: Quantization(codec="x"),
            "unknown codec 'x'; there are 'bfloat16', 'dynamic', 'float32', 'ratio'",
        ),
        (lambda: Quantization(min_size=-1), "min_size is -1; it counts elements"),
        (lambda: Paging(device_bytes=-1), "device_bytes is -1; it counts bytes"),
        (lambda: Paging(headroom_bytes=-1), "headroom_bytes is -1; it counts bytes"),
    ],
    ids=["codec", "min_size", "device_bytes", "headroom_bytes"],
)
def test_bad_option(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("options", [Quantization(), Paging()], ids=["Quantization", "Paging"])
def test_options_are_frozen_and_hashable(options):
    assert hash(options) == hash(type(options)())
    with pytest.raises(AttributeError):
        options.min_size = 0


# --- Questions about the wrong thing ------------------------------------------------------------

QUESTIONS = [moments, memory_report, release]


@pytest.mark.fast
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "thing",
    [
        None,
        (),
        {"w": np.ones(3)},
        optax.adam(1e-3).init({"w": np.ones(3, np.float32)}),
        optax.EmptyState(),
        {"count": np.ones((), np.float32), "token": np.ones(2, np.float32)},
        {"count": {"w": np.ones(2, np.int32)}, "token": {"v": np.ones(2), "w": np.ones(2)}},
    ],
    ids=[
        "None",
        "tuple",
        "parameters",
        "optax.adam",
        "EmptyState",
        "parameters named as the state",
        "modules named as the state",
    ],
)
def test_question_about_another_thing(question, thing):
    with pytest.raises(ValueError, match=r"no paged optimizer state in this .*not the parameters"):
        question(thing)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("container", [lambda s: s, lambda s: s._asdict()], ids=["state", "dict"])
def test_question_about_stacked_states(states, question, container):
    """As `jax.pmap` and `jax.lax.scan` return them."""
    stacked = container(stack(states[-1]))
    match = r"token is int32\[3, 2\], and must be int32\[2\].*pass one: jax.tree.map"
    with pytest.raises(ValueError, match=match):
        question(stacked)
    one = jax.tree.map(lambda leaf: leaf[0], stacked)  # the remedy
    assert memory_report(one) == memory_report(states[-1])


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda f: f.__name__)
def test_question_about_shapes(tx, question):
    with pytest.raises(TypeError, match="shapes and no values.*init or update returned"):
        question(jax.eval_shape(tx.init, make_grads()))


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda f: f.__name__)
def test_question_about_a_state_that_was_cast(states, question):
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), states[-1])
    with pytest.raises(ValueError, match=r"token is float32\[2\], and must be int32\[2\]"):
        question(cast)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda f: f.__name__)
def test_question_while_tracing(states, question):
    def traced(state):
        question(state)
        return state

    match = "is being traced.*call this outside"
    state = assert_refused(lambda: jax.jit(traced)(states[-1]), states[-1], match, TypeError)
    assert_refused(lambda: jax.eval_shape(traced, state), state, match, TypeError)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda f: f.__name__)
def test_question_while_nnx_traces(question):
    model = nnx.Linear(64, 80, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, scale_by_paged_adam8bit(), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    with pytest.raises(TypeError, match="is being traced.*call this outside"):
        nnx.jit(question)(optimizer)
    assert moments(optimizer)


def test_moments_of_a_state_without_updates(tx):
    with pytest.raises(RuntimeError, match="never updated"):
        moments(tx.init(make_grads()))


def test_moments_of_two_states_for_the_same_parameters():
    tx = optax.chain(paged_adam8bit(1e-2), scale_by_paged_adam8bit())
    _, state = tx.update(make_grads(), tx.init(make_grads()))
    with pytest.raises(ValueError, match=r"2 paged states for the same .*opt_state\[0\]"):
        moments(state)
    for part in state:  # the remedy
        assert moments(part).mu["w"].shape == (64, 80)
    assert memory_report(state).total == sum(memory_report(part).total for part in state)


# --- Platforms ----------------------------------------------------------------------------------


def lower(tx, platform, function):
    args = (make_grads(),) if function == "init" else (make_grads(), tx.init(make_grads()))
    traced = jax.jit(getattr(tx, function)).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("function", ["init", "update"])
def test_program_for_a_gpu(tx, function):
    if build_info()["cuda"]:
        assert "custom_call @paged_optax_" in lower(tx, "cuda", function)
        return
    match = "for an NVIDIA GPU but paged_optax was built without CUDA.*Reinstall.*JAX_PLATFORMS=cpu"
    with pytest.raises(RuntimeError, match=match):
        lower(tx, "cuda", function)


@pytest.mark.parametrize("function", ["init", "update"])
@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_program_for_another_platform(tx, platform, function):
    match = f"CPU and on NVIDIA GPUs, not on {platform}.*optax.adamw.*JAX_PLATFORMS=cpu"
    with pytest.raises(NotImplementedError, match=match):
        lower(tx, platform, function)


# --- What a script that moves here may get wrong -------------------------------------------------


def test_other_names_for_the_same_shapes(tx):
    grads = {"v": jnp.ones((64, 64)), "w": jnp.ones((64, 64))}
    for other in ({"v": grads["v"], "x": grads["w"]}, list(grads.values())):
        _, state = tx.update(grads, tx.init(grads))
        assert_refused(functools.partial(tx.update, other, state), state, "other names")


def test_mu_dtype_in_its_place_in_optax():
    with pytest.raises(TypeError, match="mu_dtype"):
        paged_optax.paged_adamw8bit(1e-3, 0.9, 0.95, 1e-8, 0.0, jnp.bfloat16, 0.1)
    with pytest.raises(TypeError, match="mu_dtype"):
        paged_optax.paged_adamw8bit(1e-3, weight_decay=np.dtype("float32"))


@pytest.mark.parametrize(
    "make, name",
    [
        (paged_optax.paged_adamw8bit, "mu_dtype"),
        (paged_optax.paged_lion8bit, "mu_dtype"),
        (functools.partial(paged_optax.paged_sgd8bit, momentum=0.9), "accumulator_dtype"),
        (paged_optax.scale_by_paged_trace8bit, "accumulator_dtype"),
        (paged_optax.scale_by_paged_ema8bit, "accumulator_dtype"),
        (paged_optax.paged_signum8bit, "accumulator_dtype"),
    ],
)
def test_dtypes_that_trainers_pass_on(make, name):
    make(1e-3, **{name: None})
    with pytest.raises(TypeError, match=rf"{name} is .*bfloat16.*can only be None"):
        make(1e-3, **{name: jnp.bfloat16})


def test_state_of_another_optimizer(tx):
    grads = {"w": jnp.ones(3)}
    with pytest.raises(TypeError, match=r"ScaleByAdamState.*init\(params\)"):
        tx.update(grads, optax.scale_by_adam().init(grads))


@pytest.mark.parametrize("field", ["count", "token"])
@pytest.mark.parametrize("how", ["cast", "stacked"])
def test_state_that_was_mapped_over(tx, field, how):
    grads = {"w": jnp.ones(3)}
    state = tx.init(grads)
    (leaf,) = jax.tree.leaves(getattr(state, field))
    wrong = leaf.astype(jnp.float32) if how == "cast" else jnp.stack([leaf, leaf])
    with pytest.raises(ValueError, match=f"{field} is .* must be int32"):
        tx.update(grads, state._replace(**{field: wrong}))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"b2": 0.99999999}, ValueError, "b2 is 0.99999999"),
        ({"b1": np.float32(1.5)}, ValueError, "b1 is 1.5"),
        ({"b1": None}, TypeError, "b1 is None"),
        ({"b1": optax.constant_schedule(0.9)}, TypeError, "inject_hyperparams"),
        ({"eps": np.ones(4)}, ValueError, r"eps has shape \(4,\)"),
        ({"quantization": "dynamic"}, TypeError, "must be a paged_optax.Quantization"),
        ({"paging": 0}, TypeError, "must be a paged_optax.Paging"),
    ],
    ids=lambda x: re.sub(r" at 0x\w+", "", str(x)),  # the same in every process
)
def test_bad_options_are_named(options, error, text):
    with pytest.raises(error, match=text):
        scale_by_paged_adam8bit(**options)


def test_state_from_json(tx, states):
    read = type(states[-1])(3, [1, 2])
    for question in (lambda: tx.update(make_grads(), read), lambda: memory_report(read)):
        with pytest.raises(TypeError, match=r"token is \[1, 2\].*must be int32.*JSON.*init"):
            question()


def test_other_byte_order(tx, states):
    """Of arrays that were read from a file of another machine."""
    swapped = jax.tree.map(lambda leaf: np.asarray(leaf).astype(">i4"), states[-1])
    for question in (lambda: tx.update(make_grads(), swapped), lambda: memory_report(swapped)):
        with pytest.raises(ValueError, match=r"token is .*byte order.*newbyteorder"):
            question()
    right = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype.newbyteorder("=")), swapped)
    tx.update(make_grads(), right)
    with pytest.raises(TypeError, match=r"gradient \['w'\] has dtype >f4, in the byte order.*newb"):
        tx.update({"w": np.ones(3, ">f4")}, states[-1])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"device_bytes": "1GB"}, TypeError),
        ({"device_bytes": True}, TypeError),
        ({"headroom_bytes": np.bool_(True)}, TypeError),
        ({"device_bytes": np.ones(3)}, TypeError),
        ({"headroom_bytes": None}, TypeError),
        ({"device_bytes": 2**70}, ValueError),
    ],
    ids=str,
)
def test_bad_bytes_are_named(options, error):
    with pytest.raises(error, match=f"{next(iter(options))} is"):
        paged_optax.Paging(**options)


def test_bytes_may_be_an_int_of_numpy(tx, states):
    paging = Paging(device_bytes=np.int64(2**20), headroom_bytes=np.uint8(7))
    assert (type(paging.device_bytes), paging.headroom_bytes) == (int, 7)
    paged_optax.evict(states[-1], np.int32(0))
    tx = scale_by_paged_adam8bit(paging=paging)
    finish(tx.update(make_grads(), tx.init(make_grads())))


def test_nesterov_may_be_any_truth_value():
    grads = {"w": jnp.ones(3)}
    for nesterov in (1, np.True_):
        tx = scale_by_paged_adam8bit(nesterov=nesterov)
        finish(tx.update(grads, tx.init(grads)))


OPTIONS = {
    "nearest": {},
    "compensated": {"param_rounding": "compensated"},
    "skip_step": {"non_finite": "skip_step"},
    "both": {"param_rounding": "compensated", "non_finite": "skip_step"},
}


@pytest.mark.parametrize("old, new", list(itertools.permutations(OPTIONS, 2)))
def test_options_that_a_state_was_not_made_with(old, new):
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    state = paged_adamw8bit(1e-3, **OPTIONS[old]).init(params)
    with pytest.raises(TypeError, match=r"param_rounding|non_finite"):
        paged_adamw8bit(1e-3, **OPTIONS[new]).update(params, state, params)


@pytest.mark.parametrize("rate", [None, "1e-3"])
def test_learning_rates_that_are_no_numbers(rate):
    for make in paged_adam8bit, paged_adamw8bit:
        with pytest.raises(TypeError, match="learning_rate is"):
            make(rate)
