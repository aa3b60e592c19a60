"""Steps in place: the numbers of the reference, the ways to call them, and what is refused.

The oracle for the numbers is the NumPy reference, to the bit, or `update` and `apply_updates`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import (
    DTYPES,
    RAISES,
    Token,
    as_users_have_it,
    assert_trees_equal,
    f32,
    is_zero,
    make_tree,
    on_cpu,
    on_every_device,
    raise_if_refused,
    reference,
    residuals_of,
    run_python,
    same_bits,
    stack,
    to_jax,
)
from optimizers import BY_NAME, DESCENTS, Specification, assert_as_specified
from paged_optax import (
    MultiSteps,
    Paging,
    Quantization,
    apply_gradients,
    clip_by_global_norm,
    memory_report,
    moments,
    paged_adam8bit,
    paged_adamw8bit,
    paged_lion8bit,
    release,
    scale_by_paged_adam8bit,
    skip_non_finite,
)

pytestmark = pytest.mark.fast
every_optimizer = pytest.mark.parametrize("optimizer", DESCENTS, ids=lambda row: row.name)

SHAPES = {"b": (7,), "e": (0, 3), "g": (300,), "h": (5000,), "s": (), "v": (70, 70), "w": (64, 80)}
BFLOAT16, FLOAT16 = DTYPES["bfloat16"], DTYPES["float16"]
MIXED = {"b": f32, "e": f32, "g": FLOAT16, "h": BFLOAT16, "s": BFLOAT16, "v": FLOAT16, "w": f32}
# Every dtype of a parameter meets every dtype of a gradient.
OTHERS = {"b": FLOAT16, "e": f32, "g": BFLOAT16, "h": f32, "s": FLOAT16, "v": f32, "w": BFLOAT16}
PARAMS = make_tree(100, SHAPES, MIXED, scale=0.1)
RATE, DECAY = 0.03, 0.1


def make_grads(seed, dtypes=MIXED, num_bad=0):
    grads = make_tree(seed, SHAPES, dtypes)
    for value, name in zip([np.nan, np.inf, -np.inf, 1e30][:num_bad], "bghw", strict=False):
        grads[name].ravel()[3 * seed % grads[name].size] = value
    return grads


GRADS = [make_grads(step) for step in range(3)]


def eager(tx, params, grads):
    state = tx.init(params)
    for grad in grads:
        params, state = apply_gradients(tx, grad, state, params)
    return params, state


def jitted(tx, params, grads, donate=()):
    step = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=donate)
    state, params = tx.init(params), jax.tree.map(jnp.copy, params)
    for grad in grads:
        params, state = step(grad, state, params)
    return params, state


def scanned(tx, params, grads):
    @functools.partial(jax.jit, donate_argnums=0)
    def run(params, grads):
        def body(carry, grad):
            params, state = carry
            return apply_gradients(tx, grad, state, params), None

        return jax.lax.scan(body, (params, tx.init(params)), grads)[0]

    return run(jax.tree.map(jnp.copy, params), stack(grads))


donated = functools.partial(jitted, donate=(1, 2))
WAYS = {"eager": eager, "jit": jitted, "donated": donated, "scanned": scanned}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def separate(tx, params, grads, update=None):
    """`update` and `apply_updates`, each operation of XLA by itself."""
    state = tx.init(params)
    for grad in grads:
        updates, state = (update or tx.update)(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# --- The numbers --------------------------------------------------------------------------------


@on_every_device
@every_optimizer
@every_way
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_bits_of_the_reference(optimizer, rounding, way):
    """Parameters, moments and residuals, however a step is run."""
    tx = optimizer.descent(RATE, param_rounding=rounding)
    specification = Specification.fresh(optimizer, PARAMS, rounding=rounding)
    expected = PARAMS
    for grads in GRADS:
        expected, specification = specification.step(grads, expected, RATE, optimizer.weight_decay)
    params, state = way(tx, to_jax(PARAMS), [to_jax(grads) for grads in GRADS])
    for name, wanted in expected.items():
        same_bits(params[name], wanted, name)
    assert_as_specified(state, specification)
    if rounding == "compensated":
        for index, name in enumerate(SHAPES):
            if MIXED[name] != f32:
                kept = specification.residuals[name]
                np.testing.assert_array_equal(residuals_of(state, index)[: kept.size], kept)


@on_every_device
@pytest.mark.parametrize("format", ["ratio", "ratio6", "ratio4", "dynamic", "float32"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_gradients_of_other_dtypes(format, rounding):
    """Also bad ones, a mask for weight decay, and schedules, in every format."""
    quantization = Quantization(format, min_size=0, seed=5)
    rates = [0.5, 0.03, 2.0]  # steps of any size: no difference has to be representable
    tx = paged_adamw8bit(
        lambda count: jnp.asarray(rates, f32)[count],
        weight_decay=lambda count: f32(DECAY) * (1 + count).astype(f32),
        mask={name: name not in "gw" for name in SHAPES},
        param_rounding=rounding,
        quantization=quantization,
    )
    optimizer = BY_NAME["adamw"]
    specification = Specification.fresh(optimizer, PARAMS, quantization, rounding)
    all_grads = [make_grads(10 + i, OTHERS, num_bad=i) for i in range(3)]
    expected = PARAMS
    for i, grads in enumerate(all_grads):
        decay = f32(DECAY) * f32(1 + i)
        expected, specification = specification.step(grads, expected, rates[i], decay, "gw")
    params, state = donated(tx, to_jax(PARAMS), [to_jax(grads) for grads in all_grads])
    for name, wanted in expected.items():
        same_bits(params[name], wanted, name)
    assert_as_specified(state, specification)


@on_cpu
def test_compensated_steps_are_exact_of_any_size():
    """Parameter and residual are the master weight; `p' - p` need not be a number of the type."""
    before = make_tree(0, {"w": (600,)}, BFLOAT16)
    grads = {"w": jnp.ones(600, jnp.bfloat16)}
    tx = paged_adam8bit(1.0, param_rounding="compensated")

    def error(way):
        params, state = way(tx, to_jax(before), [grads])
        masters = reference.join_master(np.asarray(params["w"]), residuals_of(state, 0)[:600])
        return np.abs(masters - (before["w"].astype(f32) - 1)).max()

    assert error(eager) <= 2.0**-15  # 8 bits more than bfloat16 has
    assert error(separate) > 2.0**-10


# --- Equal to update and apply_updates ------------------------------------------------------------

TREE = {"w": (64, 80), "b": (40,), "n": (5,)}


def in_partition(tx, **others):
    transforms = {"paged": tx, "sgd": optax.sgd(0.1, momentum=0.9), **others}
    return optax.partition(transforms, {"w": "paged", "b": "paged", "n": "sgd"})


def _inject(**options):
    return optax.inject_hyperparams(paged_adamw8bit)(optax.linear_schedule(0.1, 0.01, 3), **options)


WRAPPED = {
    "adam": lambda: paged_adam8bit(RATE, nesterov=True),
    "adamw": lambda: paged_adamw8bit(
        RATE, weight_decay=DECAY, mask={"w": True, "b": 0 == 1, "n": True}
    ),
    "lion": lambda: paged_lion8bit(RATE),
    "a direction": scale_by_paged_adam8bit,
    "schedules": lambda: paged_adamw8bit(
        optax.linear_schedule(0.1, 0.01, 3), weight_decay=optax.linear_schedule(0.5, 0.1, 3)
    ),
    "a schedule with a mask": lambda: paged_adamw8bit(
        optax.linear_schedule(0.1, 0.01, 3),
        weight_decay=optax.linear_schedule(0.5, 0.1, 3),
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ),
    "compensated": lambda: paged_adamw8bit(RATE, param_rounding="compensated"),
    "after clipping": lambda: optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(RATE)),
    "masked": lambda: optax.masked(paged_adamw8bit(RATE), {"w": True, "b": False, "n": True}),
    "partition": lambda: in_partition(paged_adamw8bit(RATE)),
    "inject_hyperparams": _inject,
    "two in a partition": lambda: optax.partition(
        {"a": paged_adamw8bit(RATE), "b": paged_lion8bit(RATE)}, {"w": "a", "b": "b", "n": "a"}
    ),
    "named_chain": lambda: optax.named_chain(("c", optax.clip(0.5)), ("a", paged_adamw8bit(RATE))),
    "MultiSteps": lambda: MultiSteps(paged_adamw8bit(RATE), 2).gradient_transformation(),
    "MultiSteps of a partition": lambda: MultiSteps(
        in_partition(paged_adamw8bit(RATE)), 2
    ).gradient_transformation(),
    "skip_step": lambda: paged_adamw8bit(
        optax.linear_schedule(0.1, 0.01, 3), non_finite="skip_step"
    ),
    "skip_element": lambda: paged_adamw8bit(RATE, non_finite="skip_element"),
    "skip_non_finite step": lambda: skip_non_finite(
        optax.chain(optax.clip_by_global_norm(1.0), in_partition(paged_adamw8bit(RATE))), "step"
    ),
    "skip_non_finite element": lambda: skip_non_finite(
        optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(RATE)), "element"
    ),
    "replay": lambda: paged_adamw8bit(RATE, replay=True),
    "no paged optimizer": lambda: optax.sgd(0.1),
}


def some_grads(num_bad=1):
    grads = [make_tree(step, TREE) for step in range(4)]
    for i in range(num_bad):
        grads[2]["w"][3, i] = np.nan
    return [to_jax(grad) for grad in grads]


@on_every_device
@as_users_have_it
@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_equal_to_update_and_apply(make):
    """Float32 parameters, to the bit, and the whole state."""
    params = to_jax(make_tree(50, TREE))
    expected, their_state = separate(make(), params, some_grads())
    ours, state = eager(make(), params, some_grads())
    assert_trees_equal(ours, expected)
    assert_states_equal(state, their_state)
    ours, _ = donated(make(), params, some_grads())
    # Only what is not in the call may differ: XLA contracts the operations before and around it.
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)


def is_token(node):
    return isinstance(node, Token)


def assert_states_equal(state, other):
    """All but the tokens, which name other moments; and these moments."""
    assert jax.tree.structure(state) == jax.tree.structure(other)
    nodes = (jax.tree.leaves(x, is_leaf=is_token) for x in (state, other))
    for one, another in zip(*nodes, strict=True):
        if not is_token(one):
            np.testing.assert_array_equal(one, another)


@on_cpu
@pytest.mark.parametrize("mode", ["skip_step", "skip_element"])
def test_skips_leave_parameters(mode):
    tx = paged_adam8bit(RATE, non_finite=mode)
    params, grads = to_jax(make_tree(50, TREE)), some_grads(num_bad=9)
    before, state = eager(tx, params, grads[:2])
    after, state = apply_gradients(tx, grads[2], state, before)
    kept = np.isnan(grads[2]["w"]) if mode == "skip_element" else np.full((64, 80), True)
    np.testing.assert_array_equal(np.asarray(after["w"])[kept], np.asarray(before["w"])[kept])
    assert mode == "skip_step" or np.all(after["w"] != before["w"], where=~kept)
    assert state.skipped == (1 if mode == "skip_step" else 9)


@on_cpu
def test_update_and_apply_gradients_take_turns():
    """One state for both."""
    tx, params = paged_adamw8bit(RATE), to_jax(make_tree(50, TREE))
    expected, _ = separate(tx, params, some_grads(0))
    state = tx.init(params)
    for i, grad in enumerate(some_grads(0)):
        if i % 2:
            params, state = apply_gradients(tx, grad, state, params)
        else:
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
    assert_trees_equal(params, expected)


@on_cpu
def test_replay():
    """The last step may be dropped and taken again; the parameters are the caller's to keep."""
    tx, params = paged_adamw8bit(RATE, replay=True), to_jax(make_tree(50, TREE))
    step = jax.jit(functools.partial(apply_gradients, tx))
    grads = some_grads(0)
    before, state = step(grads[0], tx.init(params), params)
    params, newest = step(grads[1], state, before)
    expected = jax.device_get((params, moments(newest)))
    params, newest = step(grads[1], state, before)
    assert_trees_equal((params, moments(newest)), expected)


# --- Refused ------------------------------------------------------------------------------------

HARMFUL = {
    "scale": optax.scale(0.5),
    "schedule": optax.scale_by_schedule(lambda count: 0.9),
    "learning rate": optax.scale_by_learning_rate(0.1),
    "clip": optax.clip(1.0),
    "norm": optax.clip_by_global_norm(1.0),
    "ema": optax.ema(0.5),
    "decay": optax.add_decayed_weights(0.1),
    "zero": optax.set_to_zero(),
    "frozen": optax.masked(optax.set_to_zero(), {"w": True, "b": False, "n": False}),
    "apply_every": optax.apply_every(3),
    "trust ratio": optax.scale_by_trust_ratio(),
    "noise": optax.add_noise(0.1, 0.5, 0),
    "replaced": optax.stateless(lambda updates, params: jax.tree.map(jnp.ones_like, params)),
    "indexed": optax.stateless(lambda updates, params: jax.tree.map(lambda u: u[:], updates)),
    "asked": optax.stateless_with_tree_map(lambda u, p: u if u.ndim else -u),
    "compiled": optax.GradientTransformation(
        optax.identity().init, jax.jit(lambda updates, state, params: (updates, state))
    ),
}
AROUND = {
    "optax.MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "flatten": optax.flatten,
    "compiled": lambda tx: optax.GradientTransformation(tx.init, jax.jit(tx.update)),
    "other parameters": lambda tx: optax.GradientTransformation(
        tx.init, lambda g, s, p: tx.update(g, s, jax.tree.map(lambda x: x * 2, p))
    ),
}


@on_cpu
@as_users_have_it
@pytest.mark.parametrize("after", HARMFUL.values(), ids=HARMFUL)
def test_what_changes_updates_is_refused(after):
    """While tracing: nothing has run."""
    tx, params = optax.chain(paged_adamw8bit(RATE), after), to_jax(make_tree(50, TREE))
    state, grads = tx.init(params), some_grads(0)[0]
    match = "a transformation after a paged optimizer .* apply_gradients steps parameters in place"
    with pytest.raises((TypeError, ValueError), match=match):
        jax.jit(functools.partial(apply_gradients, tx)).trace(grads, state, params)
    updates, _ = tx.update(grads, state, params)  # it still works in the other way
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@on_cpu
@as_users_have_it
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_hides_parameters_is_refused(around):
    tx, params = around(paged_adamw8bit(RATE, replay=True)), to_jax(make_tree(50, TREE))
    state = tx.init(params)
    with pytest.raises(
        (TypeError, ValueError), match="paged_optax.MultiSteps for optax.MultiSteps"
    ):
        jax.jit(functools.partial(apply_gradients, tx)).trace(some_grads(0)[0], state, params)


@on_cpu
def test_no_parameters_no_step():
    tx = paged_adamw8bit(RATE)
    state = tx.init({"w": jnp.ones(5)})
    with pytest.raises(ValueError, match="parameter"):
        apply_gradients(tx, {"w": jnp.ones(5)}, state, None)


@on_cpu
def test_vmap_and_derivatives_are_refused():
    tx, params = paged_adamw8bit(RATE), to_jax(make_tree(50, TREE))
    state, grads = tx.init(params), some_grads(0)[0]
    with pytest.raises(NotImplementedError, match="cannot be vmapped"):
        jax.vmap(lambda g: apply_gradients(tx, g, state, params))(stack([grads] * 2))
    with pytest.raises(TypeError, match="cannot be differentiated"):
        jax.grad(lambda p: jnp.sum(apply_gradients(tx, grads, state, p)[0]["w"]))(params)


@on_cpu
def test_a_refused_step_is_an_error():
    """A state that is not the newest: the error is that of `update`."""
    tx, params = paged_adamw8bit(RATE), to_jax(make_tree(50, TREE))
    old = tx.init(params)
    _, state = eager(tx, params, some_grads(0)[:1])
    params, state = apply_gradients(tx, some_grads(0)[0], state, params)
    _, newer = apply_gradients(tx, some_grads(0)[0], state, params)
    with pytest.raises(RAISES, match="not the newest"):
        jax.block_until_ready(apply_gradients(tx, some_grads(0)[0], state, params))
    assert newer is not None and old is not None


@pytest.mark.gpu
@pytest.mark.parametrize("donate", [(), (1, 2)], ids=["kept", "donated"])
def test_a_gpu_leaves_the_parameters_of_a_refused_step(donate):
    """In either memory; the error comes with the next call."""
    with jax.default_device(jax.devices("gpu")[0]):
        tx, params = paged_adamw8bit(RATE), to_jax(make_tree(50, TREE))
        step = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=donate)
        grads = some_grads(0)[0]
        _, old = eager(tx, params, [grads])
        _, newer = apply_gradients(tx, grads, jax.tree.map(jnp.copy, old), params)
        _, newest = apply_gradients(tx, grads, newer, params)
        kept, _ = step(grads, jax.tree.map(jnp.copy, old), jax.tree.map(jnp.copy, params))
        assert_trees_equal(kept, params)
        with pytest.raises(RuntimeError, match="not the newest"):
            raise_if_refused()
        assert not is_zero(apply_gradients(tx, grads, newest, params)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["managed", "pinned"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_parameters_do_not_depend_on_where_moments_are(rounding, memory):
    """On the GPU, on the host, or partly on each."""
    chunk = 2**21
    with jax.default_device(jax.devices("gpu")[0]):
        shapes = {"a": (2048, 1024), "b": (1000, 1000), "c": (30,)}
        params, *grads = (
            {name: x.astype(jnp.bfloat16) for name, x in make_tree(seed, shapes).items()}
            for seed in range(4)
        )
        params["b"] = params["b"].astype(jnp.float32)

        def run(device_bytes):
            paging = Paging(device_bytes=device_bytes, memory=memory)
            tx = paged_adamw8bit(RATE, weight_decay=DECAY, param_rounding=rounding, paging=paging)
            new, state = donated(tx, to_jax(params), [to_jax(grad) for grad in grads])
            found = (new, moments(state)), memory_report(state)
            release(state)  # or it keeps the budget
            return found

        expected, report = run(None)
        assert report.resident == report.total > 3 * chunk
        for device_bytes in (0, chunk):
            found, report = run(device_bytes)
            assert report.resident == device_bytes
            assert_trees_equal(found, expected)


# --- Memory -------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("donate", [(), (1, 2)], ids=["kept", "donated"])
def test_what_the_caller_keeps_stays(donate):
    """Without donation XLA copies the parameters first."""
    tx, params = paged_adamw8bit(RATE), to_jax(make_tree(50, TREE))
    copy, grads = jax.device_get(params), some_grads(0)[0]
    step = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=donate)
    new, _ = step(grads, tx.init(params), jax.tree.map(jnp.copy, params) if donate else params)
    expected, _ = separate(tx, to_jax(copy), [grads])
    assert_trees_equal(params, copy)
    assert_trees_equal(new, expected)


@on_every_device
def test_parameters_that_are_used_after_the_step():
    """In one program, with the parameters donated: the old ones are needed as well."""
    tx, params = paged_adamw8bit(RATE), to_jax(make_tree(50, TREE))
    grads, copy = some_grads(0)[0], jax.device_get(params)
    expected, _ = separate(tx, params, [grads])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(params, state):
        new, state = apply_gradients(tx, grads, state, params)
        return new, jax.tree.map(lambda n, p: n - p, new, params), state

    new, change, _ = step(params, tx.init(params))
    assert_trees_equal(new, expected)
    assert_trees_equal(change, jax.tree.map(lambda n, p: jnp.asarray(n) - p, expected, copy))


@on_every_device
@pytest.mark.parametrize("way", [eager, jitted, scanned], ids=["eager", "jit", "scanned"])
def test_one_array_in_two_places(way):
    """Two leaves, two results; also where gradients are the parameters."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 80)), jnp.float32)
    tx, params = paged_adamw8bit(RATE, weight_decay=DECAY), {"a": x, "b": x}
    expected, _ = separate(tx, {"a": x, "b": x + 0}, [{"a": x, "b": -x}])
    new, _ = way(tx, params, [{"a": x, "b": -x}])
    assert_trees_equal(new, expected)

    @jax.jit
    def tied(x, state):
        return apply_gradients(tx, {"a": x, "b": -x}, state, {"a": x, "b": x})

    assert_trees_equal(tied(x, tx.init(params))[0], expected)


@on_cpu
def test_nothing_to_step():
    """Trees without leaves, empty leaves, and None, as optax has them."""
    for params in ({}, {"e": jnp.zeros((0, 3))}, {"e": None, "w": jnp.ones((2, 3))}):
        tx = paged_adamw8bit(RATE)
        new, state = apply_gradients(tx, params, tx.init(params), params)
        assert jax.tree.structure(new) == jax.tree.structure(params)
        new, state = apply_gradients(tx, params, state, new)


def test_copied_parameters_are_noticed(tmp_path):
    """Once, and only if they are elsewhere at each of many steps."""
    run_python(
        """
        import functools, warnings
        import jax, jax.numpy as jnp
        from paged_optax import apply_gradients, paged_adamw8bit

        jax.config.update("jax_platforms", "cpu")
        tx = paged_adamw8bit(0.1)
        grads = {"w": jnp.ones(5000), "b": jnp.ones(3)}

        def train(num_steps, **options):
            step = jax.jit(functools.partial(apply_gradients, tx), **options)
            params, state = jax.tree.map(jnp.copy, grads), tx.init(grads)
            for _ in range(num_steps):
                params, state = step(grads, state, params)
            jax.block_until_ready(params)

        warnings.simplefilter("error")
        train(100, donate_argnums=(1, 2))
        train(20)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train(100)
            train(100)
            for _ in range(1000):  # the interpreter passes a notice on between two instructions
                pass
        (warning,) = said
        assert "copied before each of the last 32 steps in place" in str(warning.message)
        assert "donate_argnums" in str(warning.message)
        """,
        tmp_path,
    )


def compiled_step(tx, params, donate):
    step = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=donate)
    shapes = jax.eval_shape(lambda p: (p, tx.init(p), p), params)
    return step.lower(*shapes).compile()


@on_cpu
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_memory(rounding):
    """Donated, a step takes no memory for updates or copies; kept parameters are copied."""
    params = {"a": jnp.ones((512, 512)), "b": jnp.ones((512, 512), jnp.bfloat16)}
    tx = paged_adamw8bit(RATE, weight_decay=DECAY, param_rounding=rounding)
    nbytes = sum(p.nbytes for p in params.values())
    donated = compiled_step(tx, params, (1, 2)).memory_analysis()
    assert donated.temp_size_in_bytes < 2**14
    assert donated.alias_size_in_bytes >= nbytes
    program = compiled_step(tx, params, (1, 2)).as_text()
    copies = [line for line in program.splitlines() if " copy(" in line and "[512,512]" in line]
    assert not copies
    kept = compiled_step(tx, params, ()).memory_analysis()
    assert kept.alias_size_in_bytes < 2**10


@on_cpu
@as_users_have_it
@pytest.mark.parametrize("clip", [optax.identity(), clip_by_global_norm(1.0)], ids=["", "clipped"])
def test_memory_with_accumulation(clip):
    """Nothing of float32 is copied, if arguments are in the order of the results."""
    params = {"a": jnp.ones((512, 512)), "b": jnp.ones((512, 512), jnp.bfloat16)}
    tx = MultiSteps(optax.chain(clip, paged_adamw8bit(RATE)), 4).gradient_transformation()

    def step(params, state, grads):
        return apply_gradients(tx, grads, state, params)

    shapes = jax.eval_shape(lambda p: (p, tx.init(p), p), params)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*shapes).compile()
    casts = params["b"].nbytes  # to the dtype of gradients
    assert program.memory_analysis().temp_size_in_bytes < casts + 2**14
    assert not [x for x in program.as_text().splitlines() if " copy(" in x and "[512,512]" in x]


# --- Devices ------------------------------------------------------------------------------------

SHARDED = {"rows": (512, 256), "both": (64, 2048), "columns": (4, 4096), "replicated": (64,)}
SPECS = {"rows": P("x"), "both": P("x", "y"), "columns": P(None, "x"), "replicated": P()}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@on_cpu
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("kinds", ["Auto Auto", "Explicit Explicit", "Auto Explicit"])
def test_shards(kinds, rounding):
    """Eight devices take the step of one, each of its shards, and move nothing."""
    tx = paged_adamw8bit(
        RATE, quantization=Quantization("dynamic"), weight_decay=DECAY, param_rounding=rounding
    )
    trees = [make_tree(step, SHARDED) for step in range(3)]
    step = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=(1, 2))

    def run(put):
        params, state = put(trees[0]), jax.jit(tx.init)(put(trees[0]))
        for grads in trees[1:]:
            program = step.lower(put(grads), state, params)
            params, state = step(put(grads), state, params)
        return jax.device_get(params), params, program.compile().as_text()

    expected, _, _ = run(to_jax)
    types = tuple(getattr(AxisType, kind) for kind in kinds.split())
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=types, devices=jax.devices("cpu")[:8])

    def put(tree):
        return {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()}

    with jax.set_mesh(mesh):
        values, params, program = run(put)
    assert_trees_equal(values, expected)
    assert not [name for name in COLLECTIVES if name in program]
    for name, param in params.items():
        assert param.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[name]), param.ndim)


@on_cpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """Inside of it, gradients may vary where the parameters do not: so do the results then."""
    mesh = jax.make_mesh((8,), ("x",), devices=jax.devices("cpu")[:8], axis_types=(AxisType.Auto,))
    tx = paged_adamw8bit(RATE, quantization=Quantization("dynamic"))
    params, grads = make_tree(0, {"w": (64, 1024)}), make_tree(1, {"w": (64, 1024)})
    expected, _ = separate(tx, to_jax(params), [to_jax(grads)])

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P("x"), check_vma=check_vma
    )
    def step(params, grads):
        return apply_gradients(tx, grads, tx.init(params), params)[0]

    assert_trees_equal(step(to_jax(params), to_jax(grads)), expected)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"), check_vma=check_vma
    )
    def step_replicated(params, grads):
        new, _ = apply_gradients(tx, {"w": grads["w"][0]}, tx.init(params), params)
        return jax.tree.map(lambda p: p[None], new)

    param = {"w": jnp.ones(512)}
    each = {"w": jnp.asarray(make_tree(2, {"w": (8, 512)})["w"])}
    new = step_replicated(param, each)
    for row, grad in zip(new["w"], each["w"], strict=True):
        wanted, _ = separate(tx, param, [{"w": grad}])
        np.testing.assert_array_equal(row, wanted["w"])
