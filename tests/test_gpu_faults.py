"""Calls of CUDA that fail, memory promises and first steps on a GPU.

What needs no GPU of this is in `test_native.py`, which runs the same host code.
"""

import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import paged_optax
from helpers import (
    RAISES,
    assert_trees_equal,
    finish,
    hooks,
    num_arenas,
    run_python,
    stored_leaves,
)
from paged_optax import (
    Paging,
    evict,
    load_moments,
    memory_report,
    moments,
    newest,
    prefetch,
    release,
    reset,
    save_moments,
    states,
)

# That moments could not be moved is a warning, and the second time it works.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

MIB = 1 << 20
NO_MEMORY, OUT_OF_RESOURCES = 2, 701  # as in driver_types.h


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    hooks.withdraw_failure()
    hooks.pretend_available(-1)


@functools.cache
def grads(step):
    """Two formats, so two kernels a step; three segments."""
    rng = np.random.default_rng(step)
    shapes = {"w": (2048, 1024), "b": (77,)}
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


class Lost(Exception):
    """A step or a reset of which part was made; the error said so."""


def attempt(action, *args, is_patient, replay=False):
    """What the action returns, the second time if it fails the first."""
    try:
        return finish(action(*args))
    except (*RAISES, MemoryError, OSError) as error:
        assert is_patient
        if "cannot be trusted" in str(error) and not replay:
            raise Lost("reset" if "Part of the reset" in str(error) else "step") from error
        return finish(action(*args))


def bits(tree):
    """To compare many large trees fast."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def run(tx, update, is_patient=False, replay=False):
    """The bits of the updates and moments of two steps, with moves in between."""
    state, updates = attempt(tx.init, grads(0), is_patient=is_patient), []
    try:
        for step in range(2):
            result, state = attempt(
                update, grads(step), state, is_patient=is_patient, replay=replay
            )
            updates.append(result)
            for action in evict, prefetch:
                attempt(action, state, is_patient=is_patient)
        return bits((updates, attempt(stored_leaves, state, is_patient=is_patient)))
    finally:
        attempt(release, state, is_patient=True)


def run_rest(tx, update, folder, is_patient=False):
    """The bits of what comes out of a reset, a checkpoint and a step from it."""
    small = {"w": grads(0)["w"][:64], "b": grads(0)["b"]}
    made = []
    try:
        state = attempt(tx.init, small, is_patient=is_patient)
        made.append(state)
        _, state = attempt(update, small, state, is_patient=is_patient)
        state = attempt(reset, state, {"w": np.arange(64)[:, None] < 9}, is_patient=is_patient)
        attempt(save_moments, state, folder / "moments", is_patient=is_patient)
        attempt(states, is_patient=is_patient)
        state = attempt(newest, state, is_patient=is_patient)
        fresh = attempt(tx.init, small, is_patient=is_patient)
        made.append(fresh)
        restored = attempt(load_moments, fresh, folder / "moments", is_patient=is_patient)
        made.append(restored)
        result, restored = attempt(update, small, restored, is_patient=is_patient)
        return bits((result, attempt(stored_leaves, restored, is_patient=is_patient)))
    finally:
        for state in made:
            attempt(release, state, is_patient=True)


def fail_each_call(run_once):
    """Fails each call in turn, until none is left: how many there were, and what was lost.

    What comes out of the others are the bits of a run without a failure.
    """
    expected, lost, num_calls = run_once(False), [], 0
    for num_calls in range(2000):
        hooks.fail_call("", NO_MEMORY, after=num_calls)
        try:
            actual = run_once(True)
        except Lost as error:
            lost.append(str(error))
            continue
        if hooks.withdraw_failure():  # there are no more calls
            break
        assert actual == expected
    return num_calls, lost


@pytest.mark.parametrize("memory, replay", [("managed", False), ("pinned", True)])
def test_every_call_fails_once(memory, replay):
    """Each in turn: an error, and then the same bits; or an error that says what is lost."""
    tx = paged_optax.scale_by_paged_adam8bit(
        paging=Paging(memory="pinned") if memory == "pinned" else Paging(), replay=replay
    )
    update = jax.jit(tx.update)
    num_calls, lost = fail_each_call(
        lambda is_patient: run(tx, update, is_patient=is_patient, replay=replay)
    )
    print(f"{memory}, replay={replay}: {num_calls} calls failed once, {len(lost)} partial steps")
    assert 60 <= num_calls < 1999
    assert len(lost) == (0 if replay else 2)  # the second kernel of each step
    assert num_arenas() == 0


@pytest.mark.parametrize("memory", ["managed", "pinned"])
def test_every_call_of_the_rest_fails_once(memory, tmp_path):
    """The same of resets, checkpoints, `newest` and the first step of a restored state."""
    tx = paged_optax.scale_by_paged_adam8bit(paging=Paging(memory=memory))
    update = jax.jit(tx.update)
    num_calls, lost = fail_each_call(
        lambda is_patient: run_rest(tx, update, tmp_path, is_patient=is_patient)
    )
    num_resets = lost.count("reset")
    print(f"{memory}: {num_calls} calls failed once, {num_resets} resets are lost of {len(lost)}")
    assert 60 <= num_calls < 1999
    assert num_resets >= 1  # copies of the one leaf, and the header after them
    assert lost.count("step") == 2  # the second kernel of each step
    assert num_arenas() == 0


@pytest.mark.usefixtures("standard_promotion")
def test_every_call_of_any_optimizer_fails_once():
    """A step of several calls: an error, then the same bits, or the state is refused for good."""
    tx = paged_optax.paged(optax.adam(0.1), quantization=paged_optax.Quantization("float32"))
    params, update = {"a": jnp.ones((64, 64)), "b": jnp.ones((77,))}, jax.jit(tx.update)

    def two_steps(is_patient):
        state = first = attempt(tx.init, params, is_patient=is_patient)
        try:
            result, state = attempt(update, params, state, params, is_patient=is_patient)
            try:
                second, state = finish(update(params, state, params))
            except RAISES:
                assert is_patient
                try:
                    second, state = finish(update(params, state, params))
                except RAISES as error:  # the first one failed when moments were written already
                    with pytest.raises(RAISES):
                        moments(state)
                    raise Lost from error
            return bits((result, second))
        finally:
            attempt(release, first, is_patient=True)

    num_calls, lost = fail_each_call(two_steps)
    print(f"any: {num_calls} calls failed once, {len(lost)} steps were lost in the middle")
    assert 30 <= num_calls < 1999
    assert len(lost) < num_calls / 2
    assert num_arenas() == 0


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("after", range(3))
def test_launch_that_fails(after, replay):
    """The version has advanced when the second kernel fails: it goes back where it can."""
    tx = paged_optax.scale_by_paged_adam8bit(replay=replay)
    update = jax.jit(tx.update)

    def second_step(fails):
        _, state = jax.block_until_ready(update(grads(0), tx.init(grads(0))))
        if fails:
            hooks.fail_call("launch", OUT_OF_RESOURCES, after=after)
            match = {1: "No step was made", 2: "Part of the step"}.get(after, "a launch")
            with pytest.raises(RAISES, match=match):
                jax.block_until_ready(update(grads(1), state))
            if after == 2 and not replay:
                with pytest.raises(RAISES):
                    moments(state)
                return None
        result, state = jax.block_until_ready(update(grads(1), state))
        return result, moments(state)

    actual = second_step(fails=True)
    assert actual is None or assert_trees_equal(actual, second_step(fails=False)) is None


def test_a_full_pool_of_xla_has_no_scratch_memory(tmp_path):
    """The step takes CUDA's, with the same bits; so do all steps of the process from then on."""
    code = """
        import warnings
        warnings.simplefilter("ignore")
        import jax, paged_optax
        from helpers import hooks
        from test_gpu_faults import NO_MEMORY, run
        tx = paged_optax.scale_by_paged_adam8bit()
        update = jax.jit(tx.update)
        expected = run(tx, update)
        hooks.fail_call("XLA's pool", NO_MEMORY)
        actual = run(tx, update)
        assert not hooks.withdraw_failure()  # it was asked, and had none
        assert actual == expected
        print("done")
        """
    assert "done" in run_python(code, tmp_path, JAX_PLATFORMS="cuda").stdout


def test_no_thread_for_moves(tmp_path):
    """A step does not need one; evict says what is missing, and works when there is one."""
    code = """
import warnings
warnings.simplefilter("ignore")
import jax, jax.numpy as jnp, paged_optax
from helpers import hooks
from paged_optax import evict, memory_report
tx = paged_optax.scale_by_paged_adam8bit()
params = {"w": jnp.ones((2048, 1024))}
update = jax.jit(tx.update)
_, state = update(params, tx.init(params))
hooks.fail_call("thread", 11)
try:
    evict(state)
except MemoryError as error:
    assert "no thread could be started" in str(error), error
else:
    raise AssertionError
_, state = jax.block_until_ready(update(params, state))
assert evict(state) > 0 and memory_report(state).resident == 0
print("done")
"""
    assert "done" in run_python(code, tmp_path, JAX_PLATFORMS="cuda").stdout


def test_promise_of_managed_memory():
    """What is on the device may be sent to the host at any time, so it counts there."""
    tx = paged_optax.scale_by_paged_adam8bit()
    _, state = jax.block_until_ready(tx.update(grads(0), tx.init(grads(0))))
    total = memory_report(state).total
    assert memory_report(state).resident == total == hooks.promised()
    evict(state)
    assert hooks.promised() == 0
    prefetch(state)
    assert hooks.promised() == memory_report(state).resident > 0
    hooks.pretend_available(total + MIB)
    fresh = tx.init(grads(0))
    with pytest.raises(RAISES, match="promised to the moments of other states and devices"):
        finish(tx.update(grads(0), fresh))
    release(state)
    _, state = jax.block_until_ready(tx.update(grads(0), fresh))
    release(state)
    assert hooks.promised() == 0


def test_pinned_memory_is_taken_at_once():
    tx = paged_optax.scale_by_paged_adam8bit(paging=Paging(memory="pinned"))
    _, state = jax.block_until_ready(tx.update(grads(0), tx.init(grads(0))))
    assert hooks.promised() == 0
    release(state)


@pytest.mark.parametrize("call", ["cudaMallocManaged", "cudaHostAlloc"])
def test_first_step_does_not_stop_other_states(call):
    """Its memory takes its time. Other states of the GPU step meanwhile, and release waits."""
    memory = Paging(memory="pinned") if call == "cudaHostAlloc" else Paging()
    slow = paged_optax.scale_by_paged_adam8bit(paging=memory)
    other = paged_optax.scale_by_paged_adam8bit()
    update, slow_update = jax.jit(other.update), jax.jit(slow.update)
    _, state = jax.block_until_ready(update(grads(0), other.init(grads(0))))
    _, warm = jax.block_until_ready(slow_update(grads(0), slow.init(grads(0))))
    release(warm)
    fresh = slow.init(grads(0))
    hooks.fail_call(call, -600_000)
    thread = threading.Thread(target=lambda: jax.block_until_ready(slow_update(grads(0), fresh)))
    thread.start()
    while hooks.is_asked() and thread.is_alive():
        time.sleep(0.01)
    for _ in range(3):
        _, state = jax.block_until_ready(update(grads(0), state))
    threading.Timer(0.2, hooks.withdraw_failure).start()
    assert release(fresh) > 0  # 0 if it had not waited
    thread.join()
    release(state)


def test_first_step_that_fails_on_one_gpu():
    """It is undone on the other, and the same state can be stepped again."""
    devices = jax.devices("gpu")[:2]
    if len(devices) < 2:
        pytest.skip("there is only one GPU")
    mesh = jax.make_mesh((2,), ("x",), devices=devices)
    params = jax.device_put({"w": grads(0)["w"]}, NamedSharding(mesh, P("x")))
    tx = paged_optax.scale_by_paged_adam8bit()
    update = jax.jit(tx.update)
    expected, state = jax.block_until_ready(update(params, tx.init(params), params))
    release(state)
    for after in range(4):
        state = tx.init(params)
        hooks.fail_call("cudaMemcpy", NO_MEMORY, after=after)
        with pytest.raises(RAISES):
            jax.block_until_ready(update(params, state, params))
        assert not hooks.withdraw_failure()
        actual, state = jax.block_until_ready(update(params, state, params))
        assert_trees_equal(actual, expected)
        moments(state)
        release(state)
