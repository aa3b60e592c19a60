"""The optimizer inside Flax: nnx and its transformations, linen, and where its state is found.

The oracle is the same optimizer without Flax's: plain optax on the model's parameters.
"""

import copy
import functools
import pickle

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import paged_optax
import paged_optax.flax
from helpers import (
    RAISES,
    assert_found_and_freed,
    assert_trees_close,
    assert_trees_equal,
    finish,
    without_free,
)
from paged_optax import memory_report, moments, paged_adamw8bit, release

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("device", "standard_promotion")]

NUM_STEPS = 5


# --- nnx: every way to train gives the losses and the moments of plain optax --------------------


class Mlp(nnx.Module):
    def __init__(self, rngs, linear=nnx.Linear):
        self.layers = nnx.List([linear(64, 96, rngs=rngs), linear(96, 64, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))


def low_rank_linear(din, dout, rngs):
    return nnx.LoRALinear(din, dout, lora_rank=64, rngs=rngs)


def make_model(wrt=nnx.Param):
    return Mlp(nnx.Rngs(0), low_rank_linear if wrt is nnx.LoRAParam else nnx.Linear)


def make_clipped(**options):
    # Random bits of the ratio code follow from the names of leaves, and nnx has two kinds of names.
    options = {"quantization": paged_optax.Quantization("dynamic")} | options
    return optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(1e-2, **options))


def make(wrt=nnx.Param, **options):
    model = make_model(wrt)
    return model, nnx.Optimizer(model, make_clipped(**options), wrt=wrt)


def target(model):
    x = jax.random.normal(jax.random.key(1), (16, 64))
    return jnp.mean((model(x) - jnp.sin(x)) ** 2)


def step(model, optimizer):
    loss, grads = nnx.value_and_grad(target, argnums=nnx.DiffState(0, optimizer.wrt))(model)
    optimizer.update(model, grads)
    return loss


def train_with(step, model, optimizer):
    return [step(model, optimizer) for _ in range(NUM_STEPS)], optimizer


def eager(wrt):
    return train_with(step, *make(wrt))


def jit(wrt):
    return train_with(nnx.jit(step), *make(wrt))


def jit_and_donate(wrt):
    return train_with(nnx.jit(step, donate_argnums=(0, 1)), *make(wrt))


def created_under_jit(wrt):
    return train_with(nnx.jit(step), *nnx.jit(functools.partial(make, wrt))())


def created_under_eval_shape(wrt):
    """The structure from shapes alone, the values from elsewhere, as when a model is restored."""
    shapes = nnx.eval_shape(functools.partial(make, wrt))
    model, optimizer = nnx.merge(nnx.graphdef(shapes), nnx.state(make(wrt)))
    return train_with(nnx.jit(step), model, optimizer)


def split_and_merge(wrt):
    """Flax's functional style: `jax.jit` over what `nnx.split` returns."""
    graphdef, state = nnx.split(make(wrt))

    @jax.jit
    def functional_step(state):
        both = nnx.merge(graphdef, state)
        return step(*both), nnx.state(both)

    losses = []
    for _ in range(NUM_STEPS):
        loss, state = functional_step(state)
        losses.append(loss)
    return losses, nnx.merge(graphdef, state)[1]


def through_pure_dicts(wrt):
    """Each step by objects of its own, which get their values from a dict."""
    jitted, losses, skeleton = nnx.jit(step), [], make(wrt)
    values = nnx.to_pure_dict(nnx.state(skeleton))
    for _ in range(NUM_STEPS):
        both = nnx.clone(skeleton)
        state = nnx.state(both)
        nnx.replace_by_pure_dict(state, values)
        nnx.update(both, state)
        losses.append(jitted(*both))
        values = nnx.to_pure_dict(nnx.state(both))
    return losses, both[1]


def cached_partial(wrt):
    model, optimizer = make(wrt)
    jitted = nnx.cached_partial(nnx.jit(step), model, optimizer)
    return [jitted() for _ in range(NUM_STEPS)], optimizer


def scan(wrt):
    model, optimizer = make(wrt)

    @nnx.jit
    @nnx.scan(length=NUM_STEPS, in_axes=(nnx.Carry,), out_axes=(nnx.Carry, 0))
    def steps(both):
        loss = step(*both)
        return both, loss

    return steps((model, optimizer))[1], optimizer


def fori_loop(wrt):
    def body(i, carry):
        model, optimizer, losses = carry
        return model, optimizer, losses.at[i].set(step(model, optimizer))

    model, optimizer = make(wrt)
    carry = model, optimizer, jnp.zeros(NUM_STEPS)
    return nnx.fori_loop(0, NUM_STEPS, body, carry)[2], optimizer


def skipped_by_cond(wrt):
    @nnx.jit
    def maybe_step(wanted, model, optimizer):
        return nnx.cond(wanted, step, lambda model, optimizer: jnp.nan, model, optimizer)

    model, optimizer = make(wrt)
    losses = [maybe_step(i % 2 == 1, model, optimizer) for i in range(2 * NUM_STEPS)]
    return losses[1::2], optimizer


def remat(wrt):
    return train_with(nnx.jit(nnx.remat(step)), *make(wrt))


def model_and_optimizer(wrt):
    @nnx.jit
    def step(optimizer):
        loss, grads = nnx.value_and_grad(target, argnums=nnx.DiffState(0, wrt))(optimizer.model)
        optimizer.update(grads)
        return loss

    optimizer = nnx.ModelAndOptimizer(make_model(wrt), make_clipped(), wrt=wrt)
    return [step(optimizer) for _ in range(NUM_STEPS)], optimizer


WAYS = [
    eager,
    jit,
    jit_and_donate,
    created_under_jit,
    created_under_eval_shape,
    split_and_merge,
    through_pure_dicts,
    cached_partial,
    scan,
    fori_loop,
    skipped_by_cond,
    remat,
    model_and_optimizer,
]


@functools.cache
def train_plainly(wrt, device):
    """Losses and moments of plain optax on the model's parameters."""
    del device  # for the cache
    graphdef, params, rest = nnx.split(make_model(wrt), wrt, ...)
    tx = make_clipped()
    state = tx.init(params)

    def body(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: target(nnx.merge(graphdef, p, rest)))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (_, state), losses = jax.lax.scan(body, (params, state), length=NUM_STEPS)
    return losses, moments(state)


CASES = [(way, nnx.Param) for way in WAYS] + [(jit_and_donate, nnx.LoRAParam)]
NUM_BYTES = 2 * 64 * 64 // 256 * 520  # of the kernels, in 8 bits, at least


@pytest.mark.parametrize("way, wrt", CASES, ids=lambda case: case.__name__)
def test_nnx_optimizer(way, wrt, device):
    losses, optimizer = way(wrt)
    expected, expected_moments = train_plainly(wrt, device)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    assert losses[-1] < losses[0] / 2
    assert optimizer.step[...] == NUM_STEPS

    found = moments(optimizer)
    shapes = jax.tree.map(np.shape, nnx.to_pure_dict(nnx.state(make_model(wrt), wrt)))
    assert jax.tree.map(np.shape, nnx.to_pure_dict(found.mu)) == shapes
    # A sum in another order may move a code by one.
    assert_trees_close(
        jax.tree.leaves(found), jax.tree.leaves(expected_moments), rtol=0.05, atol=1e-4
    )
    assert_found_and_freed(optimizer, NUM_BYTES)


@pytest.mark.parametrize("accumulate", [optax.MultiSteps, paged_optax.MultiSteps])
def test_nnx_accumulation(accumulate, device):
    """Two micro-steps in the same model have the same gradients."""
    replay = accumulate is optax.MultiSteps
    model = make_model()
    tx = accumulate(make_clipped(replay=replay), 2).gradient_transformation()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    jitted = nnx.jit(step)
    losses = [jitted(model, optimizer) for _ in range(2 * NUM_STEPS)]
    np.testing.assert_array_equal(losses[::2], losses[1::2])
    np.testing.assert_allclose(losses[::2], train_plainly(nnx.Param, device)[0], rtol=1e-3)
    assert_found_and_freed(optimizer, NUM_BYTES * (1 + replay))


def test_nnx_learning_rate_is_set_from_outside():
    model = make_model()
    tx = optax.inject_hyperparams(paged_adamw8bit)(learning_rate=1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    jitted = nnx.jit(step)
    first, second = jitted(model, optimizer), jitted(model, optimizer)
    assert second < first
    optimizer.opt_state.hyperparams["learning_rate"][...] = 0.0
    third, fourth = jitted(model, optimizer), jitted(model, optimizer)
    assert third == fourth
    assert_found_and_freed(optimizer, NUM_BYTES)


# --- nnx: forks, skipped steps, shapes, vmap and gradients --------------------------------------


@pytest.mark.parametrize("copy", [nnx.clone, copy.deepcopy], ids=["nnx.clone", "deepcopy"])
def test_copy_of_an_nnx_optimizer_is_a_fork(copy, device):
    model, optimizer = make()
    step(model, optimizer)
    other = copy(optimizer)
    step(model, other)
    jax.block_until_ready(nnx.state(other))  # the first one is the newest until that has run
    with pytest.raises(RuntimeError, match="not the newest"):
        moments(optimizer)
    if device.platform == "cpu":  # a GPU reports a refused step with the next call: test_gpu.py
        with pytest.raises(RAISES, match="not the newest.*forked"):
            # The loss does not wait for the update, nor does an update of the model.
            step(nnx.clone(model), optimizer)
            finish(nnx.state(optimizer))
    step(model, other)
    assert moments(other)
    release(other)


def test_replay_lets_a_copy_of_an_nnx_optimizer_try_a_step():
    """For a look ahead that is then thrown away."""
    model, optimizer = make(replay=True)
    step(model, optimizer)
    before = moments(optimizer)
    step(nnx.clone(model), nnx.clone(optimizer))
    assert_trees_equal(moments(optimizer), before)
    step(model, optimizer)
    assert moments(optimizer)
    release(optimizer)


def test_nnx_step_that_is_not_finite_is_skipped():
    """`jnp.where` over the whole state of model and optimizer."""

    @nnx.jit
    def careful_step(model, optimizer, scale):
        old = jax.tree.map(jnp.copy, nnx.state((model, optimizer)))
        loss, grads = nnx.value_and_grad(target)(model)
        optimizer.update(model, jax.tree.map(lambda g: g * scale, grads))
        new = nnx.state((model, optimizer))
        choose = functools.partial(jnp.where, jnp.isfinite(scale))
        nnx.update((model, optimizer), jax.tree.map(choose, new, old))
        return loss

    def train(scales):
        model, optimizer = make(replay=True)
        for scale in scales:
            careful_step(model, optimizer, jnp.float32(scale))
        result = nnx.state(model), moments(optimizer)
        release(optimizer)
        return result

    assert_trees_equal(train([np.nan, 1, np.inf, np.nan, 1, 1, np.nan]), train([1, 1, 1]))


def test_shapes_of_an_nnx_optimizer_have_no_moments():
    _, optimizer = nnx.eval_shape(make)
    for question in (moments, memory_report, release):
        with pytest.raises(TypeError, match="shapes and no values.*pass one that init or update"):
            question(optimizer)
    assert nnx.eval_shape(step, *make()).shape == ()


def test_nnx_vmap():
    @nnx.vmap
    def make_many(key):
        model = Mlp(nnx.Rngs(key))
        return model, nnx.Optimizer(model, make_clipped(), wrt=nnx.Param)

    with pytest.raises(NotImplementedError, match="cannot be vmapped"):
        make_many(jax.random.split(jax.random.key(0), 3))


def test_nnx_gradient_through_a_step():
    def loss_after_a_step(model, optimizer):
        step(model, optimizer)
        return target(model)

    with pytest.raises(TypeError, match="cannot be differentiated"):
        nnx.grad(loss_after_a_step)(*make())


# --- In place: the classes of paged_optax.flax --------------------------------------------------


@pytest.mark.parametrize("donate", [(), (0, 1)], ids=["kept", "donated"])
def test_nnx_in_place(donate):
    """The losses, the model and the whole state of nnx.Optimizer."""

    def run(cls):
        model = make_model()
        optimizer = cls(model, make_clipped(), wrt=nnx.Param)
        losses, _ = train_with(nnx.jit(step, donate_argnums=donate), model, optimizer)
        return losses, optimizer

    ours, optimizer = run(paged_optax.flax.Optimizer)
    theirs, other = run(nnx.Optimizer)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert optimizer.step[...] == other.step[...] == NUM_STEPS
    assert jax.tree.structure(nnx.state(optimizer)) == jax.tree.structure(nnx.state(other))


def test_nnx_in_place_of_model_and_optimizer():
    optimizer = paged_optax.flax.ModelAndOptimizer(make_model(), make_clipped(), wrt=nnx.Param)
    assert isinstance(optimizer, nnx.ModelAndOptimizer)
    losses = []
    for _ in range(NUM_STEPS):
        loss, grads = nnx.value_and_grad(target)(optimizer.model)
        losses.append(loss)
        assert optimizer.update(grads) is None
    np.testing.assert_allclose(losses, jit(nnx.Param)[0], rtol=1e-4)


def test_nnx_in_place_is_saved():
    """With its moments, as any nnx.Optimizer: pickle carries them in the pure state."""

    def make_optimizer(model):
        return paged_optax.flax.Optimizer(model, make_clipped(), wrt=nnx.Param)

    model = make_model()
    optimizer = make_optimizer(model)
    train_with(step, model, optimizer)
    data = pickle.dumps((nnx.to_pure_dict(nnx.state(model)), nnx.as_pure(optimizer.opt_state)))
    other = make_model()
    restored = make_optimizer(other)
    params, opt_state = pickle.loads(data)
    nnx.update(other, params)
    nnx.update(restored.opt_state, nnx.state(opt_state))
    ours, theirs = (train_with(step, *x)[0] for x in ((model, optimizer), (other, restored)))
    np.testing.assert_array_equal(ours, theirs)


def test_linen_in_place(device):
    """The losses and the whole state of linen's TrainState, also from its bytes."""

    def run(cls, saved=False):
        state, losses = make_train_state(make_clipped(), device, cls), []
        for i in range(NUM_STEPS):
            if saved and i == 3:
                data = flax.serialization.to_bytes(state)
                fresh = make_train_state(make_clipped(), device, cls)
                state = flax.serialization.from_bytes(fresh, data)
            state, loss = linen_step(state)
            losses.append(loss)
        return losses, state

    ours, state = run(paged_optax.flax.TrainState)
    theirs, other = run(TrainState)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert state.step == other.step == NUM_STEPS
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(other.opt_state)
    np.testing.assert_array_equal(run(paged_optax.flax.TrainState, saved=True)[0], ours)


def test_linen_in_place_with_fp8(device):
    """Flax overwrites this collection with its gradients, and gives it no optimizer."""
    name = flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT
    params = {"params": {"w": jnp.ones((8, 8))}, name: {"scale": jnp.ones(1)}}
    grads = {"params": {"w": jnp.ones((8, 8))}, name: {"scale": jnp.full(1, 3.0)}}

    def run(cls):
        state = cls.create(apply_fn=None, params=params, tx=make_clipped())
        return state.apply_gradients(grads=grads).params

    assert_trees_close(run(paged_optax.flax.TrainState), run(TrainState))


# --- linen --------------------------------------------------------------------------------------


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64)(nn.relu(nn.Dense(96)(x)))


@functools.cache
def dense_params(device):
    del device  # for the cache
    return Dense().init(jax.random.key(0), jnp.ones((1, 64)))["params"]


def make_train_state(tx, device, cls=TrainState, **fields):
    params = jax.tree.map(jnp.copy, dense_params(device))
    return cls.create(apply_fn=Dense().apply, params=params, tx=tx, **fields)


def loss_of(state, params):
    return target(lambda x: state.apply_fn({"params": params}, x))


@functools.partial(jax.jit, donate_argnums=0)
def linen_step(state):
    loss, grads = jax.value_and_grad(functools.partial(loss_of, state))(state.params)
    return state.apply_gradients(grads=grads), loss


def test_linen_train_state(device):
    def run(tx):
        state = make_train_state(tx, device)
        losses = []
        for _ in range(30):
            state, loss = linen_step(state)
            losses.append(loss)
        return state, losses

    state, losses = run(make_clipped())
    clip = optax.clip_by_global_norm(1.0)
    _, expected = run(optax.chain(clip, optax.adamw(1e-2)))
    np.testing.assert_allclose(losses, expected, rtol=0.05)
    assert jax.tree.map(np.shape, moments(state).nu) == jax.tree.map(np.shape, state.params)
    assert_found_and_freed(state, 2 * 64 * 96 // 256 * 520)


class ScaledTrainState(TrainState):
    dynamic_scale: DynamicScale


def apply_and_select(state, grads, finite):
    """As Flax's examples do it."""
    new = state.apply_gradients(grads=grads)
    choose = functools.partial(jnp.where, finite)
    return new.replace(
        params=jax.tree.map(choose, new.params, state.params),
        opt_state=jax.tree.map(choose, new.opt_state, state.opt_state),
    )


def apply_under_cond(state, grads, finite):
    return jax.lax.cond(
        finite,
        lambda: state.apply_gradients(grads=grads),
        lambda: state.replace(step=state.step + 1),
    )


def train_with_dynamic_scale(tx, apply, device):
    """Parameters, state, and whether each step was finite."""
    scale = DynamicScale(growth_interval=2, scale=2.0**18)  # overflows, and again after growing
    state = make_train_state(tx, device, ScaledTrainState, dynamic_scale=scale)

    @jax.jit
    def scaled_step(state):
        def loss(params):
            # As a cast to float16 and back, but no compiler may leave it out.
            return jax.lax.reduce_precision(loss_of(state, params), 5, 10)

        scale, finite, _, grads = state.dynamic_scale.value_and_grad(loss)(state.params)
        return apply(state, grads, finite).replace(dynamic_scale=scale), finite

    finite = []
    for _ in range(10):
        state, was_finite = scaled_step(state)
        finite.append(bool(was_finite))
    return state, finite


@functools.cache
@jax.default_matmul_precision("highest")
def adamw_with_dynamic_scale(device):
    state, finite = train_with_dynamic_scale(optax.adamw(1e-3), apply_and_select, device)
    return state.params, finite


DYNAMIC_SCALE = {
    "jnp.where, replay": (apply_and_select, {"replay": True}),
    "jax.lax.cond": (apply_under_cond, {}),
}


@pytest.mark.parametrize("apply, options", DYNAMIC_SCALE.values(), ids=DYNAMIC_SCALE)
@jax.default_matmul_precision("highest")
def test_dynamic_scale(apply, options, device):
    float32 = paged_optax.Quantization(min_size=1 << 20)
    tx = paged_adamw8bit(1e-3, quantization=float32, **options)
    state, finite = train_with_dynamic_scale(tx, apply, device)
    expected, expected_finite = adamw_with_dynamic_scale(device)
    assert finite == expected_finite
    assert not finite[0] and True in finite
    assert False in finite[finite.index(True) :]
    assert_trees_close(state.params, expected, atol=1e-5)
    assert int(state.opt_state[0].count) == sum(finite)
    assert int(state.step) == len(finite)
    release(state)


def test_dynamic_scale_needs_replay(device):
    if device.platform != "cpu":
        pytest.skip("a GPU reports a refused step with the next call: test_gpu.py")
    with pytest.raises(RAISES, match=r"jnp.where.*replay=True"):
        state, _ = train_with_dynamic_scale(paged_adamw8bit(1e-3), apply_and_select, device)
        finish(state)


def test_linen_state_through_bytes(device):
    """In one process a token is all that is needed; in another one it is refused: test_errors.py"""
    tx = make_clipped()
    state, expected = (make_train_state(tx, device) for _ in range(2))
    for _ in range(3):
        state = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
        state, loss = linen_step(state)
        expected, expected_loss = linen_step(expected)
        assert loss == expected_loss
    assert_trees_equal(moments(state), moments(expected))
    release((state.opt_state, expected.opt_state))


# --- Where the state is found -------------------------------------------------------------------

NNX_CONTAINERS = {
    "opt_state": lambda optimizer: optimizer.opt_state,
    "nnx.state": nnx.state,
    "nnx.state of OptState": lambda optimizer: nnx.state(optimizer, nnx.OptState),
    "nnx.split": lambda optimizer: nnx.split(optimizer)[1],
    "nnx.split with a model": lambda optimizer: nnx.split((make_model(), optimizer))[1],
    "nnx.split by type": lambda optimizer: nnx.split(optimizer, nnx.OptState, ...)[1],
    "nnx.to_pure_dict": lambda optimizer: nnx.to_pure_dict(nnx.state(optimizer)),
    "tuple with a model": lambda optimizer: (make_model(), optimizer),
    "jax.device_get": lambda optimizer: jax.device_get(nnx.to_pure_dict(nnx.state(optimizer))),
}


@pytest.mark.parametrize("contain", NNX_CONTAINERS.values(), ids=NNX_CONTAINERS)
def test_state_is_found_in_what_nnx_returns(contain):
    _, optimizer = make()
    optimizer.update(make_model(), nnx.state(make_model(), nnx.Param))
    container = contain(optimizer)
    assert_trees_equal(moments(container), moments(optimizer))
    assert without_free(memory_report(container)) == without_free(memory_report(optimizer))
    assert_found_and_freed(container, NUM_BYTES)


LINEN_CONTAINERS = {
    "to_state_dict": flax.serialization.to_state_dict,
    "to_state_dict of opt_state": lambda s: flax.serialization.to_state_dict(s.opt_state),
    "FrozenDict": lambda s: flax.core.freeze(flax.serialization.to_state_dict(s)),
    "msgpack": lambda s: flax.serialization.msgpack_restore(flax.serialization.to_bytes(s)),
}


@pytest.mark.parametrize("contain", LINEN_CONTAINERS.values(), ids=LINEN_CONTAINERS)
def test_state_is_found_in_state_dicts(contain, device):
    state = make_train_state(make_clipped(), device)
    state = state.apply_gradients(grads=state.params)
    container = contain(state)
    assert_trees_equal(moments(container), moments(state))
    assert without_free(memory_report(container)) == without_free(memory_report(state))
    assert_found_and_freed(container, NUM_BYTES)


# --- Many devices -------------------------------------------------------------------------------


def test_nnx_model_on_a_mesh():
    """A kernel in shards and a bias that is not, made and trained without a word on shardings."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:8])
    x = np.ones((4, 64), np.float32)

    @nnx.jit
    def create():
        kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "x"))
        model = nnx.Linear(64, 1024, kernel_init=kernel_init, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, paged_adamw8bit(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))

    with jax.set_mesh(mesh):
        model, optimizer = create()
        for _ in range(3):
            step(model, optimizer)
    assert model.kernel[...].sharding.spec == P(None, "x")
    assert model.bias[...].sharding.spec == P()
    assert int(optimizer.step[...]) == 3
    needed = 32 * 520 + 4 * 2048  # 32 of 256 blocks of 8 bits, and the bias's 4 of float32
    devices = memory_report(optimizer).devices
    assert len(devices) == 8
    assert all(needed <= device.total < 1.2 * needed for device in devices)
