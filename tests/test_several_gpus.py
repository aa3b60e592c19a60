"""Two cards, each with its own moments: budgets, moves, refusals, other numbers of cards.

What needs no GPU runs on two CPU devices as well. No test fills a card: budgets and headroom make
the pressure.
"""

import concurrent.futures
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import paged_optax
from helpers import RAISES, assert_trees_equal, free_device_bytes, hooks, make_tree
from paged_optax import Paging, Quantization, evict, memory_report, moments, prefetch, release

MIB = 2**20
DYNAMIC = Quantization("dynamic")  # without random bits, which would depend on the cuts

# Cut along the first dimension into whole blocks of 256 elements, but for the replicated leaf.
SHAPES = {"w": (4096, 2048), "b": (8192,), "scale": (64,)}
SMALL = {"w": (128, 1024), "b": (8192,), "scale": (64,)}
SPECS = {"w": P("x"), "b": P("x"), "scale": P()}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def devices(request):
    """Two devices."""
    found = jax.devices(request.param)
    if len(found) < 2:
        pytest.skip("there is only one GPU")
    return found[:2]


@pytest.fixture
def gpus():
    """Two GPUs."""
    found = jax.devices("gpu")
    if len(found) < 2:
        pytest.skip("there is only one GPU")
    return found[:2]


def put_on(devices, kind="Auto"):
    """A function that cuts a tree over these devices."""
    kinds = (AxisType[kind],)
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=kinds, devices=devices)
    return lambda tree: {
        k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()
    }


class Run:
    """A training that can be stopped between steps, saved, and moved to other devices."""

    def __init__(self, devices, quantization=DYNAMIC, shapes=SHAPES, **paging):
        self.shapes, self.steps, self.put = shapes, 0, put_on(devices)
        self.tx = paged_optax.paged_adamw8bit(
            1e-2, quantization=quantization, non_finite="skip_step", paging=Paging(**paging)
        )
        self.params = self.put(make_tree(0, shapes))
        self.state = jax.jit(self.tx.init)(self.params)

        @jax.jit
        def step(params, state, grads):
            updates, state = self.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.update = step

    def step(self, count=1):
        for _ in range(count):
            self.steps += 1
            self.take(make_tree(self.steps, self.shapes))
        return self

    def take(self, grads):
        self.params, self.state = self.update(self.params, self.state, self.put(grads))

    def skip(self):
        """A step that changes nothing; it fills the memory of restored moments."""
        self.take({k: np.full(s, np.nan, np.float32) for k, s in self.shapes.items()})
        return self

    def to(self, devices, path):
        """The run as it goes on elsewhere, through a file of moments."""
        paged_optax.save_moments(self.state, path)
        there = Run(devices, shapes=self.shapes)
        there.tx, there.update, there.steps = self.tx, self.update, self.steps
        there.params = there.put(jax.device_get(self.params))
        fresh, there.state = there.state, paged_optax.load_moments(there.state, path)
        release(fresh)
        return there

    @property
    def report(self):
        return memory_report(self.state).devices

    def results(self):
        return jax.device_get(self.params), moments(self.state)


@pytest.mark.parametrize("name", ["dynamic", "ratio"])
def test_checkpoints_from_two_devices_to_one_and_back(devices, name, tmp_path):
    """Blocks coincide, so moments keep every bit; `dynamic` also goes on with the same bits."""
    run = Run(devices, Quantization(name), SMALL).step(3)
    for count in 1, 2, 1:
        before = run.results()
        run = run.to(devices[:count], tmp_path / f"{count}.safetensors").skip()
        assert_trees_equal(run.results(), before)
        assert len(run.report) == count
        run.step()
    if name == "dynamic":
        assert_trees_equal(run.results(), Run(devices, shapes=SMALL).step(6).results())


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_steps_in_place_on_two_devices(devices, kind, rounding):
    """bfloat16 parameters step in the memory of those that were donated, without a collective.

    One device gives the same moments and parameters. Residuals are rounded with random bits, which
    depend on the cuts: with them the last digit of a parameter may differ.

    `benchmarks/fsdp.py` trains like this.
    """
    tx = paged_optax.paged_adamw8bit(1e-2, quantization=DYNAMIC, param_rounding=rounding)
    trees = [
        {k: x.astype(jnp.bfloat16) for k, x in make_tree(step, SMALL).items()} for step in range(4)
    ]

    step = jax.jit(functools.partial(paged_optax.apply_gradients, tx), donate_argnums=(1, 2))

    def run(some):
        put = put_on(some, kind)
        params = put(trees[0])
        state = jax.jit(tx.init)(params)
        program = step.lower(params, state, params).compile()
        for grads in trees[1:]:
            params, state = step(put(grads), state, params)
        return jax.device_get(params), moments(state), program

    params, kept, program = run(devices)
    expected, expected_kept, _ = run(devices[:1])
    assert_trees_equal(kept, expected_kept)
    for name, param in params.items():
        param, wanted = np.float32(param), np.float32(expected[name])
        digit = 2.0**-7 * (rounding == "compensated")
        np.testing.assert_allclose(param, wanted, rtol=digit, atol=1e-3 * digit)
    assert not [name for name in COLLECTIVES if name in program.as_text()]
    mine = sum(x.nbytes for x in trees[0].values()) // 2  # of one device
    assert program.memory_analysis().alias_size_in_bytes >= mine


def test_saves_while_another_state_is_trained(devices, tmp_path):
    """Neither waits for the other: a GPU may wait, in a collective, for what the other one runs."""
    both = [Run(devices, shapes=SMALL).step(2) for _ in range(2)]
    other, num_steps = Run(devices, shapes=SMALL), 60
    state = [run.state for run in both]
    expected, num_saves = paged_optax.export_moments(state), 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        training = pool.submit(other.step, num_steps)
        while not training.done():
            paged_optax.save_moments(state, tmp_path / "moments.safetensors")
            assert_trees_equal(paged_optax.export_moments(state), expected)
            num_saves += 1
        training.result()
    assert num_saves
    assert_trees_equal(other.results(), Run(devices, shapes=SMALL).step(num_steps).results())


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["managed", "pinned"])
@pytest.mark.parametrize("budget", [0, 5 * MIB, 64 * MIB], ids="{} bytes".format)
def test_budget_is_each_cards_own(gpus, budget, memory):
    """Each card keeps as much as the budget says, and no bit depends on it."""
    run = Run(gpus, device_bytes=budget, memory=memory).step(4)
    for device in run.report:
        assert (device.memory, device.budget) == (memory, budget)
        assert device.resident == min(device.total, budget // (2 * MIB) * 2 * MIB)
    assert run.report[0].total == run.report[1].total >= 2 * 2048 * 2048
    assert_trees_equal(run.results(), Run(gpus[:1]).step(4).results())


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["managed", "pinned"])
def test_evict_and_prefetch_on_all_cards(gpus, memory):
    run = Run(gpus, memory=memory).step(2)
    total = memory_report(run.state).total
    for _ in range(3):
        assert evict(run.state) == total
        run.step()
        assert [device.resident for device in run.report] == [0, 0]
        assert prefetch(run.state) == total
        run.step()
        assert [device.on_host for device in run.report] == [0, 0]
    assert [device.moved for device in run.report] == [3 * total, 3 * total]
    assert_trees_equal(run.results(), Run(gpus[:1]).step(8).results())


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["managed", "pinned"])
@pytest.mark.parametrize("pressed", [0, 1])
def test_moments_leave_only_the_card_that_is_short(gpus, pressed, memory):
    """Something takes memory of one card beyond the headroom; the other card does not notice."""
    Run(gpus).step()  # so that both cards have what CUDA, NCCL and the kernels take
    headroom = min(free_device_bytes(i) for i in range(2)) - 300 * MIB
    run = Run(gpus, memory=memory, headroom_bytes=headroom).step(3)
    assert [device.on_host for device in run.report] == [0, 0]
    size = free_device_bytes(pressed) - headroom + 100 * MIB

    def settle(expected):
        end = time.monotonic() + 20
        while [device.on_host for device in run.report] != expected and time.monotonic() < end:
            run.step()
            time.sleep(0.005)
        assert [device.on_host for device in run.report] == expected

    taken = hooks.take_device_memory(pressed, size)
    settle([device.total * (i == pressed) for i, device in enumerate(run.report)])
    del taken
    settle([0, 0])
    assert_trees_equal(run.results(), Run(gpus[:1]).step(run.steps).results())


@pytest.mark.gpu
def test_a_refused_state_changes_nothing_on_any_card(gpus):
    """Both cards refuse an old state, and the newest one goes on."""
    run = Run(gpus).step(2)
    old = run.params, run.state
    run.step()
    expected, newest = run.results(), (run.params, run.state)
    run.params, run.state = old
    with pytest.raises(RAISES, match="not the newest"):
        run.take(make_tree(9, SHAPES))
        jax.block_until_ready(run.state)
        memory_report(run.state)
    run.params, run.state = newest
    assert_trees_equal(run.results(), expected)
    assert_trees_equal(run.step().results(), Run(gpus[:1]).step(4).results())
