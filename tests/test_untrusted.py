"""Checkpoints from elsewhere: every one ends in an error or in what it says, never in a crash."""

import json
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_optax
from helpers import FORMATS as FORMAT_NUMBERS
from helpers import (
    RAISES,
    RULES,
    assert_trees_equal,
    finish,
    hooks,
    make_tree,
    step_blocks,
    tables,
    to_jax,
)
from paged_optax import Quantization, load_moments, moments, save_moments

SHAPES = {"b": (7,), "w": (64, 80)}


@pytest.fixture
def params():
    return to_jax(make_tree(0, SHAPES))


@pytest.fixture
def tx():
    return paged_optax.paged_adamw8bit(1e-2)


@pytest.fixture
def trained(tx, params):
    """Parameters, and a state after three steps."""
    return params, train(tx, params)


def train(tx, params):
    state = tx.init(params)
    for i in range(3):
        grads = {k: g.astype(params[k].dtype) for k, g in to_jax(make_tree(i, SHAPES)).items()}
        _, state = jax.jit(tx.update)(grads, state, params)
    return state


def mutate(data, rng):
    """Another file: bits flipped, noise, or another length."""
    data = bytearray(data)
    kind = rng.integers(5)
    at = int(rng.integers(len(data)) if rng.integers(2) else rng.integers(2000)) % len(data)
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[at : at + 16] = rng.bytes(16)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data += rng.bytes(int(rng.integers(1, 100)))
    else:
        del data[at : at + int(rng.integers(1, 50))]
    return bytes(data)


DEADLINE = 60  # seconds


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.endurance)])
def test_mutated_files(count, tx, trained, tmp_path):
    """An error, or identical contents; never a wrong state."""
    params, state = trained
    path = tmp_path / "m.safetensors"
    save_moments(state, path)
    good = path.read_bytes()
    update = jax.jit(tx.update)
    expected = update(params, load_moments(tx.init(params), path), params)[0]
    rng = np.random.default_rng(5)
    refused = tried = 0
    end = time.monotonic() + DEADLINE
    while tried < count and (tried < 20 or time.monotonic() < end):
        tried += 1
        path.write_bytes(mutate(good, rng))
        restored = None
        try:
            restored = load_moments(tx.init(params), path)
            assert_trees_equal(finish(update(params, restored, params))[0], expected)
        except RAISES:
            refused += 1
        finally:
            if restored is not None:
                paged_optax.release(restored)
    assert refused > 0.8 * tried


FORMATS = {
    "ratio": ({}, jnp.float32),
    "dynamic": ({"quantization": Quantization("dynamic")}, jnp.float32),
    "float32": ({"quantization": Quantization("float32")}, jnp.float32),
    "compensated": ({"param_rounding": "compensated"}, jnp.bfloat16),
}


# What no step stores: NaN, infinities, numbers below 0, windows without a unit or with 255 of them,
# and bits without a meaning.
NO_WORDS = [0x7FC00000, 0x7F800000, 0xFF800000, 0xBF800000, 0x7F7FFFFF, 0xFFFFFFFF, 0x01FF0080]
NO_WORDS += [0xFFFF00FF, 0x12340000, 0xFFFF01FF, 0xFFFF0080, 0xF0000008, 0x80000000, 1]


@pytest.mark.parametrize("format", FORMAT_NUMBERS)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "array"])
def test_a_step_over_bytes_that_none_stored(rule, format):
    """Whatever lies in an arena, a step ends, and touches nothing else (under AddressSanitizer)."""
    row = tables.RULES[RULES[rule]]
    hyperparams = [0.9 if domain == "decay" else 1e-8 for _, domain in row["hyperparams"]]
    _, end, _, _ = hooks.region(RULES[rule], FORMAT_NUMBERS[format], 3)
    rng = np.random.default_rng(7)
    for word in NO_WORDS:
        arena = rng.integers(0, 256, end + 64, np.uint8)
        words = arena[: end // 4 * 4].view(np.uint32)
        words[rng.random(words.size) < 0.5] = word
        words[-3 * len(row["states"]) :] = word  # where a format has words
        after = arena[end:].copy()
        for count in range(2):
            values = rng.standard_normal(3 * 256).astype(np.float32)
            step_blocks(values, arena, format, [(0, 3)], hyperparams, count, rule=rule)
        np.testing.assert_array_equal(arena[end:], after)


@pytest.mark.parametrize("count", [100, pytest.param(2_500, marks=pytest.mark.endurance)])
@pytest.mark.parametrize("format", FORMATS)
def test_mutated_arrays(format, count):
    """Without checksums, values are checked: what is accepted is finite, and can be trained on."""
    options, dtype = FORMATS[format]
    tx = paged_optax.paged_adamw8bit(1e-2, **options)
    params = {k: p.astype(dtype) for k, p in to_jax(make_tree(0, SHAPES)).items()}
    good = paged_optax.export_moments(train(tx, params))
    update = jax.jit(tx.update)
    rng = np.random.default_rng(6)
    names = [name for name in good if name != "paged_optax"]
    refused = tried = 0
    end = time.monotonic() + DEADLINE / len(FORMATS)
    while tried < count and (tried < 20 or time.monotonic() < end):
        tried += 1
        name = names[rng.integers(len(names))]
        data = bytearray(good[name].tobytes())
        for _ in range(rng.integers(1, 4)):
            at, size = int(rng.integers(len(data))), int(rng.integers(1, 9))
            data[at : at + size] = rng.bytes(len(data[at : at + size]))
        array = np.frombuffer(bytes(data), good[name].dtype).reshape(good[name].shape)
        restored = paged_optax.import_moments(tx.init(params), good | {name: array})
        try:
            _, state = finish(update(params, restored, params))
            found = moments(state)
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
            assert all(np.all(leaf >= 0) for leaf in jax.tree.leaves(found.nu))
        except RAISES:
            refused += 1
        finally:
            paged_optax.release(restored)
    assert refused < tried


def with_metadata(data, change):
    """The file with other metadata, and a header without a checksum that fits."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["paged_optax"])
    change(about)
    header["__metadata__"]["paged_optax"] = json.dumps(about)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _set(**values):
    return lambda about: about["states"][0].update(values)


def _leaf(**values):
    return lambda about: about["states"][0]["leaves"][1].update(values)


BAD = {
    "newer": (lambda about: about.update(format=2), "newer"),
    "count": (_set(count=-1), "not a size"),
    "large count": (_set(count=2**31), "count"),
    "rule": (_set(rule="x"), "unknown optimizer"),
    "residuals": (_set(has_residuals=1), "not a bool"),
    "format": (_leaf(format="x"), "format"),
    "huge": (_leaf(shape=[2**62, 2**62], box=[2**62, 2**62]), "not as its metadata|tensors"),
    "negative": (_leaf(shape=[-64, 80]), "not a size"),
    "float": (_leaf(shape=[64.0, 80]), "not a size"),
    "uneven": (_leaf(box=[48, 80]), "boxes"),
    "no start": (_leaf(starts=[[1, 0]]), "no box begins"),
    "twice": (_leaf(starts=[[0, 0], [0, 0]]), "twice"),
    "states": (lambda about: about.update(states=None), "damaged"),
    "leaves": (_set(leaves=None), "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_metadata(case, tx, params, trained, tmp_path):
    path = tmp_path / "m.safetensors"
    save_moments(trained[1], path)
    change, message = BAD[case]
    path.write_bytes(with_metadata(path.read_bytes(), change))
    with pytest.raises(ValueError, match=message):
        load_moments(tx.init(params), path)


def test_bad_arrays(tx, params, trained):
    arrays = paged_optax.export_moments(trained[1])
    for name in arrays:
        if name == "paged_optax":
            continue
        for bad in (arrays[name].astype(np.float64), arrays[name].ravel()[1:]):
            with pytest.raises(ValueError, match="and must be"):
                paged_optax.import_moments(tx.init(params), arrays | {name: bad})
        with pytest.raises(ValueError, match="missing"):
            rest = {key: array for key, array in arrays.items() if key != name}
            paged_optax.import_moments(tx.init(params), rest)
    with pytest.raises(ValueError, match="not moments from export_moments"):
        paged_optax.import_moments(tx.init(params), {})


# --- Memory --------------------------------------------------------------------------------------


def memory_of_process():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("count", [100, pytest.param(1_000, marks=pytest.mark.endurance)])
def test_restored_and_dropped_again(count, tx, tmp_path):
    """The memory of the process stays what it was."""
    params = {"w": jnp.ones((512, 512))}  # half a MiB of moments
    _, state = tx.update(params, tx.init(params), params)
    save_moments(state, tmp_path / "m.safetensors")
    arrays = paged_optax.export_moments(state)
    update = jax.jit(tx.update)

    def restore():
        for restored in (
            load_moments(tx.init(params), tmp_path / "m.safetensors"),
            paged_optax.import_moments(tx.init(params), arrays),
        ):
            for state in (restored, update(params, restored, params)[1]):
                jax.block_until_ready(state)
            paged_optax.release(state)
        paged_optax.release(load_moments(tx.init(params), tmp_path / "m.safetensors"))

    for _ in range(20):
        restore()
    before = memory_of_process()
    for _ in range(count):
        restore()
    assert memory_of_process() - before < 48 * 2**20
