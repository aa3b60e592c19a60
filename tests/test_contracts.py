"""What every optimizer promises, for each row of the table in optimizers.py.

Where the extension computes all of a result, the oracle is the NumPy reference, to the bit. Where
XLA computes a part of it, the bound is derived.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import (
    DTYPES,
    FLOAT32_MOMENTS,
    RAISES,
    assert_close_ulps,
    assert_trees_close,
    assert_trees_equal,
    f32,
    finish,
    is_zero,
    layout_bytes,
    make_tree,
    num_arenas,
    on_cpu,
    on_every_device,
    residuals_of,
    same_bits,
    stack,
    to_jax,
    train,
)
from optimizers import DESCENTS, OPTIMIZERS, Specification, assert_as_specified, moments_of
from paged_optax import Quantization, memory_report, release

every_optimizer = pytest.mark.parametrize("optimizer", [row.param for row in DESCENTS])
# Of optimizers with one direction the first; what it promises, all of them have.
DIRECTIONS = list({row.direction: row for row in reversed(OPTIMIZERS)}.values())
every_direction = pytest.mark.parametrize("optimizer", [row.param for row in DIRECTIONS])
every_format = pytest.mark.parametrize(
    "format", ["ratio", "ratio6", "ratio4", "dynamic", "bfloat16", "float32"]
)

# Moments in float32 and in 8 bits, partial blocks, a scalar, no elements; all dtypes.
SHAPES = {"b": (7,), "e": (0, 3), "g": (300,), "h": (5000,), "s": (), "v": (70, 70), "w": (64, 80)}
MIXED = {
    **{"b": DTYPES["float32"], "e": DTYPES["float32"], "g": DTYPES["float16"]},
    **{"h": DTYPES["bfloat16"], "s": DTYPES["bfloat16"], "v": DTYPES["float16"]},
    "w": DTYPES["float32"],
}
NUM_STEPS = 4
RATE, DECAY = 1e-2, 0.1


def make_grads(step, num_bad=0):
    grads = make_tree(step, SHAPES, MIXED)
    for value, name in zip([np.nan, np.inf, -np.inf, 1e30][:num_bad], "bghw", strict=False):
        grads[name].ravel()[3 * step % grads[name].size] = value
    return grads


GRADS = [make_grads(step) for step in range(NUM_STEPS)]
PARAMS = make_tree(100, SHAPES, MIXED)


def ids(values):
    return {"argvalues": list(values.values()), "ids": list(values)}


def assert_close_after(num_steps, params, expected):
    """Parameters after steps whose tail XLA computed.

    An update is rounded thrice: the decay's product, its sum with the direction, and the product
    with the rate. It is smaller than four rates.
    """
    assert_close_ulps(params, expected, ulps=num_steps, term=4 * RATE, term_ulps=2 * 3 * num_steps)


# --- The numbers --------------------------------------------------------------------------------


@on_every_device
@every_direction
@every_format
def test_bits_of_the_reference(optimizer, format):
    """Updates of all dtypes, and everything stored."""
    if format not in optimizer.formats:
        pytest.skip("cannot store these moments")
    quantization = Quantization(format, seed=3)
    tx = optimizer.direction(quantization=quantization)
    specification = Specification.fresh(optimizer, PARAMS, quantization)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step, grads in enumerate(GRADS):
        updates, state = update(grads, state)
        expected, specification = specification.update(grads)
        for name, wanted in expected.items():
            same_bits(updates[name], wanted, f"{name} at step {step}")
        assert_as_specified(state, specification, f"after step {step}")
    assert state.count == NUM_STEPS


def eager(tx, params, grads):
    return train(tx, params, grads, update=tx.update)


def donated(tx, params, grads):
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    return train(tx, params, [jax.tree.map(jnp.copy, grad) for grad in grads], update=update)


def scanned(tx, params, grads):
    @functools.partial(jax.jit, donate_argnums=0)
    def run(params, grads):
        def body(carry, grad):
            params, state = carry
            updates, state = tx.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), grads)[0]

    return run(jax.tree.map(jnp.copy, params), stack(grads))


WAYS = {"eager": eager, "jit": train, "donated": donated, "scanned": scanned}


@on_every_device
@every_optimizer
@pytest.mark.parametrize("way", **ids(WAYS))
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_rounded_parameters(optimizer, rounding, way):
    """Parameters, moments and residuals are those of the reference, however a step is run."""
    tx = optimizer.descent(RATE, param_rounding=rounding)
    decay = optimizer.weight_decay
    specification = Specification.fresh(optimizer, PARAMS, rounding=rounding)
    expected = PARAMS
    for grads in GRADS:
        updates, specification = specification.update(grads, expected, f32(RATE), f32(decay))
        expected = jax.device_get(optax.apply_updates(to_jax(expected), to_jax(updates)))
    params, state = way(tx, to_jax(PARAMS), [to_jax(grads) for grads in GRADS])
    assert_trees_equal(params, expected)
    assert_as_specified(state, specification)
    if rounding == "compensated":
        for index, name in enumerate(SHAPES):
            if MIXED[name] != f32:
                kept = specification.residuals[name]
                np.testing.assert_array_equal(residuals_of(state, index)[: kept.size], kept)


@on_every_device
@every_optimizer
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("way", **ids(WAYS))
def test_nearest(optimizer, way):
    """XLA computes what follows the direction, and programs differ in how they round 16 bits."""
    tx = optimizer.descent(RATE)
    grads = [to_jax(grad) for grad in GRADS]
    expected, expected_state = eager(tx, to_jax(PARAMS), grads)
    params, state = way(tx, to_jax(PARAMS), grads)
    assert_close_after(NUM_STEPS, params, expected)
    assert_trees_equal(moments_of(optimizer, state), moments_of(optimizer, expected_state))


@on_cpu
@every_optimizer
@pytest.mark.usefixtures("standard_promotion")
def test_follows_optax(optimizer):
    """With float32 moments: parameters and moments."""
    params, grads = make_tree(0, SHAPES), [make_tree(1 + i, SHAPES) for i in range(6)]
    ours, state = train(optimizer.descent(RATE, quantization=FLOAT32_MOMENTS), params, grads)
    theirs, expected = train(optimizer.optax(RATE), params, grads)
    tolerance = {"rtol": optimizer.rtol, "atol": optimizer.atol}
    assert_trees_close(ours, theirs, **tolerance)
    for name, moment in moments_of(optimizer, state).items():
        assert_trees_close(moment, jax.device_get(optax.tree.get(expected, name)), **tolerance)


# --- Many devices -------------------------------------------------------------------------------


@on_cpu
@every_direction
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_shards(optimizer, kind):
    """Eight devices take the steps of one, each those of its shards, and move nothing."""
    shapes, specs = {"w": (64, 1024), "r": (300,)}, {"w": P("x"), "r": P()}
    tx = optimizer.direction(quantization=Quantization("dynamic"))  # the other draws by shard
    kinds = (getattr(AxisType, kind),)
    mesh = jax.make_mesh((8,), ("x",), axis_types=kinds, devices=jax.devices("cpu")[:8])
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    grads = [make_tree(step, shapes) for step in range(3)]
    update = jax.jit(tx.update)

    def run(put):
        state = tx.init(grads[0])
        for grad in grads:
            updates, state = update(put(grad), state)
        return updates, state, update.lower(put(grad), state).compile().as_text()

    expected, single, _ = run(to_jax)
    with jax.set_mesh(mesh):
        updates, state, program = run(functools.partial(jax.device_put, device=shardings))
    assert_trees_equal(updates, expected)
    assert_trees_equal(moments_of(optimizer, state), moments_of(optimizer, single))
    assert len(memory_report(state).devices) == 8
    assert not [x for x in ("all-gather", "all-reduce", "all-to-all") if x in program]


# --- The life of a state ------------------------------------------------------------------------


@on_cpu
@every_direction
def test_replay(optimizer):
    """The last step may be dropped and taken again, and no step before it."""
    tx = optimizer.direction(replay=True)
    specification = Specification.fresh(optimizer, PARAMS)
    states, update = [tx.init(PARAMS)], jax.jit(tx.update)
    for grads in GRADS:
        update(make_grads(50), states[-1])  # dropped
        updates, state = update(grads, states[-1])
        expected, specification = specification.update(grads)
        assert_trees_equal(jax.tree.map(np.asarray, updates), expected)
        states.append(state)
    before = moments_of(optimizer, states[-2])
    assert_trees_equal(moments_of(optimizer, states[-1]), specification.moments(SHAPES))
    assert_trees_equal(moments_of(optimizer, states[-2]), before)
    with pytest.raises(RAISES, match="not the newest"):
        finish(update(GRADS[0], states[-3]))
    report = memory_report(states[-1])
    assert report.total == 2 * report.replay == release(states[-1])


def stepped(optimizer, tx, num_steps=2):
    """States, oldest first."""
    states = [tx.init(PARAMS)]
    for grads in GRADS[:num_steps]:
        states.append(tx.update(grads, states[-1])[1])
    return states


def a_stale_state(tx, states):
    return tx.update(GRADS[0], states[-2])


def a_copy_that_went_on(tx, states):
    """The copy is the newest afterwards."""
    copy = jax.tree.map(jnp.copy, states[-1])
    states.append(tx.update(GRADS[0], copy)[1])
    return tx.update(GRADS[0], states[-2])


def another_shape(tx, states):
    return tx.update(GRADS[0] | {"w": np.ones((80, 64), f32)}, states[-1])


def fewer_leaves(tx, states):
    return tx.update({k: g for k, g in GRADS[0].items() if k != "w"}, states[-1])


def other_names(tx, states):
    return tx.update({k.upper(): g for k, g in GRADS[0].items()}, states[-1])


def integers(tx, states):
    return tx.update(GRADS[0] | {"w": np.ones((64, 80), np.int32)}, states[-1])


def a_mapped_axis(tx, states):
    return jax.vmap(tx.update, (0, None))(stack([GRADS[0]] * 2), states[-1])


def a_derivative(tx, states):
    return jax.grad(lambda g: jnp.sum(tx.update({**GRADS[0], "w": g}, states[-1])[0]["w"]))(
        jnp.ones((64, 80))
    )


def a_state_of_another_optimizer(tx, states):
    return tx.update(GRADS[0], optax.sgd(0.1, momentum=0.9).init(PARAMS))


MISUSES = {
    a_stale_state: (RAISES, "not the newest"),
    a_copy_that_went_on: (RAISES, "not the newest"),
    another_shape: (RAISES, r"\(64, 80\).*\(80, 64\)"),
    fewer_leaves: (RAISES, "7 leaves .* 6"),
    other_names: (RAISES, "other names"),
    integers: (TypeError, r"gradient \['w'\] has dtype int32"),
    a_mapped_axis: (NotImplementedError, "cannot be vmapped"),
    a_derivative: (TypeError, "cannot be differentiated"),
    a_state_of_another_optimizer: (TypeError, r"init\(params\)"),
}


@on_cpu
@every_direction
@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.__name__)
def test_refusals(optimizer, misuse):
    """A clear error; nothing is overwritten, and the newest state goes on."""
    errors, match = MISUSES[misuse]
    tx = optimizer.direction()
    states = stepped(optimizer, tx)
    with pytest.raises(errors, match=match):
        finish(misuse(tx, states))
    specification = Specification.fresh(optimizer, PARAMS)
    for grads in [*GRADS[:2], GRADS[0]][: len(states) - 1]:
        _, specification = specification.update(grads)
    assert_trees_equal(moments_of(optimizer, states[-1]), specification.moments(SHAPES))
    updates, _ = tx.update(GRADS[3], states[-1])
    assert_trees_equal(jax.tree.map(np.asarray, updates), specification.update(GRADS[3])[0])


@on_cpu
@every_direction
def test_release(optimizer):
    tx, before = optimizer.direction(), num_arenas()
    states = jax.block_until_ready(stepped(optimizer, tx))
    assert num_arenas() == before + 1
    assert release(states[-1]) > 0 and num_arenas() == before
    for call in (
        lambda: tx.update(GRADS[0], states[-1]),
        lambda: moments_of(optimizer, states[-1]),
    ):
        with pytest.raises(RAISES, match="were released"):
            finish(call())


# --- Gradients that are not finite --------------------------------------------------------------


@on_every_device
@every_optimizer
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.usefixtures("standard_promotion")
def test_skipped_steps_leave_no_trace(optimizer, rounding):
    """Parameters, moments and random bits of a run without them; in a scan."""
    careful = optimizer.descent(RATE, param_rounding=rounding, non_finite="skip_step")
    bad = [make_grads(9, num_bad=1), make_grads(10, num_bad=2)]
    grads = [bad[0], *GRADS[:2], *bad, GRADS[2]]
    params, state = scanned(careful, to_jax(PARAMS), [to_jax(grad) for grad in grads])
    plain = optimizer.descent(RATE, param_rounding=rounding)
    expected, plain_state = train(plain, to_jax(PARAMS), [to_jax(grad) for grad in GRADS[:3]])
    if rounding == "nearest":
        assert_close_after(3, params, expected)
    else:
        assert_trees_equal(params, expected)
    assert_trees_equal(moments_of(optimizer, state), moments_of(optimizer, plain_state))
    assert state.skipped == 3


@on_every_device
@every_direction
@every_format
def test_skipped_elements(optimizer, format):
    """To the bit as in the reference: a direction of 0, and moments that stay."""
    if format not in optimizer.formats:
        pytest.skip("cannot store these moments")
    quantization = Quantization(format)
    tx = optimizer.direction(non_finite="skip_element", quantization=quantization)
    specification = Specification.fresh(optimizer, PARAMS, quantization, skip_elements=True)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step in range(NUM_STEPS):
        grads = make_grads(step, num_bad=4 * (step % 2))
        updates, state = update(grads, state)
        expected, specification = specification.update(grads)
        assert all(np.isfinite(wanted.astype(f32)).all() for wanted in expected.values())
        for name, wanted in expected.items():
            same_bits(updates[name], wanted, f"{name} at step {step}")
    assert state.skipped == 2 * 4
    assert_as_specified(state.inner_state[0], specification)


@on_every_device
@every_direction
def test_bad_elements_spoil_themselves_alone(optimizer):
    """Without a policy: NaN there, and nowhere else."""
    tx = optimizer.direction()
    specification = Specification.fresh(optimizer, PARAMS)
    state = tx.init(PARAMS)
    for step in range(3):
        grads = make_grads(step, num_bad=4)
        updates, state = tx.update(grads, state)
        expected, specification = specification.update(grads)
        for name, wanted in expected.items():
            same_bits(updates[name], wanted, f"{name} at step {step}")
            bad = ~(np.abs(grads[name].astype(f32)) < 2.0**64)
            np.testing.assert_array_equal(np.isnan(wanted.astype(f32)), bad)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moments_of(optimizer, state)))


# --- Trees and reports --------------------------------------------------------------------------


@on_every_device
@every_optimizer
@pytest.mark.parametrize("tree", [{}, {"a": None, "b": [()]}, {"a": np.ones((0, 3), f32)}], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_nothing_to_update(optimizer, tree, rounding):
    tx = optimizer.descent(RATE, param_rounding=rounding)
    state = tx.init(tree)
    for _ in range(2):
        updates, state = tx.update(tree, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert is_zero(updates)
    assert optax.tree.get(state, "count") == 2


@on_every_device
@every_direction
def test_moments_are_those_of_the_reference(optimizer):
    """Read as float32 arrays in the tree of the parameters."""
    tx = optimizer.direction()
    specification = Specification.fresh(optimizer, PARAMS)
    state = tx.init(PARAMS)
    for grads in GRADS:
        _, state = tx.update(grads, state)
        _, specification = specification.update(grads)
        found = moments_of(optimizer, state)
        assert_trees_equal(found, specification.moments(SHAPES))
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(found))


@on_cpu
@every_direction
@pytest.mark.parametrize("min_size", [0, 4096, 2**62])
def test_memory(optimizer, min_size):
    """A byte for each moment of a parameter and a word for each 256 of them, or 4 bytes."""
    tx = optimizer.direction(quantization=Quantization(min_size=min_size))
    state = stepped(optimizer, tx, 1)[-1]
    blocks = {True: 0, False: 0}
    for shape in SHAPES.values():
        size = int(np.prod(shape))
        blocks[size >= min_size] += -(-size // 256)
    expected = layout_bytes(blocks[True], blocks[False], num_states=len(optimizer.states))
    report = memory_report(state)
    assert report.total == report.resident == expected == release(state)


# Every optimizer and the next one, and those with the same moments.
PAIRS = [
    *itertools.pairwise([*OPTIMIZERS, OPTIMIZERS[0]]),
    *itertools.permutations(OPTIMIZERS[:3], 2),
]


@on_cpu
@pytest.mark.parametrize("one, other", PAIRS, ids=lambda row: row.name)
def test_moments_of_another_optimizer_are_refused(one, other):
    """A state goes on in an optimizer with the same moments, and in no other."""
    _, state = stepped(one, one.direction(), 1)
    if one.direction().init(PARAMS).__class__ is other.direction().init(PARAMS).__class__:
        updates, _ = other.direction().update(GRADS[1], state)
        assert not is_zero(updates)
    else:
        with pytest.raises(TypeError, match=r"init\(params\)"):
            other.direction().update(GRADS[1], state)
