"""`paged(tx)`: what it promises, whatever the transformation.

The oracle for what is stored is the NumPy reference, to the bit; for updates it is the
transformation alone.
"""

import functools
import pickle

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
    as_users_have_it,
    assert_trees_close,
    assert_trees_equal,
    f32,
    finish,
    is_zero,
    kept_by,
    leaf_keys,
    make_tree,
    num_arenas,
    on_cpu,
    on_every_device,
    reference,
    same_bits,
    stack,
    to_jax,
    train,
)
from paged_optax import (
    MultiSteps,
    PagedTransformationState,
    Paging,
    Quantization,
    _ext,
    apply_gradients,
    export_moments,
    from_optax,
    load_moments,
    memory_report,
    moments,
    newest,
    paged,
    paged_adamw8bit,
    release,
    reset,
    save_moments,
    skip_non_finite,
    to_optax,
)

pytestmark = pytest.mark.fast

SHAPES = {"b": (7,), "e": (0, 3), "g": (300,), "h": (5000,), "s": (), "v": (70, 70), "w": (64, 80)}
PARAMS = make_tree(100, SHAPES)
GRADS = [make_tree(step, SHAPES) for step in range(4)]
KEPT_PATHS = tuple(f"['kept']['{name}']" for name in SHAPES)
FLOAT32 = Quantization("float32")
ADAM = optax.adam(1e-2)


def keep(dtype):
    """A transformation whose state is the last gradient, which it returns."""

    def init(params):
        return {"kept": jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)}

    def update(updates, state, params=None):
        del params
        kept = jax.tree.map(lambda old, new: old.astype(new.dtype), state["kept"], updates)
        return kept, {"kept": jax.tree.map(lambda u: u.astype(dtype), updates)}

    return optax.GradientTransformation(init, update)


def unusual_grads(step):
    """Blocks of one sign, zeros, wide ranges, and what is not finite."""
    grads = make_tree(step, SHAPES, spread=3.0)
    if step % 2:
        grads = jax.tree.map(np.abs, grads)
    grads["h"][256:512] = np.abs(grads["h"][256:512]) ** 3
    grads["h"][600:1100] = 0
    grads["h"][1100] = -0.0
    grads["v"].ravel()[:5] = [np.nan, np.inf, -np.inf, 1e38, 1e-42][step % 2 :] + [0.0] * (step % 2)
    return grads


@on_every_device
@pytest.mark.parametrize("format", ["ratio", "ratio6", "ratio4", "dynamic", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_of_the_reference(format, dtype):
    """What is loaded is what the reference makes of what was stored."""
    tx = paged(keep(dtype), quantization=Quantization(format, min_size=0, seed=3))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    keys = dict(zip(SHAPES, leaf_keys(KEPT_PATHS, 3), strict=True))
    expected = {name: np.zeros(shape, f32) for name, shape in SHAPES.items()}
    for count in range(4):
        grads = unusual_grads(count)
        updates, state = update(grads, state)
        for name, grad in grads.items():
            same_bits(updates[name], expected[name], f"{name} at step {count}")
            stored = reference.store_array(grad.astype(DTYPES[dtype]), format, keys[name], count)
            (decoded,) = reference.decode(stored, [True], grad.size)
            expected[name] = decoded.reshape(grad.shape).astype(DTYPES[dtype]).astype(f32)
    found = moments(state).state["kept"]
    assert all(found[name].dtype == f32 for name in SHAPES)
    if dtype == "float32":
        assert_trees_equal(found, expected)
    assert state.arrays.count == 4


@on_every_device
@as_users_have_it
@pytest.mark.parametrize("codec", ["ratio", "bfloat16"])
def test_states_in_fewer_bits(codec):
    """Updates of Adam stay close: its second moments are stored as second moments are."""
    tx = optax.adam(1e-2)
    expected, _ = train(tx, to_jax(PARAMS), GRADS)
    quantization = Quantization(codec, min_size=0)
    found, state = train(paged(tx, quantization=quantization), to_jax(PARAMS), GRADS)
    assert_trees_close(found, expected, rtol=0, atol=2e-2 if codec == "ratio" else 2e-3)
    names = export_moments(state)
    assert {array.itemsize for key, array in names.items() if key.endswith(".state")} == {
        1 if codec == "ratio" else 2
    }


@on_cpu
@as_users_have_it
def test_a_format_for_each_parameter():
    tx = paged(
        ADAM, quantization=Quantization(lambda p: {**dict.fromkeys(p, "ratio"), "w": "bfloat16"})
    )
    _, state = train(tx, to_jax(PARAMS), GRADS[:1])
    dtypes = {key: array.dtype.name for key, array in export_moments(state).items()}
    assert dtypes.pop(next(key for key in dtypes if "['w']" in key)) == "uint16"
    of_h = [dtype for key, dtype in dtypes.items() if "['h']" in key and key.endswith(".state")]
    assert of_h == ["uint8"] * 2


# --- Ways to step -------------------------------------------------------------------------------


def scanned(tx, params, grads):
    def body(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params, grads: jax.lax.scan(body, (params, tx.init(params)), grads)[0])
    return run(params, stack(grads))


def eager(tx, params, grads):
    return train(tx, params, grads, update=tx.update)


def donated(tx, params, grads):
    step = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=(1, 2))
    state, params = tx.init(params), jax.tree.map(jnp.copy, params)
    for grad in grads:
        params, state = step(grad, state, params)
    return params, state


@on_every_device
@as_users_have_it
@pytest.mark.parametrize("way", [scanned, eager, donated], ids=lambda way: way.__name__)
def test_ways_to_step(way):
    expected, _ = train(ADAM, to_jax(PARAMS), GRADS)
    found, state = way(paged(ADAM, quantization=FLOAT32), to_jax(PARAMS), GRADS)
    assert_trees_close(found, expected, rtol=1e-6, atol=1e-7)
    assert optax.tree.get(state.inner_state, "count") == state.arrays.count == len(GRADS)


@on_every_device
@as_users_have_it
def test_multi_steps():
    tx = optax.chain(optax.clip_by_global_norm(1.0), ADAM)
    expected, _ = train(optax.MultiSteps(tx, 2), to_jax(PARAMS), GRADS)
    found, _ = train(MultiSteps(paged(tx, quantization=FLOAT32), 2), to_jax(PARAMS), GRADS)
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-6)


@as_users_have_it
@pytest.mark.parametrize(
    "kind, cut_params, cut_grads",
    [
        (AxisType.Auto, False, True),
        (AxisType.Explicit, True, True),
        pytest.param(AxisType.Auto, True, True, marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, True, False, marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, False, True, marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, True, False, marks=pytest.mark.slow),
    ],
)
def test_devices(kind, cut_params, cut_grads):
    """Each keeps the arrays of its part, and new parameters are cut as the old ones."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind), devices=jax.devices("cpu"))
    specs = {"a": P("x", None), "b": P(None, ("x", "y")), "c": P(), "s": P()}
    shapes = {"a": (64, 128), "b": (128, 64), "c": (300,), "s": ()}

    def place(tree, cut):
        return {
            name: jax.device_put(leaf, NamedSharding(mesh, specs[name] if cut else P()))
            for name, leaf in tree.items()
        }

    params, grads = make_tree(0, shapes), [make_tree(step, shapes) for step in range(3)]
    inner = optax.chain(optax.clip_by_global_norm(1.0), ADAM)
    with jax.default_device(jax.devices("cpu")[0]):
        expected, _ = train(inner, to_jax(params), grads)
    with jax.set_mesh(mesh):
        tx = paged(inner, quantization=FLOAT32)
        found, state = train(
            tx, place(params, cut_params), [place(grad, cut_grads) for grad in grads]
        )
        assert_trees_close(found, expected, rtol=1e-5, atol=1e-6)
        read = moments(state).state
    assert read[1][0].mu["a"].shape == (64, 128)
    assert found["a"].sharding.is_fully_replicated != cut_params
    assert len(memory_report(state).devices) == 8


# --- Tokens -------------------------------------------------------------------------------------


@on_every_device
@as_users_have_it
def test_a_refused_step_changes_nothing():
    tx = paged(ADAM)
    states = [tx.init(PARAMS)]
    for grad in GRADS[:2]:
        states.append(tx.update(grad, states[-1], PARAMS)[1])
    before = moments(states[-1])

    @jax.jit
    def again(grads, state, params):
        return tx.update(grads, state, params)

    updates, state = again(GRADS[3], states[1], PARAMS)
    assert is_zero(updates)
    assert_trees_equal(state.inner_state, states[1].inner_state)
    np.testing.assert_array_equal(state.arrays.token.value, states[1].arrays.token.value)
    assert_trees_equal(newest(state).inner_state, states[-1].inner_state)
    with pytest.raises(RAISES, match="not the newest"):
        finish(tx.update(GRADS[3], states[1], PARAMS))
    assert_trees_equal(moments(states[-1]), before)


@on_every_device
@as_users_have_it
def test_a_step_that_did_not_end_is_no_state():
    """Between its first load and its last store, nobody can use what is stored."""
    tx = paged(ADAM)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    handle, version = np.asarray(state.arrays.token.value).tolist()
    arrays = state.arrays._replace(
        token=jax.tree.map(lambda _: jnp.array([handle, -version], jnp.int32), state.arrays.token)
    )
    with pytest.raises(RAISES, match="not the newest"):
        finish(tx.update(GRADS[1], state._replace(arrays=arrays), PARAMS))
    assert not is_zero(tx.update(GRADS[1], state, PARAMS)[0])


@on_every_device
@as_users_have_it
def test_replay():
    """The last step can be run again, with other gradients; not the one before."""
    tx = paged(ADAM, replay=True, quantization=FLOAT32)
    update = jax.jit(tx.update)
    states = [tx.init(PARAMS)]
    for grad in GRADS[:3]:
        states.append(update(grad, states[-1], PARAMS)[1])
    again, state = update(GRADS[3], states[2], PARAMS)
    alone = ADAM.init(PARAMS)
    for grad in [*GRADS[:2], GRADS[3]]:
        expected, alone = ADAM.update(grad, alone, PARAMS)
    assert_trees_close(again, expected, rtol=1e-6, atol=1e-8)
    with pytest.raises(RAISES, match="not the newest"):
        finish(update(GRADS[0], states[1], PARAMS))
    report = memory_report(state)
    assert report.total == 2 * report.replay == release(state)


@on_every_device
@as_users_have_it
def test_an_initial_state_starts_over():
    tx = paged(optax.adagrad(0.1, initial_accumulator_value=0.5), quantization=FLOAT32)
    initial = tx.init(PARAMS)
    first, _ = tx.update(GRADS[0], initial, PARAMS)
    again, state = tx.update(GRADS[0], initial, PARAMS)
    assert_trees_equal(again, first)
    np.testing.assert_allclose(
        moments(state).state[0].sum_of_squares["w"], 0.5 + GRADS[0]["w"] ** 2
    )


@on_cpu
@as_users_have_it
def test_release():
    before = num_arenas()
    _, state = jax.block_until_ready(train(paged(ADAM), to_jax(PARAMS), GRADS[:1]))
    assert num_arenas() == before + 1 and release(state) > 0 and num_arenas() == before
    with pytest.raises(RAISES, match="were released"):
        finish(paged(ADAM).update(GRADS[0], state, PARAMS))


# --- Gradients that are not finite --------------------------------------------------------------


@on_every_device
@as_users_have_it
@pytest.mark.parametrize("outside", [False, True])
def test_skipped_steps_leave_no_trace(outside):
    tx = paged(ADAM, quantization=FLOAT32)
    careful = paged(ADAM, quantization=FLOAT32, non_finite="skip_step")
    if outside:
        careful = skip_non_finite(optax.chain(optax.clip_by_global_norm(1e9), tx), "step")
    bad = {**GRADS[3], "w": np.full((64, 80), np.nan, f32)}
    found, state = scanned(careful, to_jax(PARAMS), [bad, *GRADS[:2], bad, GRADS[2]])
    expected, plain = scanned(tx, to_jax(PARAMS), GRADS[:3])
    assert_trees_close(found, expected, rtol=1e-6, atol=1e-7)
    assert state.skipped == 2 and optax.tree.get(state, "skipped") == 2
    assert_trees_close(moments(state), moments(plain), rtol=1e-5)


# --- Checkpoints and reports --------------------------------------------------------------------


@on_every_device
@as_users_have_it
@pytest.mark.parametrize("codec", ["ratio", "float32"])
def test_save_and_load(tmp_path, codec):
    tx = paged(ADAM, quantization=Quantization(codec, min_size=0))
    params, state = train(tx, to_jax(PARAMS), GRADS[:2])
    path = tmp_path / "moments.safetensors"
    save_moments(state, path)
    expected, _ = tx.update(GRADS[2], state, params)
    release(state)
    found, _ = tx.update(GRADS[2], load_moments(state, path), params)
    assert_trees_equal(found, expected)


@on_cpu
@as_users_have_it
def test_pickle():
    tx = paged(ADAM)
    params, state = train(tx, to_jax(PARAMS), GRADS[:2])
    text = pickle.dumps(state)
    expected, _ = tx.update(GRADS[2], state, params)
    release(state)
    assert_trees_equal(tx.update(GRADS[2], pickle.loads(text), params)[0], expected)


@on_cpu
@as_users_have_it
@pytest.mark.parametrize("replay", [False, True])
def test_planner(replay):
    """What is planned is what is kept."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), paged(ADAM, replay=replay))
    _, state = train(tx, to_jax(PARAMS), GRADS[:1])
    kept = kept_by(tx, PARAMS)
    assert kept.forecast(2**40)["on_cpu"] == memory_report(state).total
    assert kept.in_xla == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@on_every_device
@as_users_have_it
def test_reset():
    """By names in the wrapped state: rows of one array, in both kinds of blocks."""
    tx = paged(optax.adam(1e-2), quantization=Quantization(min_size=0))
    _, state = train(tx, to_jax(PARAMS), GRADS[:2])
    before = moments(state).state[0]
    rows = np.arange(64)[:, None] >= 60
    names = optax.ScaleByAdamState(count=None, mu={"w": rows}, nu={"w": rows})
    state = reset(state, (names,))
    after = moments(state).state[0]
    for kind in ("mu", "nu"):
        was, now = getattr(before, kind), getattr(after, kind)
        assert not now["w"][60:].any()
        same_bits(now["w"][:60], was["w"][:60])
        same_bits(now["v"], was["v"])
    assert np.isfinite(tx.update(GRADS[2], state, PARAMS)[0]["w"]).all()


@on_cpu
@as_users_have_it
def test_reset_takes_no_zeros_for_a_beginning():
    tx = paged(optax.contrib.schedule_free(optax.adam(1e-2), 1e-2))
    _, state = train(tx, to_jax(PARAMS), GRADS[:1])
    with pytest.raises(ValueError, match=r"other values than zero.*wrapped state.*init\(params\)"):
        reset(state)
    with pytest.raises(ValueError, match=r"mask for \['w'\].*tree of the wrapped state"):
        reset(state, {"w": True})
    save = moments(state)
    restored = pickle.loads(pickle.dumps(state))
    with pytest.raises(ValueError, match="other values than zero"):
        reset(restored)
    assert_trees_equal(moments(restored), save)


@on_cpu
@as_users_have_it
def test_reset_after_a_step_that_failed():
    """With two copies, what was there before it is the newest."""
    fails = False

    def check(x):
        if fails:
            raise RuntimeError("no value")
        return x

    def update(updates, state, params=None):
        del params
        updates = jax.tree.map(lambda u: jax.pure_callback(check, u, u), updates)
        return updates, {"kept": jax.tree.map(jnp.add, state["kept"], updates)}

    inner = keep("float32")
    tx = paged(optax.GradientTransformation(inner.init, update), replay=True, quantization=FLOAT32)
    grads = {"a": np.ones((64, 64), f32), "b": np.ones((64, 64), f32)}
    step = jax.jit(tx.update)
    _, state = jax.block_until_ready(step(grads, tx.init(grads)))
    fails = True
    with pytest.raises(RAISES, match="no value"):
        jax.block_until_ready(step(grads, state))
    fails = False
    state = reset(newest(state), {"kept": {"a": True}})
    _, state = step(grads, state)
    found = moments(state).state["kept"]
    assert_trees_equal(found, {"a": grads["a"], "b": 2 * grads["b"]})


@on_cpu
@as_users_have_it
def test_released_in_the_middle_of_a_step():
    """What is loaded after that is no moments, and moves no parameter."""
    handles = []

    def let_go(x):
        for handle in handles:
            _ext.release(handle)
        return x

    def update(updates, state, params=None):
        del params
        kept = {name: state["kept"][name] + updates[name] for name in updates}
        kept["b"] = jax.pure_callback(let_go, kept["b"], kept["b"])  # before it is stored
        return kept, {"kept": kept}

    tx = paged(optax.GradientTransformation(keep("float32").init, update), quantization=FLOAT32)
    grads = {name: np.ones((64, 64), f32) for name in "ab"}
    step = jax.jit(tx.update)
    _, state = jax.block_until_ready(step(grads, tx.init(grads)))
    token = np.asarray(state.arrays.token.value)
    handles.append(int(token[0]))
    updates, state = jax.block_until_ready(step(grads, state))
    assert all(not update.any() or np.all(update == 2) for update in updates.values())
    assert state.arrays.count == 1 and is_zero(updates["b"])
    np.testing.assert_array_equal(state.arrays.token.value, token)
    with pytest.raises(RAISES, match="were released.*its whole update or none"):
        finish(step(grads, state))


@on_cpu
@as_users_have_it
def test_no_state_of_optax():
    """Neither way, and the texts say where the arrays are."""
    tx = paged(ADAM)
    params, state = train(tx, to_jax(PARAMS), GRADS[:1])
    with pytest.raises(NotImplementedError, match=r"moments\(opt_state\).state"):
        to_optax(state)
    with pytest.raises(NotImplementedError, match=r"init\(params\)"):
        from_optax(tx.init(params), ADAM.init(params))


@on_cpu
@as_users_have_it
def test_missing_arrays_cannot_restart():
    """So that is no advice for them."""
    tx = paged(ADAM)
    state = tx.init(PARAMS)
    elsewhere = state._replace(
        arrays=state.arrays._replace(
            token=jax.tree.map(lambda _: jnp.array([2**30, 5], jnp.int32), state.arrays.token)
        )
    )
    with pytest.raises(RAISES, match=r"not in this process.*make a new state") as caught:
        finish(tx.update(GRADS[0], elsewhere, PARAMS))
    assert "restart" not in str(caught.value)


@on_cpu
@as_users_have_it
def test_a_file_holds_the_arrays(tmp_path):
    tx = paged(ADAM, paging=Paging(directory=tmp_path), quantization=FLOAT32)
    expected, _ = train(ADAM, to_jax(PARAMS), GRADS[:2])
    found, _ = train(tx, to_jax(PARAMS), GRADS[:2])
    assert_trees_close(found, expected, rtol=1e-6, atol=1e-7)


@on_cpu
@as_users_have_it
def test_memory():
    """Two arrays of Adam, a byte for each element and a word for each block."""
    params = {"w": jnp.zeros((256, 256))}
    _, state = train(paged(optax.adam(1e-2)), params, [params])
    assert memory_report(state).total == 2 * 256 * (256 + 4)
    assert [leaf.size for leaf in jax.tree.leaves(state)] == [1, 2, 1]
    assert isinstance(state.inner_state[0].mu["w"], optax.MaskedNode)


def check_no_more_than_two_leaves_in_xla():
    """XLA's temporary memory: what a leaf's arrays take once loaded and once to be stored."""
    leaf, count = (256, 256), 16
    params = {f"w{i:02d}": jax.ShapeDtypeStruct(leaf, f32) for i in range(count)}

    def temporary(tx):
        def step(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        arguments = params, jax.eval_shape(tx.init, params), params
        compiled = jax.jit(step, donate_argnums=(1, 2)).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes, memory.argument_size_in_bytes

    nbytes = 4 * 256 * 256
    temp, arguments = temporary(paged(optax.scale_by_adam()))
    assert temp <= 5 * nbytes  # two arrays, loaded and new, and the gradient's update
    assert arguments <= 2 * count * nbytes + 64
    assert temporary(optax.scale_by_adam())[1] >= 4 * count * nbytes


@on_cpu
@as_users_have_it
def test_no_more_than_two_leaves_in_xla():
    check_no_more_than_two_leaves_in_xla()


@pytest.mark.gpu
@as_users_have_it
def test_no_more_than_two_leaves_in_xla_for_a_gpu():
    check_no_more_than_two_leaves_in_xla()


@as_users_have_it
def test_a_parameter_ends_before_the_next_begins():
    """What tells whether a parameter's step was lost is known before the next one is stored.

    XLA for GPUs would find it out for all parameters at once, after the last one, and keep all of
    their new arrays until then.
    """
    params = {f"w{i}": jax.ShapeDtypeStruct((64, 64), f32) for i in range(3)}
    tx = paged(optax.scale_by_adam())
    program = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params)
    made_by, needs = {}, []  # by variable, by equation: numbers of equations
    tokens, verdicts = [], []  # that make a token of arrays, or a truth value
    for number, equation in enumerate(program.eqns):
        sources = {made_by[id(x)] for x in equation.invars if id(x) in made_by}
        needs.append(sources.union(*(needs[source] for source in sources)))
        made_by |= {id(x): number for x in equation.outvars}
        shapes = [x.aval.shape for x in equation.outvars]
        if shapes == [(2,)] and any(x.aval.shape == (64, 64) for x in equation.invars):
            tokens.append(number)
        if () in shapes and any(x.aval.dtype == bool for x in equation.outvars):
            verdicts.append(number)
    _, *stores = tokens  # the first one begins the step
    assert len(stores) == 3
    for store, after in zip(stores, stores[1:], strict=False):
        assert any(store in needs[verdict] for verdict in verdicts if verdict in needs[after])


# --- Refusals -----------------------------------------------------------------------------------


def of_another_optimizer():
    return paged(ADAM).update(GRADS[0], optax.adam(1e-2).init(PARAMS), PARAMS)


def of_another_wrapped_one():
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 1.0))
    return paged(tx).update(GRADS[0], paged(ADAM).init(PARAMS), PARAMS)


def of_exchanged_leaves():
    """The new array of one parameter is the old one of another."""

    def update(updates, state, params=None):
        del params
        old = state["kept"]
        return updates, {"kept": {"a": old["b"], "b": old["a"]}}

    tx = paged(optax.GradientTransformation(keep("float32").init, update))
    params = {"a": np.ones(300, f32), "b": np.ones(300, f32)}
    return tx.update(params, tx.init(params), params)


def of_a_paged_one():
    return paged(optax.chain(optax.trace(0.9), paged_adamw8bit(1e-3))).init(PARAMS)


def without_arrays():
    return paged(optax.sgd(0.1)).init(PARAMS)


def initial_values_without_parameters():
    kept = optax.GradientTransformation(
        lambda p: {"z": jax.tree.map(jnp.copy, p)}, lambda u, s, p=None: (u, s)
    )
    return paged(kept).update(GRADS[0], paged(kept).init(PARAMS))


def a_mapped_axis():
    tx = paged(ADAM)
    state = tx.init(PARAMS)
    return jax.vmap(tx.update, (0, None, None))(stack([GRADS[0]] * 2), state, PARAMS)


def a_derivative():
    tx = paged(ADAM)
    state = tx.init(PARAMS)

    def loss(grad):
        return jnp.sum(tx.update({**GRADS[0], "w": grad}, state, PARAMS)[0]["w"])

    return jax.grad(loss)(jnp.ones((64, 80)))


def skipped_elements():
    return paged(ADAM, non_finite="skip_element")


def another_shape():
    tx = paged(ADAM)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    other = {**PARAMS, "w": np.ones((80, 64), f32)}
    return tx.update(other, state, other)


MISUSES = {
    of_another_optimizer: (TypeError, r"init\(params\)"),
    of_another_wrapped_one: (TypeError, r"init\(params\)"),
    of_exchanged_leaves: (ValueError, r"\['b'\] and \['a'\] meet.*exchange of leaves"),
    of_a_paged_one: (ValueError, r"cannot wrap.*chain\(paged\(tx\), paged_adamw8bit"),
    without_arrays: (ValueError, "as it is"),
    initial_values_without_parameters: (ValueError, "third argument"),
    a_mapped_axis: (NotImplementedError, "cannot be vmapped"),
    a_derivative: (TypeError, "cannot be differentiated"),
    skipped_elements: (ValueError, "skip_step"),
    another_shape: (RAISES, r"\(64, 80\).*\(80, 64\)"),
}


@on_cpu
@as_users_have_it
@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.__name__)
def test_misuses(misuse):
    errors, match = MISUSES[misuse]
    with pytest.raises(errors, match=match):
        finish(misuse())


@on_cpu
@as_users_have_it
def test_nothing_to_update():
    tx = paged(ADAM)
    state = tx.init({})
    updates, state = tx.update({}, state, {})
    assert updates == {} and isinstance(state, PagedTransformationState)
