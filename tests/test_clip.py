"""Clipping by the global norm: the numbers, what is written, and what it meets in a chain.

The oracles are the NumPy reference, to the bit, and `optax.clip_by_global_norm`.
"""

import functools
import gc

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
    as_users_have_it,
    assert_trees_close,
    clip_origins,
    f32,
    make_tree,
    on_cpu,
    on_every_device,
    reference,
    same_bits,
    stack,
    to_jax,
)
from optimizers import BY_NAME, Specification, assert_as_specified
from paged_optax import (
    MultiSteps,
    apply_gradients,
    clip_by_global_norm,
    global_norm,
    paged_adamw8bit,
    paged_lion8bit,
    paged_sgd8bit,
    skip_non_finite,
)

pytestmark = pytest.mark.fast


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


BFLOAT16, FLOAT16 = DTYPES["bfloat16"], DTYPES["float16"]
PIECE = reference.PIECE_SIZE
SIZES = {"a": 0, "b": 1, "c": 255, "d": 256, "e": 257, "f": PIECE, "g": PIECE + 1, "h": 70_001}
SHAPES = {name: (size,) for name, size in SIZES.items()}
MIXED = dict(zip(SIZES, [f32, BFLOAT16, FLOAT16, f32, f32, BFLOAT16, f32, FLOAT16], strict=True))
TREE = {"w": (64, 80), "b": (40,), "n": (5,)}
RATE = 0.03


def exact_norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in tree.values()))


# --- The norm -----------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize(
    "dtypes", [f32, BFLOAT16, FLOAT16, MIXED], ids="f32 bf16 f16 mixed".split()
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_bits_of_the_reference(dtypes, compiled):
    tree = make_tree(0, SHAPES, dtypes, spread=0.0 if dtypes is FLOAT16 else 2.0, scale=0.1)
    norm = (jax.jit(global_norm) if compiled else global_norm)(to_jax(tree))
    same_bits(norm, reference.global_norm(list(tree.values())))
    assert abs(float(norm) / exact_norm(tree) - 1) <= 2.0**-22


@on_every_device
def test_norm_of_many_leaves():
    """More than one launch on a GPU brings; most of them smaller than a block."""
    rng = np.random.default_rng(0)
    tree = [rng.standard_normal(17 + i % 5 * (i == 7) * 1000).astype(f32) for i in range(2700)]
    same_bits(global_norm(to_jax(tree)), reference.global_norm(tree))


@on_every_device
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf, np.nan], [3e19], [1e-30], [2e-23]])
def test_norm_of_unusual_numbers(bad):
    tree = make_tree(1, {"w": (300,)}, scale=0 if bad[0] < 1 else 1)
    tree["w"][7 : 7 + len(bad)] = bad
    norm = global_norm(to_jax(tree))
    same_bits(norm, reference.global_norm(list(tree.values())))
    assert np.isnan(norm) == np.isnan(bad).any()
    assert np.isinf(norm) == (not np.isnan(bad).any() and np.max(np.abs(bad)) > 1.8e19)


@on_cpu
@as_users_have_it
def test_norm_of_other_types():
    """optax computes that part."""
    tree = {"c": jnp.array([3 + 4j, 1j], jnp.complex64), "w": jnp.ones(5), "i": None}
    np.testing.assert_allclose(global_norm(tree), optax.tree.norm(tree), rtol=1e-6)
    assert global_norm({}) == 0
    ours, theirs = (
        f(2.0).update(tree, optax.EmptyState())[0]
        for f in (clip_by_global_norm, optax.clip_by_global_norm)
    )
    assert_trees_close(ours, theirs, rtol=1e-6)


@on_cpu
@as_users_have_it
def test_integers_are_rounded_towards_zero():
    grads = {"i": jnp.array([3, -4]), "w": jnp.zeros(2)}
    clipped, _ = jax.jit(clip_by_global_norm(3.0).update)(grads, optax.EmptyState())
    assert clipped["i"].dtype == jnp.int32 and clipped["i"].tolist() == [1, -2]


@on_cpu
def test_norms_of_the_same_gradients_are_one():
    """Who logs the norm pays nothing for it."""
    tx = optax.chain(clip_by_global_norm(1.0), paged_adamw8bit(RATE))

    def step(grads, state, params):
        return *apply_gradients(tx, grads, state, params), global_norm(grads)

    params = to_jax(make_tree(0, TREE))
    program = jax.jit(step).lower(params, tx.init(params), params).compile().as_text()
    assert program.count('custom_call_target="paged_optax_norm"') == 1


# --- Steps --------------------------------------------------------------------------------------

STEP_SHAPES = {"e": (0, 3), "g": (300,), "h": (5000,), "s": (), "w": (64, 80)}
STEP_DTYPES = {"e": f32, "g": FLOAT16, "h": BFLOAT16, "s": BFLOAT16, "w": f32}


def eager(tx, params, grads):
    state = tx.init(params)
    for grad in grads:
        params, state = apply_gradients(tx, grad, state, params)
    return params, state


def donated(tx, params, grads):
    step = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=(1, 2))
    state, params = tx.init(params), jax.tree.map(jnp.copy, params)
    for grad in grads:
        params, state = step(grad, state, params)
    return params, state


def scanned(tx, params, grads):
    @jax.jit
    def run(params, grads):
        def body(carry, grad):
            params, state = carry
            return apply_gradients(tx, grad, state, params), None

        return jax.lax.scan(body, (params, tx.init(params)), grads)[0]

    return run(params, stack(grads))


@on_every_device
@pytest.mark.parametrize("way", [eager, donated, scanned])
@pytest.mark.parametrize("name", [*"adamw lion".split(), *map(slow, "sgd rmsprop".split())])
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_steps_of_the_reference(name, rounding, way):
    """Gradients are scaled in float32, also those of 16 bits; below the limit nothing happens."""
    optimizer = BY_NAME[name]
    params = make_tree(100, STEP_SHAPES, STEP_DTYPES, scale=0.1)
    all_grads = [make_tree(step, STEP_SHAPES, STEP_DTYPES) for step in range(3)]
    specification = Specification.fresh(optimizer, params, rounding=rounding)
    norms = sorted(float(reference.global_norm(list(grads.values()))) for grads in all_grads)
    limit = (norms[0] + norms[1]) / 2
    expected, num_clipped = params, 0
    for grads in all_grads:
        scale = reference.clip_scale(reference.global_norm(list(grads.values())), limit)
        num_clipped += scale < 1
        scaled = {key: np.asarray(grad).astype(f32) * scale for key, grad in grads.items()}
        expected, specification = specification.step(scaled, expected, RATE, optimizer.weight_decay)
    assert num_clipped == 2
    tx = optax.chain(clip_by_global_norm(limit), optimizer.descent(RATE, param_rounding=rounding))
    new, state = way(tx, to_jax(params), [to_jax(grads) for grads in all_grads])
    for key, wanted in expected.items():
        same_bits(new[key], wanted, key)
    assert_as_specified(state[1], specification)


@on_every_device
def test_updates_are_clipped_too():
    """Not only steps in place."""
    grads = make_tree(0, TREE)
    scale = reference.clip_scale(reference.global_norm(list(grads.values())), 1.0)
    direction = paged_sgd8bit(1.0, momentum=0.9)
    tx = optax.chain(clip_by_global_norm(1.0), direction)
    updates, _ = jax.jit(tx.update)(to_jax(grads), tx.init(to_jax(grads)))
    expected, _ = jax.jit(direction.update)(
        to_jax({key: grad * scale for key, grad in grads.items()}), direction.init(to_jax(grads))
    )
    for key, wanted in expected.items():
        same_bits(updates[key], wanted)


# --- Equal to optax's ---------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 1e9, np.inf])
def test_gradients_are_those_of_optax(max_norm):
    """Within the bound of the docstring: 3e-7, and by what their norm is wrong."""
    grads = make_tree(3, {"w": (300, 200), "b": (40,)}, spread=1.0)
    ours, _ = clip_by_global_norm(max_norm).update(to_jax(grads), optax.EmptyState())
    theirs, _ = optax.clip_by_global_norm(max_norm).update(to_jax(grads), optax.EmptyState())
    error = abs(float(optax.tree.norm(to_jax(grads))) / exact_norm(grads) - 1)
    assert_trees_close(ours, theirs, rtol=3e-7 + error, atol=0)


@on_cpu
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_bad_gradients_are_those_of_optax(bad):
    """NaN makes all NaN; an infinite norm makes finite ones 0."""
    grads = make_tree(3, {"w": (300,), "b": (5,)})
    grads["b"][2] = bad
    ours, _ = clip_by_global_norm(1.0).update(to_jax(grads), optax.EmptyState())
    theirs, _ = optax.clip_by_global_norm(1.0).update(to_jax(grads), optax.EmptyState())
    assert_trees_close(ours, theirs)


def in_partition(tx):
    transforms = {"paged": tx, "sgd": optax.sgd(0.1, momentum=0.9)}
    return optax.partition(transforms, {"w": "paged", "b": "paged", "n": "sgd"})


def with_schedule(clip, tx):
    """The limit changes from step to step."""
    limits = optax.linear_schedule(2.0, 0.5, 3)
    return optax.chain(optax.inject_hyperparams(clip)(limits), tx)


WRAPPED = {
    "before": lambda clip, tx: optax.chain(clip(1.0), tx),
    "a schedule": with_schedule,
    "inject_hyperparams": lambda clip, tx: optax.chain(
        clip(1.0), optax.inject_hyperparams(paged_adamw8bit)(optax.linear_schedule(0.1, 0.01, 3))
    ),
    "partition": lambda clip, tx: optax.chain(clip(1.0), in_partition(tx)),
    "inside a partition": lambda clip, tx: in_partition(optax.chain(clip(1.0), tx)),
    "two in a partition": lambda clip, tx: optax.chain(
        clip(1.0),
        optax.partition({"a": tx, "b": paged_lion8bit(RATE)}, {"w": "a", "b": "b", "n": "a"}),
    ),
    "masked": lambda clip, tx: optax.chain(
        clip(1.0), optax.masked(tx, {"w": True, "b": False, "n": True})
    ),
    "masked itself": lambda clip, tx: optax.chain(
        optax.masked(clip(1.0), {"w": True, "b": False, "n": True}), tx
    ),
    "twice": lambda clip, tx: optax.chain(clip(2.0), clip(1.0), tx),
    "scaled between": lambda clip, tx: optax.chain(clip(1.0), optax.scale(3.0), tx),
    "clipped between": lambda clip, tx: optax.chain(clip(1.0), optax.clip(1e-2), tx),
    "MultiSteps": lambda clip, tx: MultiSteps(
        optax.chain(clip(1.0), tx), 2
    ).gradient_transformation(),
    "around MultiSteps": lambda clip, tx: optax.chain(
        clip(1.0), MultiSteps(tx, 2).gradient_transformation()
    ),
    "skip step": lambda clip, tx: skip_non_finite(optax.chain(clip(1.0), tx), "step"),
    "skip element": lambda clip, tx: skip_non_finite(optax.chain(clip(1.0), tx), "element"),
    "skip_step": lambda clip, tx: optax.chain(
        clip(1.0), paged_adamw8bit(RATE, non_finite="skip_step")
    ),
    "skip_element": lambda clip, tx: optax.chain(
        clip(1.0), paged_adamw8bit(RATE, non_finite="skip_element")
    ),
}


TELLING = ["before", "partition", "scaled between", "MultiSteps", "skip step", "skip element"]
every_chain = pytest.mark.parametrize(
    "name", [name if name in TELLING else slow(name) for name in WRAPPED]
)


@on_every_device
@as_users_have_it
@every_chain
def test_steps_are_those_of_optax(name):
    """Whatever is around and between, with one NaN where something skips it."""
    grads = [make_tree(step, TREE) for step in range(4)]
    if "skip" in name:
        grads[2]["w"][3, 5] = np.nan
    runs = []
    for clip in (clip_by_global_norm, optax.clip_by_global_norm):
        # With moments of 8 bits, a difference in the last digit may become one of a code.
        tx = WRAPPED[name](clip, paged_adamw8bit(RATE, quantization=FLOAT32_MOMENTS))
        runs.append(donated(tx, to_jax(make_tree(50, TREE)), [to_jax(grad) for grad in grads])[0])
    # inject_hyperparams has moments of 8 bits, and so have skip_step and skip_element.
    assert_trees_close(runs[0], runs[1], rtol=1e-5, atol=1e-5)


# --- What is written ----------------------------------------------------------------------------

LARGE = {"w": (512, 512), "b": (40,), "n": (5,)}


def temporary_bytes(tx, params):
    def step(grads, state, params):
        return apply_gradients(tx, grads, state, params)

    shapes = jax.eval_shape(lambda p: (p, tx.init(p), p), params)
    program = jax.jit(step, donate_argnums=(1, 2)).lower(*shapes).compile()
    return program.memory_analysis().temp_size_in_bytes


REWRITE = {"scaled between", "clipped between", "around MultiSteps", "skip element"}
AS_OPTAX = {"masked", "masked itself", "twice", "MultiSteps", "skip step", "skip_step"}


@on_cpu
@as_users_have_it
@every_chain
def test_no_gradient_is_rewritten(name):
    """Unless something between the two changes it, or a wrapper does."""
    params = to_jax(make_tree(0, LARGE))
    tx = WRAPPED[name](clip_by_global_norm, paged_adamw8bit(RATE))
    nbytes = temporary_bytes(tx, params)
    if name in REWRITE:
        assert nbytes >= params["w"].nbytes
    elif name in AS_OPTAX | {"skip_element"}:
        theirs = WRAPPED[name](optax.clip_by_global_norm, paged_adamw8bit(RATE))
        assert nbytes <= temporary_bytes(theirs, params) + 2**12
    else:
        assert nbytes < params["w"].nbytes // 8


@on_cpu
def test_nothing_is_kept():
    """Scaled gradients that nobody has any more, traced or not, leave nothing behind."""
    tx = optax.chain(clip_by_global_norm(1.0), paged_adamw8bit(RATE))
    params, grads = to_jax(make_tree(0, TREE)), [to_jax(make_tree(1, TREE))]
    eager(tx, params, grads)
    donated(tx, params, grads)
    gc.collect()
    assert not clip_origins


def evaluated(function):
    return functools.partial(jax.eval_shape, function)


@on_cpu
@as_users_have_it
@pytest.mark.parametrize("tracing", [jax.jit, evaluated, jax.make_jaxpr])
def test_nothing_is_kept_of_a_trace_that_fails(tracing):
    """Though its equations hold gradients and scaled ones."""
    tx = optax.chain(clip_by_global_norm(1.0), optax.adamw(RATE))
    params = to_jax(make_tree(0, TREE))

    # All are arguments: of a trace that fails, jax itself keeps what met an array from outside.
    def failing(grads, state, params):
        tx.update(grads, state, params)
        assert clip_origins
        raise ArithmeticError

    for _ in range(3):
        with pytest.raises(ArithmeticError):
            tracing(failing)(params, tx.init(params), params)
    gc.collect()
    assert not clip_origins


@on_cpu
def test_gradients_that_are_gone():
    """A step with clipped gradients works after the gradients themselves were donated."""
    clip, tx = clip_by_global_norm(1.0), paged_adamw8bit(RATE)
    params, grads = to_jax(make_tree(0, TREE)), to_jax(make_tree(1, TREE))
    clipped, _ = clip.update(grads, optax.EmptyState())
    for grad in grads.values():
        grad.delete()
    updates, _ = tx.update(clipped, tx.init(params), params)
    assert not any(np.isnan(update).any() for update in updates.values())


# --- Devices ------------------------------------------------------------------------------------

SHARDED = {"rows": (512, 256), "both": (64, 2048), "columns": (4, 4096), "replicated": (64,)}
SPECS = {"rows": P("x"), "both": P("x", "y"), "columns": P(None, "x"), "replicated": P()}


@on_cpu
@pytest.mark.parametrize("kinds", ["Auto Auto", "Explicit Explicit", "Auto Explicit"])
def test_shards(kinds):
    """Each element counts once, however leaves are cut, and only sums travel."""
    types = tuple(getattr(AxisType, kind) for kind in kinds.split())
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=types)
    grads = make_tree(0, SHARDED)
    tx = optax.chain(
        clip_by_global_norm(1.0), paged_sgd8bit(1.0, 0.9, quantization=FLOAT32_MOMENTS)
    )
    with jax.set_mesh(mesh):
        put = {
            name: jax.device_put(grad, NamedSharding(mesh, SPECS[name]))
            for name, grad in grads.items()
        }
        norm = jax.jit(global_norm)(put)
        np.testing.assert_allclose(norm, exact_norm(grads), rtol=4 * 2.0**-23)
        state = tx.init(put)
        step = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=1)
        program = step.lower(put, state, put).compile().as_text()
        for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
            assert f" {collective}(" not in program
        new, _ = step(put, state, put)
    expected, _ = eager(tx, to_jax(grads), [to_jax(grads)])
    assert_trees_close(jax.device_get(new), jax.device_get(expected), rtol=1e-6, atol=1e-6)


@on_cpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """There the norm is that of what a device has, as in optax."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = make_tree(0, {"w": (64, 300)})["w"]

    def norms(clip):
        def run(grad):
            return clip(0.5).update({"w": grad}, optax.EmptyState())[0]["w"]

        return jax.jit(
            jax.shard_map(run, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check_vma)
        )(x)

    ours, theirs = norms(clip_by_global_norm), norms(optax.clip_by_global_norm)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.sum(np.square(ours))), 0.5 * np.sqrt(8), rtol=1e-5)


# --- Refused ------------------------------------------------------------------------------------


def test_limits_that_are_none():
    for bad in (-1.0, np.float32(-2), float("nan")):
        with pytest.raises(ValueError, match="max_norm is"):
            clip_by_global_norm(bad)
    with pytest.raises(ValueError, match="scalar"):
        clip_by_global_norm(np.ones(3))
    with pytest.raises(TypeError, match="number"):
        clip_by_global_norm(None)


@on_cpu
def test_vmap_and_derivatives_are_refused():
    grads = to_jax(make_tree(0, TREE))
    with pytest.raises(NotImplementedError, match="cannot be vmapped"):
        jax.vmap(lambda g: global_norm({"w": g}))(grads["w"])
    with pytest.raises(TypeError, match="cannot be differentiated"):
        jax.grad(lambda g: global_norm(g))(grads)
