"""Steps that are under way on some devices, and done on others: nobody may look too early.

A gradient of one device comes from another state's step, which waits for a snapshot until the test
closes it. So that device has not run the step, however long the others have.
"""

import concurrent.futures
import contextlib
import os
import pickle
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import assert_trees_equal, ext, finish, raise_if_refused, run_python, token_of
from paged_optax import (
    StateRefused,
    evict,
    export_moments,
    import_moments,
    memory_report,
    moments,
    newest,
    paged_adamw8bit,
    release,
    release_all,
    save_moments,
    states,
)

TX = paged_adamw8bit(1e-2)
LATE = 3  # the device that is behind


@jax.jit
def step(params, state, grads):
    updates, state = TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state


class Held:
    """Gradients of which the last device's part is not there before `let_go`."""

    def __init__(self, devices):
        self._devices = devices
        mesh = jax.sharding.Mesh(np.array(devices), ("x",))
        self._shape, self._sharding = (len(devices) * 64, 128), NamedSharding(mesh, P("x"))
        self.params = {"w": jax.device_put(jnp.ones(self._shape), self._sharding)}
        self.ready = {"w": jax.device_put(jnp.full(self._shape, 0.5), self._sharding)}
        self._snapshot = None

    def hold(self):
        """From here on the last device starts no other program."""
        parts = [shard.data for shard in self.ready["w"].addressable_shards]
        with jax.default_device(self._devices[-1]):
            other = finish(TX.update(parts[-1], TX.init(parts[-1]), parts[-1]))[1]
            big = finish(jnp.ones((512, 512)))
            self._snapshot = ext.snapshot("cpu", len(self._devices) - 1, *token_of(other))
            parts[-1], _ = jax.jit(self._pass_on)(parts[-1], other, big)
        return {"w": jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)}

    def _pass_on(self, x, other, big):
        # With a small product the main thread would run the program itself.
        return x + 0 * TX.update(x, other, x)[0], big @ big

    def let_go(self):
        if self._snapshot is not None:
            self._snapshot.close()


@contextlib.contextmanager
def held(num_devices=LATE + 1):
    """`Held`, which is let go at the end at the latest."""
    gradients = Held(jax.devices("cpu")[:num_devices])
    try:
        yield gradients
    finally:
        gradients.let_go()


def trained(gradients, num_steps=2):
    params, state = gradients.params, TX.init(gradients.params)
    for _ in range(num_steps):
        params, state = finish(step(params, state, gradients.ready))
    return params, state


def waits(function, gradients):
    """What a function returns that has to wait for the step under way."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        result = pool.submit(function)
        try:
            assert not concurrent.futures.wait([result], timeout=0.2).done
        finally:
            gradients.let_go()
        return result.result()


@pytest.mark.fast
@pytest.mark.parametrize("num_devices", [1, LATE + 1])
@pytest.mark.parametrize("newest_is_known", [True, False])
def test_release_waits(num_devices, newest_is_known):
    """No device may find its moments gone: it would refuse a step that others have run."""
    other = finish(
        TX.update(jnp.ones((64, 128)), TX.init(jnp.ones((64, 128))), jnp.ones((64, 128)))
    )
    with held(num_devices) as gradients:
        params, before = trained(gradients)
        _, after = step(params, before, gradients.hold())
        assert waits(lambda: release(after if newest_is_known else before), gradients) > 0
        jax.block_until_ready(after)
    raise_if_refused()
    assert moments(other[1]).mu.shape == (64, 128)


def test_release_of_an_entry_and_of_all_wait():
    for free in (lambda: release(states()), release_all):
        with held() as gradients:
            params, state = trained(gradients)
            result = step(params, state, gradients.hold())
            waits(free, gradients)
            jax.block_until_ready(result)
        raise_if_refused()


def test_steps_of_an_nnx_optimizer_are_waited_for():
    """Its token is in a variable, which gets it when the program is under way."""
    with held() as gradients:

        class Model(nnx.Module):
            def __init__(self):
                self.w = nnx.Param(gradients.params["w"])

        model = Model()
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)

        @nnx.jit
        def train_step(model, optimizer, grads):
            optimizer.update(model, nnx.state({"w": nnx.Param(grads)}, nnx.Param))

        train_step(model, optimizer, gradients.ready["w"])
        train_step(model, optimizer, gradients.hold()["w"])
        waits(release_all, gradients)
        jax.block_until_ready(nnx.state(optimizer))
    raise_if_refused()


def test_devices_that_refuse_later_are_told_of_together():
    """One exception stands for all devices, also where one has not come to the step yet."""
    with held() as gradients:
        params, old = trained(gradients, 1)
        finish(step(params, old, gradients.ready))
        refused = step(params, old, gradients.hold())
        while not ext.any_refused():  # the first devices have
            time.sleep(0.001)
        threading.Timer(0.1, gradients.let_go).start()
        with pytest.raises(StateRefused, match="not the newest"):
            step(*refused, gradients.ready)
        jax.block_until_ready(refused)
        raise_if_refused()


def test_a_lost_first_step_is_held_by_nobody():
    with held() as gradients:
        state, spare = TX.init(gradients.params), TX.init(gradients.params)
        step(gradients.params, state, gradients.hold())
        del state
        found = waits(states, gradients)
        assert [entry.is_held for entry in found if len(entry.devices) > 1] == [False]
        assert release([entry for entry in found if not entry.is_held]) > 0
        del spare


@pytest.mark.fast
@pytest.mark.parametrize("which", ["another", "the same"])
@pytest.mark.parametrize("carry", ["flax", "pickle"])
def test_a_refusal_keeps_nobody_from_carrying_moments(carry, which):
    """They were left out without a word, and the refusal was forgotten."""
    grads = {"w": jnp.full((64, 128), 0.5)}
    state = finish(TX.update(grads, TX.init(grads), grads))[1]
    old = state if which == "the same" else finish(TX.update(grads, TX.init(grads), grads))[1]
    state = finish(jax.jit(TX.update)(grads, state, grads))[1]
    if which == "another":
        finish(jax.jit(TX.update)(grads, old, grads))
    jax.block_until_ready(jax.jit(TX.update)(grads, old, grads))  # is refused
    if carry == "flax":
        carried = serialization.from_state_dict(state, serialization.to_state_dict(state))
    else:
        carried = pickle.loads(pickle.dumps(state))
    assert ext.any_refused()
    assert newest(state)[0].count == 2
    with pytest.raises(StateRefused) if which == "another" else contextlib.nullcontext():
        memory_report(state)  # says so of whatever state, unless newest was asked about it
    np.testing.assert_array_equal(moments(carried).mu["w"], moments(state).mu["w"])


def test_a_restored_state_is_saved_whole():
    """Its first step has filled the moments of the first devices, and not yet those of the last."""
    with held() as gradients:
        tx = paged_adamw8bit(1e-2, replay=True)
        step = jax.jit(tx.update)
        args = gradients.ready, tx.init(gradients.params), gradients.params
        arrays = export_moments(finish(step(*args))[1])
        mesh = gradients.params["w"].sharding.mesh
        state = import_moments(tx.init(gradients.params), arrays)
        state = jax.device_put(state, NamedSharding(mesh, P()))
        after = step(gradients.hold(), state, gradients.params)
        again = waits(lambda: export_moments(state), gradients)
        jax.block_until_ready(after)
    assert_trees_equal(again, arrays)


def test_a_save_looks_at_states_once(tmp_path):
    """Another thread may have put one in their place whose step waits for the save."""

    class Trainer:
        looks = 0

        @property
        def opt_state(self):
            self.looks += 1
            return state

    grads = {"w": jnp.ones((64, 128))}
    state = finish(TX.update(grads, TX.init(grads), grads))[1]
    trainer = Trainer()
    save_moments(trainer, tmp_path / "moments.safetensors")
    assert trainer.looks == 1


@pytest.mark.parametrize("free", ["release", "release_all"])
def test_a_finalizer_that_runs_in_a_save(free, tmp_path, monkeypatch):
    """It does not wait for steps, which may wait for the save."""
    grads = {"w": jnp.ones((64, 128))}
    state, other = (finish(TX.update(grads, TX.init(grads), grads))[1] for _ in range(2))
    freed, replace = [], os.replace

    def finalize_and_replace(*args):
        with pytest.raises(ValueError, match="no paged optimizer state"):
            release({"x": 1})
        with pytest.raises(RuntimeError, match="outside of it"):
            evict(other)
        freed.append(release(other) if free == "release" else release_all())
        replace(*args)

    monkeypatch.setattr(os, "replace", finalize_and_replace)
    save_moments(state, tmp_path / "moments.safetensors")
    assert freed == [0]
    assert token_of(other)[0] not in {entry.handle for entry in states()}
    assert (token_of(state)[0] in {e.handle for e in states()}) == (free == "release")


def test_others_may_step_for_ever_while_states_are_listed():
    """Whoever waits for the steps under way waits for those of now."""
    stop = threading.Event()

    def work():
        grads = {"w": jnp.ones((512, 512))}
        params, state = grads, TX.init(grads)
        while not stop.is_set():
            params, state = step(params, state, grads)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            states()
    finally:
        stop.set()
        thread.join()
    raise_if_refused()


@pytest.mark.parametrize(
    "ask", ["release_all()", "release(old)", "states()", "release(state)", "moments(state)"]
)
def test_a_child_does_not_wait_for_its_parent(ask, tmp_path):
    """A step of the parent that is under way at a fork never ends in the child."""
    code = f"""
    import os, signal, jax, jax.numpy as jnp, paged_optax
    from helpers import ext, token_of
    from paged_optax import *
    tx = scale_by_paged_adam8bit()
    params = {{"w": jnp.ones((64, 128))}}
    _, old = jax.block_until_ready(tx.update(params, tx.init(params)))
    def step(state, big):
        return tx.update(params, state)[1], big @ big  # not run by the main thread
    step = jax.jit(step).lower(old, jnp.ones((512, 512))).compile()
    big = jax.block_until_ready(jnp.ones((512, 512)))
    snapshot = ext.snapshot("cpu", 0, *token_of(old))
    state, _ = step(old, big)
    child = os.fork()
    if child == 0:
        signal.alarm(600)
        try:
            {ask}
        except StateRefused as error:
            assert "this one was forked from" in str(error) and "(state)" in "{ask}"
        else:
            assert "(state)" not in "{ask}"
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(status, jax.tree.leaves(state)[0].is_ready())
    snapshot.close()
    jax.block_until_ready(state)
    """
    process = run_python(code, tmp_path, options=("-W", "ignore"))
    assert process.stdout == "0 False\n"


def test_nothing_is_asked_of_jax_before_there_is_a_state(tmp_path):
    """Devices are looked for once, and `jax.distributed` has to come before that."""
    code = """
    import jax, paged_optax
    def fail(*_):
        raise AssertionError
    jax.local_devices = jax.live_arrays = fail
    print(paged_optax.release_all(), paged_optax.states())
    """
    assert run_python(code, tmp_path).stdout == "0 []\n"


def test_a_process_without_the_cpu(monkeypatch):
    """As with JAX_PLATFORMS=cuda."""
    live_arrays = jax.live_arrays

    def without_the_cpu(platform):
        if platform == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return live_arrays(platform)

    monkeypatch.setattr(jax, "live_arrays", without_the_cpu)
    state = TX.init({"w": jnp.ones((64, 128))})
    assert release(state) == 0
    assert release_all() == 0
