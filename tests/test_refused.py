"""What a refused step does, on the CPU and on a GPU: nothing, and the next use of its state raises.

docs/refused.md says it to users. Why states are refused is in test_errors.py.
"""

import threading

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
    find_states,
    hooks,
    make_tree,
    num_arenas,
    raise_if_refused,
    read_leaves,
    read_residuals,
    run_python,
    to_jax,
)
from paged_optax import (
    StateRefused,
    evict,
    memory_report,
    moments,
    newest,
    paged_adam8bit,
    paged_adamw8bit,
    paged_lion8bit,
    prefetch,
    release,
    scale_by_paged_adam8bit,
)

pytestmark = pytest.mark.usefixtures("device")

SHAPES = {"b": (7,), "w": (64, 80)}


def make_params(dtype=jnp.float32):
    return jax.tree.map(lambda x: x.astype(dtype), to_jax(make_tree(0, SHAPES)))


def make_step(tx, **options):
    """A whole jitted step: gradients, update, parameters."""

    @jax.jit
    def grads_of(params):
        return jax.tree.map(jnp.sin, params)

    def step(params, state):
        updates, state = tx.update(grads_of(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **options)


def trained(tx, params, num_steps=3):
    """The states of a run, oldest first."""
    states = [tx.init(params)]
    for _ in range(num_steps):
        states.append(make_step(tx)(params, states[-1])[1])
    return jax.block_until_ready(states)


OPTIMIZERS = {
    "adamw": (lambda: paged_adamw8bit(0.1, weight_decay=0.5), jnp.float32),
    "adam": (lambda: paged_adam8bit(0.1), jnp.float32),
    "lion": (lambda: paged_lion8bit(0.1, weight_decay=0.5), jnp.float32),
    "replay": (lambda: paged_adamw8bit(0.1, weight_decay=0.5, replay=True), jnp.float32),
    "skip": (lambda: paged_adamw8bit(0.1, weight_decay=0.5, non_finite="skip_step"), jnp.float32),
    "schedule": (lambda: paged_adamw8bit(optax.linear_schedule(0.1, 0.0, 9)), jnp.float32),
    "stochastic": (lambda: paged_adamw8bit(0.1, param_rounding="stochastic"), jnp.bfloat16),
    "compensated": (lambda: paged_adamw8bit(0.1, param_rounding="compensated"), jnp.bfloat16),
    "clip": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(0.1, weight_decay=0.5)),
        jnp.float32,
    ),
}


def copies_of(params):
    return jax.tree.map(jnp.copy, params)


@pytest.mark.parametrize("factory, dtype", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_refused_step_changes_nothing_and_the_next_call_raises(factory, dtype):
    """With all arguments donated: what comes out is what went in."""
    tx, params = factory(), make_params(dtype)
    states = trained(tx, params)
    before = moments(states[-1])
    step = make_step(tx, donate_argnums=(0, 1))
    given, old = copies_of(params), jax.tree.map(jnp.copy, states[1])
    for _ in range(2):  # every refused step raises, not just the first
        given, old = jax.block_until_ready(step(given, old))
        assert_trees_equal(given, params)
        assert find_state(old).token.tolist() == find_state(states[1]).token.tolist()
        with pytest.raises(StateRefused, match="not the newest one"):
            step(given, old)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((given, old)))
    assert_trees_equal(moments(states[-1]), before)
    stepped, _ = jax.block_until_ready(step(given, states[-1]))
    assert not np.array_equal(stepped["w"], params["w"])


FAMILY = {
    "sgd": lambda: paged_optax.paged_sgd8bit(0.1, momentum=0.9),
    "adagrad": lambda: paged_optax.paged_adagrad8bit(0.1),
    "ademamix": lambda: paged_optax.paged_ademamix8bit(0.1, weight_decay=0.5),
    "signum": lambda: paged_optax.paged_signum8bit(0.1, weight_decay=0.5),
    "momentum": lambda: paged_optax.paged_rmsprop8bit(0.1, momentum=0.9),
    "lamb": lambda: paged_optax.paged_lamb8bit(0.1, weight_decay=0.5),
    "lars": lambda: paged_optax.paged_lars8bit(0.1, weight_decay=0.5),
    "muon": lambda: paged_optax.paged_muon8bit(0.1, weight_decay=0.5),
}


def stored(states, device):
    """All that is stored for the paged states in a tree."""
    place = "cpu" if device.platform == "cpu" else "cuda"
    return [read_leaves(place, 0, *state.token.tolist()) for state in states]


@pytest.mark.parametrize("in_place", [False, True], ids=["update", "in place"])
@pytest.mark.parametrize("factory", FAMILY.values(), ids=FAMILY)
def test_the_family(factory, in_place, device):
    """Also where other links come before or after the paged ones, or several are paged."""
    tx, params = factory(), make_params()

    def step(params, state):
        return paged_optax.apply_gradients(tx, jax.tree.map(jnp.sin, params), state, params)

    step = jax.jit(step) if in_place else make_step(tx)
    state, run = tx.init(params), []
    for _ in range(2):
        run.append(state := step(params, state)[1])
    before = stored(find_states(run[-1]), device)
    given, old = jax.block_until_ready(step(params, run[0]))
    assert_trees_equal(given, params)
    for new, gone in zip(find_states(old), find_states(run[0]), strict=True):
        assert new.token.tolist() == gone.token.tolist()
    raises(lambda: step(given, old))
    assert_trees_equal(stored(find_states(newest(old)), device), before)
    stepped, _ = step(given, newest(old))
    assert not np.array_equal(stepped["w"], params["w"])


@pytest.mark.parametrize("name", ["adamw", "compensated"])
def test_in_place(name):
    """Parameters that a step writes itself are those that came in."""
    factory, dtype = OPTIMIZERS[name]
    tx, params = factory(), make_params(dtype)
    states = trained(tx, params)

    def step(params, state):
        return paged_optax.apply_gradients(tx, jax.tree.map(jnp.sin, params), state, params)

    step = jax.jit(step, donate_argnums=(0, 1))
    given, old = jax.block_until_ready(step(copies_of(params), jax.tree.map(jnp.copy, states[1])))
    assert_trees_equal(given, params)
    raises(lambda: step(given, old))
    stepped, _ = step(given, states[-1])
    assert not np.array_equal(stepped["w"], params["w"])


def test_residuals_stay(device):
    tx, params = OPTIMIZERS["compensated"][0](), make_params(jnp.bfloat16)
    states = trained(tx, params)
    place = "cpu" if device.platform == "cpu" else "cuda"
    token = find_state(states[-1]).token.tolist()
    before = read_residuals(place, 0, *token)
    jax.block_until_ready(make_step(tx)(params, states[1]))
    with pytest.raises(StateRefused):
        raise_if_refused()
    assert_trees_equal(read_residuals(place, 0, *token), before)


def other_leaves(tx, states):
    other = {"b": jnp.ones(8), "w": jnp.ones((64, 80))}
    return jax.jit(tx.update)(other, states[-1])


def other_rule(tx, states):
    state = paged_optax.ScaleByPagedLion8bitState(*states[-1])
    return jax.jit(paged_optax.scale_by_paged_lion8bit().update)(make_params(), state)


def with_token(state, *token):
    return state._replace(token=type(state.token)(jnp.array(token, jnp.int32)))


CAUSES = {
    "stale": (lambda tx, s: jax.jit(tx.update)(make_params(), s[1]), "not the newest"),
    "leaves": (other_leaves, r"shape \(7,\) .* \(8,\)"),
    "rule": (other_rule, "belongs to the optimizer 'adam' and this step is one of 'lion'"),
    "released": (
        lambda tx, s: release(s[-1]) and jax.jit(tx.update)(make_params(), s[-1]),
        "were released",
    ),
    "foreign": (
        lambda tx, s: jax.jit(tx.update)(make_params(), with_token(s[-1], 5, 1)),
        "not in this process",
    ),
    "zeros": (
        lambda tx, s: jax.jit(tx.update)(make_params(), jax.tree.map(jnp.zeros_like, s[-1])),
        r"is zero, as .*zeros_like.*paged_optax.reset\(opt_state\)",
    ),
    "count": (
        lambda tx, s: jax.jit(tx.update)(make_params(), s[-1]._replace(count=jnp.int32(-1))),
        "count of this optimizer state is negative",
    ),
}


@pytest.mark.parametrize("misuse, match", CAUSES.values(), ids=CAUSES)
def test_every_cause(misuse, match):
    """No program fails, whatever the cause; the state that comes out is refused as well."""
    tx = scale_by_paged_adam8bit()
    states = trained(tx, make_params())
    updates, state = jax.block_until_ready(misuse(tx, states))
    assert not any(np.any(update) for update in jax.tree.leaves(updates))
    if isinstance(state, paged_optax.ScaleByPagedLion8bitState):
        state = type(states[-1])(*state)
    for _ in range(2):
        with pytest.raises(StateRefused, match=match):
            jax.jit(tx.update)(make_params(), state)
        if "shape" in match or "belongs" in match:
            break  # it is the newest, and good for the right gradients
        jax.block_until_ready(jax.jit(tx.update)(make_params(), state))


@pytest.mark.parametrize("change", ["pairs", "floats"])
def test_a_refusal_concerns_no_other_tree(change):
    """What a user makes of another state is none of it, even if it is no state any more."""
    tx, params = scale_by_paged_adam8bit(), make_params()
    old, other = trained(tx, params, 2), tx.init(params)
    jax.block_until_ready(jax.jit(tx.update)(params, old[1]))
    changes = {"pairs": lambda x: (x, x), "floats": lambda x: jnp.full(x.shape, jnp.nan)}
    changed = jax.tree.map(changes[change], other)
    jax.tree.map(lambda x: x, changed)
    jax.block_until_ready(jax.jit(lambda tree: tree)(changed))
    with pytest.raises(StateRefused, match="not the newest"):
        memory_report(old[-1])


def test_a_token_of_other_numbers_ends_without_a_word():
    """While states that were never used are watched, whose tokens are read."""
    tx, params = scale_by_paged_adam8bit(), make_params()
    unused = tx.init(params)
    numbers = [jnp.full((2,), x, dtype) for x, dtype in ((3e9, "float32"), (2**32 - 1, "uint32"))]
    for token in jax.block_until_ready(numbers):
        state = unused._replace(token=type(unused.token)(token))
        tx.init(params)
        del state
    assert memory_report(jax.block_until_ready(tx.update(params, unused))[1]).total > 0


def test_a_token_of_zeros_has_no_moments():
    """Nobody waits for them either."""
    states = trained(scale_by_paged_adam8bit(), make_params())
    zeros = jax.tree.map(jnp.zeros_like, states[-1])
    with pytest.raises(StateRefused, match="is zero"):
        newest(zeros)
    assert memory_report(zeros).total == evict(zeros) == prefetch(zeros) == release(zeros) == 0
    assert memory_report(states[-1]).total > 0


# --- What hinders a first step is a refusal too -------------------------------------------------


@pytest.fixture
def given_back():
    yield
    hooks.pretend_available(-1)
    paged_optax.release_all()


def no_room(tx, params, state, path):
    hooks.pretend_available(1000)
    return state, lambda: hooks.pretend_available(-1)


def damaged(tx, params, state, path):
    """A checkpoint's file that changes after it was opened."""
    _, state = make_step(tx)(params, state)
    paged_optax.save_moments(state, path)
    release(state)
    loaded = paged_optax.load_moments(tx.init(params), path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    return loaded, lambda: path.write_bytes(whole)


@pytest.mark.parametrize("donate", [(), (0, 1)], ids=["kept", "donated"])
@pytest.mark.parametrize("hinder, match", [(no_room, "RESOURCE_EXHAUSTED"), (damaged, "checksum")])
def test_a_first_step_that_cannot_be_made(hinder, match, donate, tmp_path, given_back, device):
    """Nothing is lost, and the same state can be stepped once the cause is gone."""
    tx, params = paged_adamw8bit(0.1, weight_decay=0.5), make_params()
    if hinder is no_room and device.platform != "cpu":
        tx = paged_adamw8bit(0.1, weight_decay=0.5, paging=paged_optax.Paging(memory="pinned"))
    _, unhindered = make_step(tx)(params, tx.init(params))
    expected, _ = make_step(tx)(params, unhindered if hinder is damaged else tx.init(params))
    paged_optax.release_all()
    state, mend = hinder(tx, params, tx.init(params), tmp_path / "moments")
    step, given = make_step(tx, donate_argnums=donate), copies_of(params)
    for _ in range(2):
        given, state = jax.block_until_ready(step(given, state))
        assert_trees_equal(given, params)
        with pytest.raises(StateRefused, match=match):
            step(given, state)
    assert num_arenas() == 0
    mend()
    assert_trees_equal(step(given, state)[0], expected)


def test_a_first_step_in_a_loop_cannot_be_made(given_back):
    """Each round of one program tries, and is refused."""
    tx, params = paged_adamw8bit(0.1, weight_decay=0.5), make_params()
    hooks.pretend_available(1000)
    run = jax.jit(lambda p, s: in_scan(make_step(tx), p, s), donate_argnums=(0, 1))
    given, state = jax.block_until_ready(run(copies_of(params), tx.init(params)))
    assert_trees_equal(given, params)
    with pytest.raises(StateRefused, match="RESOURCE_EXHAUSTED"):
        run(given, state)
    hooks.pretend_available(-1)
    assert not np.array_equal(run(given, state)[0]["w"], params["w"])


def test_of_several_devices_it_fails_the_program(device, given_back):
    """The others may have taken the step: copies of a parameter would not be equal any more."""
    if device.platform != "cpu":
        pytest.skip("the CPU has eight devices here")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices("cpu")[:2])
    params = jax.device_put(make_params(), jax.NamedSharding(mesh, jax.P()))
    tx = paged_adamw8bit(0.1)
    hooks.pretend_available(1000)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        jax.block_until_ready(make_step(tx)(params, tx.init(params)))


def in_scan(step, params, state):
    def body(carry, _):
        return step(*carry), None

    return jax.lax.scan(body, (params, state), length=5)[0]


def in_fori_loop(step, params, state):
    return jax.lax.fori_loop(0, 5, lambda _, carry: step(*carry), (params, state))


def in_cond(step, params, state):
    return jax.lax.cond(params["b"][0] < 1e9, step, lambda *carry: carry, params, state)


LOOPS = {"scan": in_scan, "fori_loop": in_fori_loop, "cond": in_cond}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_inside_of_a_program(loop):
    tx, params = paged_adamw8bit(0.1, weight_decay=0.5), make_params()
    states = trained(tx, params)
    run = jax.jit(lambda p, s: loop(make_step(tx), p, s), donate_argnums=(0, 1))
    given, old = jax.block_until_ready(run(copies_of(params), jax.tree.map(jnp.copy, states[1])))
    assert_trees_equal(given, params)
    with pytest.raises(StateRefused, match="not the newest one"):
        run(given, old)
    run(given, newest(old))


def test_a_loop_that_catches():
    """As in a notebook cell that goes on from an older state by mistake."""
    tx, params = paged_adamw8bit(0.1), make_params()
    states = trained(tx, params)
    step, state, raised = make_step(tx), states[1], 0
    given = params
    for _ in range(20):
        try:
            given, state = jax.block_until_ready(step(given, state))
        except StateRefused:
            raised += 1
    assert raised == 10
    assert_trees_equal(given, params)


def test_a_loop_that_never_waits():
    """It is stopped once JAX starts no more programs before others end; parameters are whole."""
    tx, params = paged_adamw8bit(0.1), make_params()
    states = trained(tx, params)
    step, state, given = make_step(tx), states[1], params
    with pytest.raises(StateRefused, match="not the newest one"):
        for _ in range(1000):
            given, state = step(given, state)
    assert_trees_equal(given, params)


# --- Who is told, and when ----------------------------------------------------------------------


def test_an_eager_update_raises_at_once():
    tx, params = paged_adamw8bit(0.1), make_params()
    states = trained(tx, params)
    for _ in range(2):
        with pytest.raises(StateRefused, match="not the newest one"):
            tx.update(params, states[1], params)
    raise_if_refused()  # nothing is left to say
    tx.update(params, states[-1], params)


def test_an_eager_update_copies_no_parameters(monkeypatch):
    """Weight decay gets the arrays themselves, not selected ones."""
    met, make = [], optax.add_decayed_weights

    def observed(*args):
        link = make(*args)

        def update(updates, state, params=None):
            met.append(params)
            return link.update(updates, state, params)

        return link._replace(update=update)

    monkeypatch.setattr(optax, "add_decayed_weights", observed)
    tx = paged_adamw8bit(0.1, weight_decay=0.5)
    params = make_params()
    tx.update(params, tx.init(params), params)
    assert all(met[0][name] is params[name] for name in params)


@pytest.mark.parametrize("ask", [moments, memory_report, evict, prefetch])
def test_questions_raise(ask):
    tx, params = paged_adamw8bit(0.1), make_params()
    states = trained(tx, params)
    jax.block_until_ready(make_step(tx)(params, states[1]))
    with pytest.raises(StateRefused, match="not the newest one"):
        ask(states[-1])
    ask(states[-1])  # once


@pytest.mark.parametrize(
    "use", [jax.block_until_ready, lambda x: jax.tree.map(jnp.copy, x)], ids=["wait", "copy"]
)
def test_what_a_program_returned_is_not_lost(use):
    """Whatever the same statement does with the results: donated parameters are among them."""
    tx, params = paged_adamw8bit(0.1), make_params()
    states = trained(tx, params)
    step = make_step(tx, donate_argnums=(0, 1))
    for _ in range(2):  # the first call compiles
        given, old = use(step(copies_of(params), jax.tree.map(jnp.copy, states[1])))
        assert_trees_equal(given, params)
        raises(lambda g=given, o=old: step(g, o))


def raises(call):
    with pytest.raises(StateRefused, match="not the newest one"):
        call()


def ahead_of_time(tx, params, state):
    return jax.jit(tx.update).lower(params, state, params).compile()


def as_a_loop(tx, params, state):
    def body(carry, _):
        return tx.update(params, carry, params)[1], None

    return lambda params, state, _: (params, jax.lax.scan(body, state, length=2)[0])


@pytest.mark.parametrize("make", [ahead_of_time, as_a_loop])
def test_other_ways_to_run_a_program(make):
    tx, params = paged_adamw8bit(0.1), make_params()
    states = trained(tx, params)
    run = make(tx, params, states[1])
    _, state = jax.block_until_ready(run(params, states[1], params))
    raises(lambda: run(params, state, params))
    jax.block_until_ready(run(params, states[-1], params))


@pytest.mark.parametrize("end", [newest, release], ids=["newest", "release"])
def test_the_ways_out_raise_nothing(end):
    tx, params = paged_adamw8bit(0.1), make_params()
    states = trained(tx, params)
    _, state = jax.block_until_ready(make_step(tx)(params, states[1]))
    end(state)
    raise_if_refused()


def test_threads_are_told_of_their_own_state(device):
    """One thread has a state that is refused; the other goes on with another one."""
    tx, params = paged_adamw8bit(0.1), make_params()
    bad, good = trained(tx, params)[1], tx.init(params)
    step = make_step(tx)
    refused = threading.Event()
    told = []

    def run(state):
        given = params
        with jax.default_device(device):
            try:
                for _ in range(30):
                    given, state = jax.block_until_ready(step(given, state))
                    if state is not good:
                        refused.wait(0.01)
            except StateRefused as error:
                told.append((threading.current_thread().name, str(error)))
                refused.set()

    threads = [
        threading.Thread(target=run, args=(bad,), name="bad"),
        threading.Thread(target=run, args=(good,), name="good"),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [name for name, _ in told] == ["bad"]


def test_nnx_optimizer():
    model = nnx.Linear(64, 80, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, paged_adamw8bit(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: (m(jnp.ones((4, 64))) ** 2).mean())(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    old = nnx.clone(optimizer)  # a fork
    step(model, optimizer)
    kernel = np.asarray(model.kernel[...])
    step(model, old)
    np.testing.assert_array_equal(model.kernel[...], kernel)
    with pytest.raises(StateRefused, match="not the newest one"):
        step(model, old)
    np.testing.assert_array_equal(model.kernel[...], kernel)
    step(model, optimizer)
    jax.block_until_ready(nnx.state((model, optimizer)))


def test_devices_refuse_as_one(device):
    if device.platform != "cpu":
        pytest.skip("the CPU has eight devices here")
    mesh = jax.make_mesh((8,), ("x",), devices=jax.devices("cpu"))
    put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))  # noqa: E731
    params = {"w": put(jnp.ones((64, 80)))}
    tx = paged_adamw8bit(0.1, weight_decay=0.5)
    states = trained(tx, params)
    step = make_step(tx, donate_argnums=(0, 1))
    given, old = jax.block_until_ready(step(copies_of(params), jax.tree.map(jnp.copy, states[1])))
    assert_trees_equal(given, params)
    with pytest.raises(StateRefused, match="not the newest one"):
        step(given, old)
    raise_if_refused()  # one error for eight devices
    jax.block_until_ready(step(given, states[-1]))


# --- Warnings, and the end of the process -------------------------------------------------------

ONE_SHOT = """
import warnings
import jax, jax.numpy as jnp, optax, paged_optax

tx = paged_optax.paged_adamw8bit(0.1)
params = {"w": jnp.ones((64, 80))}
step = jax.jit(lambda p, s: tx.update(p, s, p))
_, old = step(params, tx.init(params))
_, new = jax.block_until_ready(step(params, old))
updates, state = step(params, old)
updates["w"].block_until_ready()
"""


@pytest.mark.parametrize("options", [(), ("-W", "error")], ids=["default", "errors"])
def test_a_warning_comes_before_the_exception(tmp_path, options):
    """For who never uses the state again. Where warnings are errors, there is the exception."""
    code = ONE_SHOT + "print('went on')\n"
    process = run_python(code, tmp_path, options=options)
    assert process.stdout == "went on\n"
    assert process.stderr.count("not the newest one") == (0 if options else 1)
    assert ("RuntimeWarning: paged_optax: this optimizer state" in process.stderr) != bool(options)


def test_the_process_may_end_while_steps_are_refused(tmp_path):
    """XLA's threads report refusals to an interpreter that ends; nothing is raised into it.

    (A Python thread that is inside of jax itself at that time is no test: before Python 3.14 it
    ends the process by SIGABRT, or now and then by SIGSEGV, without paged_optax as well.)
    """
    code = """
def run(state, big):
    body = lambda state, _: (tx.update(params, state, params)[1], None)
    return jax.lax.scan(body, state, length=20_000)[0], big @ big
big = jnp.ones((512, 512))  # for a small product the main thread would run the program itself
run = jax.jit(run).lower(old, big).compile()
paged_optax.newest(old)  # what was refused so far is done with
result = run(old, big)
print("ends")
"""
    process = run_python(ONE_SHOT + code, tmp_path, options=("-W", "ignore"))
    assert process.stdout == "ends\n" and process.stderr == ""


def test_the_process_may_end_while_threads_ask(tmp_path):
    """Daemon threads come back from C++ to a Python that is no longer there."""
    code = """
import threading, time
from helpers import ext, find_state
def ask():
    while True:
        try:
            ext.describe(*token), ext.newest(token[0]), ext.list_states()
            with ext.snapshot("cpu", 0, *token) as snapshot:
                snapshot.read(0)
            ext.snapshot("cpu", 0, token[0], 1)  # is refused
        except paged_optax.StateRefused:
            pass
token = find_state(new).token.tolist()
for _ in range(3):
    threading.Thread(target=ask, daemon=True).start()
time.sleep(0.1)
print("ends")
"""
    process = run_python(ONE_SHOT + code, tmp_path, options=("-W", "ignore"))
    assert process.stdout == "ends\n" and process.stderr == ""


def test_a_state_that_is_right_is_not_printed(monkeypatch):
    """The text of an error reads the arrays of a state, and so waits for the device."""
    tx, params = scale_by_paged_adam8bit(), make_tree(0, {"w": (64, 64)})
    state = tx.init(params)
    monkeypatch.setattr(type(state.count), "__repr__", lambda array: pytest.fail("printed"))
    _, state = tx.update(params, state)
    assert moments(state).mu is not None
    assert release(state) > 0
