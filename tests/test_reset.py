"""`reset`: chosen elements have moments of zero, and all others keep every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import (
    assert_trees_equal,
    find_state,
    make_tree,
    num_arenas,
    read_leaves,
    reference,
    to_jax,
)
from paged_optax import (
    Paging,
    Quantization,
    StateRefused,
    load_moments,
    moments,
    newest,
    paged_adamw8bit,
    paged_ademamix8bit,
    paged_lion8bit,
    paged_rmsprop8bit,
    reset,
    save_moments,
)

SHAPES = {"b": (7,), "scalar": (), "w": (64, 81)}
FORMATS = ["ratio", "ratio6", "ratio4", "dynamic", "bfloat16", "float32"]
RULES = {  # with the signs of their states
    "adam": (paged_adamw8bit, [True, False]),
    "lion": (paged_lion8bit, [True]),
    "rms": (paged_rmsprop8bit, [False]),
    "ademamix": (paged_ademamix8bit, [True, True, False]),
}


def make_params():
    return to_jax(make_tree(0, SHAPES))


def trained(tx, params, num_steps=3):
    state = tx.init(params)
    for i in range(num_steps):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(p * (i + 1)), params)
        _, state = tx.update(grads, state, params)
    return state


def rows():
    mask = np.zeros((64, 1), bool)
    mask[[3, 40]] = True
    return {"w": mask}


def elements():
    mask = np.random.default_rng(0).random((64, 81)) < 0.3
    mask[:10] = True  # some blocks are reset as a whole
    return {"b": np.arange(7) == 2, "w": jnp.asarray(mask)}


WHERE = {
    "everything": lambda: True,
    "leaf": lambda: {"w": True, "b": False},
    "rows": rows,
    "columns": lambda: {"w": np.arange(81) % 5 == 0},
    "elements": elements,
    "scalar": lambda: {"scalar": True, "w": None},
}


def masks_of(where):
    if where is True:
        return {name: np.ones(shape, bool) for name, shape in SHAPES.items()}
    none = dict.fromkeys(SHAPES, False) | {k: v for k, v in where.items() if v is not None}
    return {name: np.broadcast_to(none[name], shape) for name, shape in SHAPES.items()}


def assert_reset(before, after, masks):
    """Zero where the masks say so, and the same bits elsewhere."""
    for old, new in zip(before, after, strict=True):
        if old is not None:
            assert_trees_equal(new, {k: np.where(masks[k], 0, old[k]) for k in old})


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule, signed", RULES.values(), ids=RULES)
def test_every_format_and_mask(rule, signed, format, where, device):
    params = make_params()
    tx = rule(1e-2, quantization=Quantization(format, min_size=8))
    state = trained(tx, params)
    before, place = moments(state), "cpu" if device.platform == "cpu" else "cuda"
    codes = read_leaves(place, 0, *find_state(state).token.tolist())
    new = reset(state, where())
    masks = masks_of(where())
    assert_reset(before, moments(new), masks)
    assert new[0].count == state[0].count and num_arenas() == 1
    # Codes are those of the reference, and without a mask the old ones.
    names = [format if np.prod(SHAPES[k]) >= 8 else "float32" for k in sorted(SHAPES)]
    after = read_leaves(place, 0, *find_state(new).token.tolist())
    for kind, name, old, stored in zip(names, sorted(SHAPES), codes, after, strict=True):
        mask = masks[name].ravel()
        padded = np.pad(mask, (0, -mask.size % 256), constant_values=True)
        expected = reference.from_arrays(kind, list(old), signed)
        if mask.any():
            expected = reference.reset(expected, signed, padded)
        expected = [part for parts in reference.to_arrays(expected) for part in parts]
        for actual, wanted in zip(stored, expected, strict=True):
            np.testing.assert_array_equal(actual.view(np.uint8), wanted.view(np.uint8))
    with pytest.raises(StateRefused, match="not the newest"):
        tx.update(params, state, params)
    updates, _ = tx.update(params, newest(state), params)
    assert all(np.isfinite(update).all() for update in jax.tree.leaves(updates))


@pytest.mark.parametrize("signed", [signs for _, signs in RULES.values()], ids=RULES)
@pytest.mark.parametrize("format", FORMATS)
def test_reference(format, signed):
    """On blocks of all kinds: with and without a code for zero, partly and wholly reset."""
    rng = np.random.default_rng(1)
    values = [rng.standard_normal(5 * 256).astype(np.float32) for _ in signed]
    values = [x if sign else x * x for x, sign in zip(values, signed, strict=True)]
    for x in values:
        x[300:400] = 0
    random = rng.integers(0, 2**32, values[0].size, np.uint32)
    stored = encode(format, values, signed, random)
    mask = rng.random(values[0].size) < 0.2
    mask[512:768], mask[1024:] = True, False
    old = reference.decode(stored, signed, mask.size)
    reset_state = reference.reset(stored, signed, mask)
    for a, b in zip(reference.decode(reset_state, signed, mask.size), old, strict=True):
        np.testing.assert_array_equal(a, np.where(mask, 0, b))
    zero = encode(format, [np.zeros(256, np.float32) for _ in signed], signed, random[:256])
    for parts, zeros in zip(
        reference.to_arrays(reset_state), reference.to_arrays(zero), strict=True
    ):
        for part, expected in zip(parts, zeros, strict=True):
            size = expected.size
            np.testing.assert_array_equal(part[2 * size : 3 * size], expected)


def encode(format, values, signed, random):
    if format == "float32":
        return tuple(values)
    if format == "dynamic":
        is_signed = [sign or len(signed) == 1 for sign in signed]
        return tuple(reference.quantize(x, sign) for x, sign in zip(values, is_signed, strict=True))
    if format == "bfloat16":
        return tuple(reference.quantize_halves(x, random) for x in values)
    if len(signed) == 3:
        return reference.quantize_two_ratios(*values, random)
    if len(signed) == 2:
        return reference.quantize_ratio(*values, random)
    if signed == [False]:
        return (reference.quantize_window(values[0], random, np.ones_like(values[0])),)
    return (reference.quantize_squares(values[0], random),)


PLACES = {
    "file": (lambda folder: Paging(directory=folder), "cpu"),
    "host": (lambda _: Paging(device_bytes=0), "gpu"),
    "half": (lambda _: Paging(device_bytes=2 << 20), "gpu"),
    "pinned": (lambda _: Paging(memory="pinned", device_bytes=2 << 20), "gpu"),
}


@pytest.mark.parametrize("paging, platform", PLACES.values(), ids=PLACES)
def test_wherever_the_moments_are(paging, platform, device, tmp_path):
    if device.platform != platform:
        pytest.skip(f"of the {platform}")
    params = {"w": jnp.sin(jnp.arange(3 << 20, dtype=jnp.float32)).reshape(3072, 1024)}
    tx = paged_adamw8bit(1e-2, paging=paging(tmp_path))
    state = trained(tx, params)
    before, mask = moments(state), np.arange(3072)[:, None] % 100 == 7
    after = moments(reset(state, {"w": mask}))
    for old, new in ((before.mu, after.mu), (before.nu, after.nu)):
        np.testing.assert_array_equal(new["w"], np.where(mask, 0, old["w"]))


def test_residuals_and_replay_stay(device):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    tx = paged_adamw8bit(1e-2, param_rounding="compensated", replay=True)
    state = trained(tx, params)
    before = moments(state)
    new = reset(state, rows())
    assert_reset(before, moments(new), masks_of(rows()))
    _, state = tx.update(params, new, params)
    tx.update(params, new, params)  # the step after the reset can be run again
    del device, state


@pytest.mark.parametrize("spec", [("x",), (None, "x"), ("x", "y")], ids=str)
def test_sharded(spec, on_cpu):
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=jax.devices("cpu"))
    put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    params = {"w": put(jnp.sin(jnp.arange(64.0 * 80)).reshape(64, 80))}
    tx = paged_adamw8bit(1e-2, quantization=Quantization(min_size=0))
    step = jax.jit(tx.update)
    _, state = step(params, tx.init(params), params)
    before = moments(state)
    mask = np.random.default_rng(0).random((64, 80)) < 0.1
    new = reset(state, {"w": mask})
    for name in ("mu", "nu"):
        old = getattr(before, name)["w"]
        np.testing.assert_array_equal(getattr(moments(new), name)["w"], np.where(mask, 0, old))
    _, state = step(params, new, params)
    assert state[0].count == 2


def test_a_restored_state_before_its_first_update(tmp_path, on_cpu):
    params = make_params()
    tx = paged_adamw8bit(1e-2, quantization=Quantization(min_size=8))
    state = trained(tx, params)
    before = moments(state)
    save_moments(state, tmp_path / "moments.safetensors")
    restored = load_moments(tx.init(params), tmp_path / "moments.safetensors")
    new = reset(restored, elements())
    assert_reset(before, moments(new), masks_of(elements()))
    assert new[0].count == 3
    _, new = tx.update(params, new, params)
    assert new[0].count == 4


def test_parts_of_a_tree(on_cpu):
    """Each state of a partition takes the masks of its leaves; a prefix covers what is below."""
    params = {"body": make_params(), "head": {"w": jnp.ones((64, 80))}}
    tx = optax.partition(
        {"x": paged_adamw8bit(1e-2), "y": paged_lion8bit(1e-2)}, {"body": "x", "head": "y"}
    )
    state = trained(tx, params)
    before = moments(state)
    after = moments(reset(state, {"body": True, "head": {"w": np.arange(80) < 3}}))
    assert not any(np.any(x) for x in jax.tree.leaves((after.mu["body"], after.nu["body"])))
    np.testing.assert_array_equal(
        after.mu["head"]["w"], np.where(np.arange(80) < 3, 0, before.mu["head"]["w"])
    )


def test_a_state_that_was_never_updated(on_cpu):
    tx, params = paged_adamw8bit(1e-2), make_params()
    fresh = tx.init(params)
    assert_trees_equal(reset(fresh, rows()), fresh)


BAD = {
    "shape": ({"w": np.ones((3, 5), bool)}, ValueError, r"\['w'\] has shape \(3, 5\).*\(64, 81\)"),
    "name": ({"v": True}, ValueError, r"\['v'\], and no paged state has such a parameter"),
    "dtype": ({"w": np.ones((64, 81))}, TypeError, r"\['w'\] is float64\[64, 81\].*bool"),
}


@pytest.mark.parametrize("where, error, match", BAD.values(), ids=BAD)
def test_bad_masks(where, error, match, on_cpu):
    tx, params = paged_adamw8bit(1e-2), make_params()
    state = trained(tx, params)
    before = moments(state)
    with pytest.raises(error, match=match):
        reset(state, where)
    assert_trees_equal(moments(state), before)
    tx.update(params, state, params)


def test_an_old_state(on_cpu):
    tx, params = paged_adamw8bit(1e-2), make_params()
    state = trained(tx, params)
    tx.update(params, state, params)
    with pytest.raises(StateRefused, match="not the newest"):
        reset(state)
    with pytest.raises(ValueError, match="no paged optimizer state"):
        reset(params)
