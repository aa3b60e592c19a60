"""`newest` and `states`: moments are never lost, whatever happens to the state that names them."""

import contextlib
import gc
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import paged_optax
from helpers import (
    assert_trees_equal,
    find_state,
    forget_notices,
    hooks,
    make_tree,
    notices_are_about,
    num_arenas,
    num_unused,
    run_python,
    to_jax,
)
from paged_optax import (
    MultiSteps,
    StateRefused,
    memory_report,
    moments,
    newest,
    paged_adam8bit,
    paged_adamw8bit,
    release,
    states,
)

pytestmark = pytest.mark.usefixtures("device")


def make_params():
    return to_jax(make_tree(0, {"b": (7,), "w": (64, 80)}))


def make_step(tx, **options):
    def step(params, state):
        return tx.update(params, state, params)[1]

    return jax.jit(step, **options)


SCHEDULE = optax.linear_schedule(1e-2, 0.0, 100)
TREES = {
    "alone": lambda **o: paged_optax.scale_by_paged_adam8bit(**o),
    "chain": lambda **o: optax.chain(optax.clip(1.0), paged_adamw8bit(SCHEDULE, **o)),
    "masked": lambda **o: optax.masked(paged_adamw8bit(1e-2, **o), {"b": False, "w": True}),
    "partition": lambda **o: optax.partition(
        {"x": paged_adamw8bit(1e-2, **o), "y": paged_adam8bit(SCHEDULE, **o)},
        {"b": "x", "w": "y"},
    ),
    "accumulated": lambda **o: MultiSteps(paged_adam8bit(1e-2, **o), 1),
}


@pytest.mark.parametrize("replay", [False, True], ids=["one slot", "replay"])
@pytest.mark.parametrize("factory", TREES.values(), ids=TREES)
def test_any_state_of_a_life_leads_to_the_newest(factory, replay):
    tx, params = factory(replay=replay), make_params()
    step = make_step(tx)
    run = [tx.init(params)]
    for _ in range(4):
        run.append(step(params, run[-1]))
    for old in run[:1] + run[2:]:
        found = newest(old)
        assert jax.tree.structure(found) == jax.tree.structure(run[-1])
        for tree, name in [(found, "count"), (found, "token")]:
            assert_trees_equal(
                optax.tree.get_all_with_path(tree, name)[0][1],
                optax.tree.get_all_with_path(run[-1], name)[0][1],
            )
    if replay or "accumulated" not in str(factory):
        step(params, newest(run[1]))


def test_counts_of_schedules_go_along():
    tx, params = TREES["chain"](), make_params()
    step = make_step(tx)
    old = step(params, tx.init(params))
    new = step(params, step(params, old))
    assert_trees_equal(newest(old), new)


def test_after_a_callback_that_raises():
    tx, params = paged_adamw8bit(1e-2), make_params()
    step = make_step(tx)
    state = step(params, tx.init(params))

    def fail(x):
        raise OSError("disk full")

    @jax.jit
    def logging_step(params, state):
        updates, state = tx.update(params, state, params)
        jax.debug.callback(fail, updates["b"].sum())
        return state

    with pytest.raises(Exception, match="disk full"):
        jax.block_until_ready(logging_step(params, state))
        jax.effects_barrier()
    found = newest(state)
    assert found[0].count == 2
    state = step(params, found)
    with contextlib.suppress(Exception):  # JAX raises, or makes arrays that cannot be read
        state = logging_step(params, state)
    found = newest(state)
    assert found[0].count == 4
    step(params, found)
    with contextlib.suppress(Exception):
        jax.effects_barrier()


def test_a_cell_that_runs_again():
    """The function's own states are gone with it; the notebook has the one from before."""
    tx, params = paged_adamw8bit(1e-2), make_params()
    step = make_step(tx)

    def cell(state):
        for _ in range(3):
            state = step(params, state)
        raise FloatingPointError("my check of the loss")

    state = step(params, tx.init(params))
    for count in (4, 7):
        with pytest.raises(FloatingPointError):
            cell(state)
        state = newest(state)
        assert state[0].count == count


def test_a_donated_state():
    tx, params = TREES["chain"](), make_params()
    step = make_step(tx, donate_argnums=1)
    state = step(params, tx.init(params))
    expected = jax.device_get(jax.tree.leaves(step(params, state)))
    assert jax.tree.leaves(state)[-1].is_deleted()
    assert_trees_equal(jax.tree.leaves(newest(state)), expected)
    other = step(params, tx.init(params))
    with pytest.raises(ValueError, match="nothing tells which it is.*There are 2"):
        newest(state)
    entry = states()[0]
    assert_trees_equal(jax.tree.leaves(newest(state, of=[entry])), expected)
    step(params, newest(state, of=[entry]))
    del other


def test_what_it_refuses():
    tx, params = paged_adamw8bit(1e-2), make_params()
    step = make_step(tx)
    fresh = tx.init(params)
    assert_trees_equal(newest(fresh), fresh)
    state = step(params, fresh)
    with pytest.raises(ValueError, match="no paged optimizer state"):
        newest(params)
    release(state)
    with pytest.raises(StateRefused, match="were released"):
        newest(state)


def test_a_state_of_an_earlier_life():
    tx, params = paged_adamw8bit(1e-2), make_params()
    step = make_step(tx)
    fresh = tx.init(params)
    old = step(params, step(params, fresh))
    again = step(params, fresh)
    hooks.deliver_notices()
    with pytest.raises(StateRefused, match="earlier training.*version 2, .* began with 3"):
        newest(old)
    assert_trees_equal(newest(fresh), again)


@pytest.mark.filterwarnings("ignore:.*start at zero")
def test_a_state_that_started_over():
    """Its moments were missing (missing="restart"), so its life began with an updated state."""
    tx, params = paged_adamw8bit(1e-2, missing="restart"), make_params()
    step = make_step(tx)
    restored = tx.init(params)
    handle = int(find_state(restored).token[0])
    token = jnp.array([handle + (2**25 if handle < 2**29 else -(2**25)), 57], jnp.int32)
    link = restored[0]
    link = link._replace(count=jnp.int32(100), token=type(link.token)(token))
    restored = (link, *restored[1:])
    with pytest.raises(StateRefused, match="not in this process"):
        newest(restored)
    first = step(params, restored)
    second = step(params, first)
    for old in (restored, first, second):
        assert_trees_equal(newest(old), second)
    (entry,) = [entry for entry in states() if entry.handle == int(token[0])]
    assert (entry.version, entry.count, entry.is_held) == (59, 102, True)
    with pytest.warns(RuntimeWarning, match="ended the training .* after 2 steps"):
        again = jax.block_until_ready(step(params, restored))
        memory_report(again)  # a GPU reports with the next call
        hooks.deliver_notices()
    assert_trees_equal(newest(restored), again)
    with pytest.raises(StateRefused, match="earlier training.*version 58, .* began with 60"):
        newest(first)


def test_restart_of_a_trained_life_says_so_once(device):
    tx, params = paged_adamw8bit(1e-2), make_params()
    step = make_step(tx)
    fresh = tx.init(params)
    step(params, fresh)
    with pytest.warns(RuntimeWarning, match="ended the training .* after 2 steps") as warned:
        for _ in range(3):  # the second time, the life had one step: nothing to speak of
            state = jax.block_until_ready(step(params, fresh))
            jax.block_until_ready(step(params, state))
        jax.block_until_ready(step(params, fresh))  # a GPU reports with the next call
        step(params, newest(fresh))
        hooks.deliver_notices()
    assert len([w for w in warned if "ended the training" in str(w.message)]) == 1


def test_nnx_optimizer():
    model = nnx.Linear(64, 80, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, paged_adamw8bit(1e-2), wrt=nnx.Param)
    grads = nnx.grad(lambda m: (m(jnp.ones((4, 64))) ** 2).mean())(model)
    optimizer.update(model, grads)
    old = nnx.clone(optimizer)
    optimizer.update(model, grads)
    old.opt_state = newest(old.opt_state)
    old.update(model, grads)
    assert find_state(old).count[...] == 3


def test_on_several_devices(device):
    if device.platform != "cpu":
        pytest.skip("the CPU has eight devices here")
    mesh = jax.make_mesh((8,), ("x",), devices=jax.devices("cpu"))
    params = {"w": jax.device_put(jnp.ones((64, 80)), jax.NamedSharding(mesh, jax.P("x")))}
    tx = paged_adamw8bit(1e-2)
    step = make_step(tx)
    old = step(params, tx.init(params))
    new = step(params, old)
    found = newest(old)
    assert_trees_equal(found, new)
    assert found[0].token.value.sharding == old[0].token.value.sharding
    step(params, found)


# --- Interrupts ---------------------------------------------------------------------------------


def interrupted(num_interrupts, donate):
    """Trains, and is interrupted again and again at random moments; returns the last state."""
    tx, params = paged_adamw8bit(SCHEDULE), make_params()
    step = make_step(tx, donate_argnums=1) if donate else make_step(tx)
    rng, armed = np.random.default_rng(0), False

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    state = step(params, tx.init(params))
    gc.disable()  # jax has a callback there, which swallows an interrupt
    try:
        for _ in range(num_interrupts):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 3e-3))
                while True:
                    state = step(params, state)
            except KeyboardInterrupt:
                armed = False
            last = int(find_count(state)) if not donate else 0
            state = newest(state)
            assert int(find_count(state)) >= max(last, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    return tx, params, state


def find_count(state):
    return state[0].count


@pytest.mark.parametrize(
    "num_interrupts", [30, pytest.param(1000, marks=pytest.mark.endurance)], ids=str
)
@pytest.mark.parametrize("donate", [False, True], ids=["kept", "donated"])
def test_interrupts_lose_nothing(donate, num_interrupts):
    """Afterwards the moments are those of a run without interrupts, to the bit."""
    tx, params, state = interrupted(num_interrupts, donate)
    assert num_arenas() == 1
    count = int(find_count(state))
    assert count > num_interrupts / 2
    actual = moments(state)
    expected = jax.jit(
        lambda s: jax.lax.fori_loop(0, count, lambda _, s: tx.update(params, s, params)[1], s)
    )(tx.init(params))
    assert_trees_equal(actual, moments(expected))
    assert_trees_equal(find_count(state), find_count(expected))


# --- States that nobody holds -------------------------------------------------------------------


def test_states_made_in_a_scan_can_be_found_and_freed():
    tx, params = paged_adam8bit(1e-2), make_params()

    @jax.jit
    def one_round(params):
        def client(total, _):
            updates, _ = tx.update(params, tx.init(params))
            return jax.tree.map(jnp.add, total, updates), None

        return jax.lax.scan(client, params, None, length=5)[0]

    mine = make_step(tx)(params, tx.init(params))
    for _ in range(2):
        jax.block_until_ready(one_round(params))
        found = states()
        lost = [entry for entry in found if not entry.is_held]
        assert len(found) == 6 and len(lost) == 5
        assert all(entry.names == ("['b']", "['w']") and entry.nbytes for entry in lost)
        assert release(lost) == sum(entry.nbytes for entry in lost)
    (left,) = states()
    assert left.handle == int(find_state(mine).token[0]) and left.is_held and left.count == 1
    assert "version 1" in str(left)
    assert release(left) == left.nbytes and states() == []


def test_init_outside_of_the_loop_needs_one_state_for_all_clients():
    """The remedy that needs no release: a version-0 state begins anew with every use."""
    tx, params = paged_adam8bit(1e-2), make_params()

    @jax.jit
    def one_round(params, fresh):
        def client(total, _):
            updates, _ = tx.update(params, fresh)
            return jax.tree.map(jnp.add, total, updates), None

        return jax.lax.scan(client, params, None, length=5)[0]

    fresh = tx.init(params)
    for _ in range(3):
        jax.block_until_ready(one_round(params, fresh))
        assert num_arenas() == 1


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_dropped_fresh_states_cost_nothing(transform):
    """No step has to look out for them any more, so on a GPU none waits."""
    tx, params = paged_adam8bit(1e-2), make_params()
    init, step = transform(tx.init), make_step(tx)
    state = step(params, tx.init(params))
    for _ in range(5):
        jax.block_until_ready(init(params))
    kept = jax.block_until_ready(init(params))

    def few_steps(state):
        gc.collect()
        for _ in range(3):
            state = jax.block_until_ready(step(params, state))
        return state

    state = few_steps(state)
    assert num_unused() == 1
    copy = jax.tree.map(jnp.copy, kept)  # whose original may go
    del kept
    state = few_steps(state)
    assert num_unused() == 1
    jax.block_until_ready(step(params, copy))
    assert num_unused() == 0
    assert [entry.version for entry in states()] == [7, 1]


def test_a_fresh_state_on_a_mesh_is_not_dropped(on_cpu):
    """init puts what it made on the mesh of the parameters, and lets go of the first array."""
    mesh = jax.make_mesh((8,), ("x",), devices=jax.devices("cpu"))
    params = {"w": jax.device_put(jnp.ones((64, 80)), jax.NamedSharding(mesh, jax.P("x")))}
    tx = paged_adam8bit(1e-2)
    step = make_step(tx)
    other = step(params, tx.init(params))
    fresh = tx.init(params)
    assert len(fresh[0].token.value.sharding.device_set) == 8

    def few_steps(state):
        gc.collect()
        for _ in range(3):
            state = jax.block_until_ready(step(params, state))
        return state

    other = few_steps(other)
    assert num_unused() == 1
    assert [entry.is_held for entry in states()] == [True, True]
    jax.block_until_ready(step(params, fresh))
    assert num_unused() == 0
    fresh = tx.init(params)
    assert num_unused() == 1
    del fresh  # and a state that nobody has is still noticed
    few_steps(other)
    assert num_unused() == 0


def test_a_copy_of_a_dropped_state_comes_back(device):
    """Somebody kept the numbers alone, and makes a state of them after all."""
    tx, params = paged_adam8bit(1e-2), make_params()
    step = make_step(tx)
    other = step(params, tx.init(params))
    fresh = tx.init(params)
    back = jax.device_get(fresh)  # NumPy arrays, which nobody watches
    del fresh
    gc.collect()
    for _ in range(3):
        other = jax.block_until_ready(step(params, other))
    assert num_unused() == 0
    state = jax.block_until_ready(step(params, back))
    if device.platform != "cpu":  # it did not look at the token
        with pytest.raises(StateRefused, match="dropped before its first update"):
            step(params, state)
        state = step(params, state)
    assert moments(state).mu["w"].any()
    del other


def test_a_shortage_names_what_nobody_holds(device, monkeypatch):
    """The notice of the C++ side where moments of a new state have to go to the host."""
    forget_notices(monkeypatch)
    tx, params = paged_adam8bit(1e-2), make_params()
    lost = make_step(tx)(params, tx.init(params))
    notices_are_about(monkeypatch, device)
    with pytest.warns(RuntimeWarning, match="host memory") as warned:
        hooks.post_notice(0, 1 << 20, "moments are in host memory.")
        hooks.deliver_notices()
    assert not any("no array" in str(w.message) for w in warned)
    del lost
    gc.collect()
    forget_notices(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"1 state.s. that no array .* paged_optax.release"):
        hooks.post_notice(0, 1 << 20, "moments are in host memory.")
        hooks.deliver_notices()


def test_states_of_a_process_without_any(tmp_path):
    process = run_python("import paged_optax; print(paged_optax.states())", tmp_path)
    assert process.stdout == "[]\n"
