"""Moments that are read out of their arena and staged for a new state, through the extension.

The oracle is the run that was not interrupted: what it computes and stores afterwards has to be
the same, to the bit.
"""

import copy
import itertools
import threading
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoints import check_rounded_once
from helpers import (
    BLOCK,
    FLOAT32_MOMENTS,
    RAISES,
    assert_trees_equal,
    ext,
    find_state,
    finish,
    is_zero,
    make_tree,
    num_arenas,
    num_unused,
    raise_if_refused,
    read_leaves,
    read_residuals,
    reference,
    release_all,
    to_jax,
    token_of,
)
from paged_optax import (
    Paging,
    Quantization,
    load_moments,
    memory_report,
    moments,
    paged,
    paged_adam8bit,
    paged_adamw8bit,
    paged_lion8bit,
    release,
    save_moments,
    skip_non_finite,
)

f32 = np.float32

# Blocks that are not full, more than one chunk of blocks, nothing, and small leaves in float32.
SHAPES = {"a": (4099,), "b": (7,), "c": (1500, 1001), "d": (0, 5000), "e": (64, 80), "s": ()}


def read_state(state, tx=None):
    """The moments of a state on any devices, as the extension takes them."""
    handle, version = token_of(state)
    spec: dict = {"leaves": []}
    for report in ext.describe(handle, version):
        with ext.snapshot(report["platform"], report["ordinal"], handle, version) as snapshot:
            spec |= {"rule": snapshot.rule, "has_residuals": snapshot.has_residuals}
            for i in range(snapshot.num_leaves):
                whole, start = snapshot.boxes[i]
                if i == len(spec["leaves"]):
                    name = snapshot.names[i] if snapshot.names else ""
                    leaf = {"name": name, "shape": whole, "format": snapshot.formats[i]}
                    spec["leaves"].append({**leaf, "pieces": []})
                pieces = spec["leaves"][i]["pieces"]
                if all(piece["start"] != start for piece in pieces):
                    codes, words, residuals = snapshot.read(i)
                    box = {"start": start, "shape": snapshot.shapes[i]}
                    pieces.append({**box, "codes": codes, "words": words, "residuals": residuals})
    return spec


def with_token(state, token):
    """The state with another token, in the same place."""
    old = find_state(state)
    new = jax.device_put(np.array(token, np.int32), old.token.sharding)

    def replace(node):
        return node._replace(token=new) if isinstance(node, type(old)) else node

    return jax.tree.map(replace, state, is_leaf=lambda node: isinstance(node, type(old)))


def restore(state, spec):
    return with_token(state, ext.stage(spec))


def make_step(tx):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(tx, params, state, steps, dtypes=f32, shapes=SHAPES, put=to_jax):
    step = make_step(tx)
    for i in steps:
        params, state = step(params, state, put(make_tree(i, shapes, dtypes, spread=1.0)))
    return params, state


def assert_same_moments(state, other):
    """Two states on one device each store the same bits, padding included."""
    bits = []
    for each in (state, other):
        handle, version = token_of(each)
        (report,) = ext.describe(handle, version)
        where = report["platform"], report["ordinal"], handle, version
        leaves = [list(map(np.asarray, leaf)) for leaf in read_leaves(*where)]
        with ext.snapshot(*where) as snapshot:
            residuals = read_residuals(*where) if snapshot.has_residuals else []
        bits.append([x.view(np.uint8) for x in itertools.chain(*leaves, residuals)])
    assert_trees_equal(*bits)


OPTIMIZERS = {
    "ratio": lambda **kw: paged_adamw8bit(1e-3, **kw),
    "ratio6": lambda **kw: paged_adamw8bit(1e-3, quantization=Quantization("ratio6"), **kw),
    "ratio4": lambda **kw: paged_adamw8bit(1e-3, quantization=Quantization("ratio4"), **kw),
    "dynamic": lambda **kw: paged_adamw8bit(1e-3, quantization=Quantization("dynamic"), **kw),
    "float32": lambda **kw: paged_adamw8bit(1e-3, quantization=FLOAT32_MOMENTS, **kw),
    "lion": lambda **kw: paged_lion8bit(1e-3, **kw),
    "lion dynamic": lambda **kw: paged_lion8bit(1e-3, quantization=Quantization("dynamic"), **kw),
}
EVERY = pytest.mark.parametrize("name", OPTIMIZERS)


@EVERY
@pytest.mark.parametrize("replay", [False, True], ids=["", "replay"])
def test_goes_on_as_if_nothing_had_happened(device, name, replay):
    tx = OPTIMIZERS[name](replay=replay)
    params = to_jax(make_tree(0, SHAPES))
    params, state = run(tx, params, tx.init(params), range(1, 4))
    spec = read_state(state)
    restored = restore(state, spec)
    expected, last = run(tx, params, state, range(4, 8))
    actual, other = run(tx, params, restored, range(4, 8))
    assert_trees_equal(actual, expected)
    assert_same_moments(other, last)
    assert find_state(other).token[1] == 5


PLACES = [("cpu", None, False)] + [
    pytest.param("gpu", device_bytes, replay, marks=pytest.mark.gpu)
    for device_bytes in (None, 0, 4 * 2**20)
    for replay in (False, True)
]


@pytest.mark.parametrize("device, device_bytes, replay", PLACES, indirect=["device"])
def test_wherever_the_moments_of_a_gpu_lie(device, device_bytes, replay, tmp_path):
    """Three chunks: all in its memory, none, and two of them."""
    tx = OPTIMIZERS["ratio"](replay=replay, paging=Paging(device_bytes=device_bytes))
    shapes = {"w": (1500, 2000), "b": (300,)}
    params = to_jax(make_tree(0, shapes))
    params, state = run(tx, params, tx.init(params), range(1, 3), shapes=shapes)
    save_moments(state, tmp_path / "m.safetensors")
    restored = load_moments(tx.init(params), tmp_path / "m.safetensors")
    expected, last = run(tx, params, state, range(3, 5), shapes=shapes)
    actual, other = run(tx, params, restored, range(3, 5), shapes=shapes)
    assert_trees_equal(actual, expected)
    assert_same_moments(other, last)
    for each in (last, other):
        report = memory_report(each)
        if device_bytes is not None and report.devices[0].free is not None:
            assert report.resident <= device_bytes


@pytest.mark.parametrize("name", ["ratio", "dynamic", "lion"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_residuals_go_on(device, name, dtype):
    dtypes = {leaf: f32 if leaf == "e" else jnp.dtype(dtype) for leaf in SHAPES}
    tx = OPTIMIZERS[name](param_rounding="compensated")
    params = to_jax(make_tree(0, SHAPES, dtypes))
    params, state = run(tx, params, tx.init(params), range(1, 4), dtypes)
    spec = read_state(state)
    assert not is_zero([spec["leaves"][2]["pieces"][0]["residuals"] - f32(128)])
    restored = restore(state, spec)
    expected, last = run(tx, params, state, range(4, 6), dtypes)
    actual, other = run(tx, params, restored, range(4, 6), dtypes)
    assert_trees_equal(actual, expected)
    assert_same_moments(other, last)


def test_a_skipped_first_step_fills_too(device):
    tx = skip_non_finite(paged_adam8bit(1e-3), "step")
    params = to_jax(make_tree(0, SHAPES))
    params, state = run(tx, params, tx.init(params), range(1, 3))
    restored = restore(state, read_state(state))
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    _, restored = make_step(tx)(params, restored, bad)
    assert_trees_equal(moments(restored), moments(state))


def test_with_replay_the_first_step_can_be_run_again(device):
    tx = paged_adam8bit(1e-3, replay=True)
    params = to_jax(make_tree(0, SHAPES))
    params, state = run(tx, params, tx.init(params), range(1, 3))
    restored = restore(state, read_state(state))
    once, _ = run(tx, params, restored, [3])
    again, _ = run(tx, params, restored, [3])
    assert_trees_equal(again, once)


# --- Reading --------------------------------------------------------------------------------------


def train_adam(num_steps=2, shapes=SHAPES, tx=None, **options):
    tx = tx or paged_adam8bit(1e-3, **options)
    params = to_jax(make_tree(0, shapes))
    params, state = run(tx, params, tx.init(params), range(1, 1 + num_steps), shapes=shapes)
    return tx, params, state


def open_state(state):
    handle, version = token_of(state)
    (report,) = ext.describe(handle, version)
    return ext.snapshot(report["platform"], report["ordinal"], handle, version)


def test_a_snapshot_describes_itself(device):
    _, _, state = train_adam()
    handle, version = token_of(state)
    with open_state(state) as snapshot:
        assert (snapshot.handle, snapshot.version, snapshot.rule) == (handle, version, "adam")
        assert (snapshot.num_slots, snapshot.num_devices, snapshot.part) == (1, 1, 0)
        assert snapshot.names == [f"['{name}']" for name in SHAPES]
        assert snapshot.shapes == list(SHAPES.values())
        assert snapshot.formats == [
            "ratio" if np.prod(s) >= 4096 else "float32" for s in SHAPES.values()
        ]
        assert snapshot.boxes == [(s, (0,) * len(s)) for s in SHAPES.values()]
        assert not snapshot.has_residuals
    with pytest.raises(RuntimeError, match="closed"):
        snapshot.read(0)


def test_parts_of_a_leaf(device):
    _, _, state = train_adam()
    with open_state(state) as snapshot:
        leaf = list(SHAPES).index("c")
        codes, words, residuals = snapshot.read(leaf)
        assert residuals is None
        assert [len(x) for x in codes] == [1501500] * 2 and [len(x) for x in words] == [5866] * 2
        for kind, arrays, n in (("codes", codes, BLOCK), ("words", words, 1)):
            for s, array in enumerate(arrays):
                cuts = [0, 1, 4031, 4032, 5865, 5866, 5866]
                parts = [
                    snapshot.read_part(leaf, kind, s, begin, end)
                    for begin, end in itertools.pairwise(cuts)
                ]
                np.testing.assert_array_equal(np.concatenate(parts), array)
                assert len(parts[0]) == n
        for wrong in [
            (leaf, "codes", 2),
            (leaf, "codes", 0, 3, 2),
            (leaf, "residuals"),
            (1, "words"),
        ]:
            with pytest.raises(ValueError, match="no such part"):
                snapshot.read_part(*wrong)
        with pytest.raises(ValueError, match="kind must be"):
            snapshot.read_part(leaf, "scales")
        with pytest.raises(IndexError):
            snapshot.read(len(SHAPES))


def test_a_snapshot_of_another_version_is_refused(device):
    tx, params, state = train_adam()
    _, newer = run(tx, params, state, [9])
    handle, version = token_of(newer)
    where = "cpu" if device.platform == "cpu" else "cuda", 0
    for token in [(handle, version - 1), (handle, 0)]:
        with pytest.raises(RuntimeError, match="not the newest"):
            ext.snapshot(*where, *token)
    with pytest.raises(RuntimeError, match="not in this process"):
        ext.snapshot(*where, 12, 1)


def test_steps_wait_for_a_snapshot(device):
    tx, params, state = train_adam()
    before = read_state(state)
    step = make_step(tx)
    grads = to_jax(make_tree(5, SHAPES))
    jax.block_until_ready(step.lower(params, state, grads).compile())
    done = threading.Event()

    def train():
        jax.block_until_ready(step(params, state, grads))
        done.set()

    snapshot = open_state(state)
    thread = threading.Thread(target=train)
    thread.start()
    assert not done.wait(0.3)
    during = [snapshot.read(i) for i in range(snapshot.num_leaves)]
    assert ext.describe(snapshot.handle, snapshot.version)  # questions do not wait
    closer = threading.Thread(target=snapshot.close)  # any thread may close it
    closer.start()
    closer.join()
    thread.join()
    for leaf, (codes, words, _) in zip(before["leaves"], during, strict=True):
        assert_trees_equal((codes, words), (leaf["pieces"][0]["codes"], leaf["pieces"][0]["words"]))


@pytest.mark.parametrize("name", ["adamw", "any"])
def test_other_states_do_not_wait_for_a_snapshot(device, name):
    exact = Quantization("dynamic")  # without random bits
    tx = {"adamw": paged_adamw8bit, "any": lambda lr, **kw: paged(optax.sgd(lr, 0.9), **kw)}[name](
        1e-2, quantization=exact
    )
    _, _, held = train_adam()
    expected, _ = train_adam(tx=tx, num_steps=4)[1:]
    _, params, state = train_adam(tx=tx)
    with open_state(held):
        actual, _ = finish(run(tx, params, state, [3, 4]))
    assert_trees_equal(actual, expected)


def test_a_released_state_lives_as_long_as_its_snapshot(device):
    _, _, state = train_adam()
    before = read_state(state)
    with open_state(state) as snapshot:
        release(state)
        codes, words, _ = snapshot.read(2)
    piece = before["leaves"][2]["pieces"][0]
    assert_trees_equal((codes, words), (piece["codes"], piece["words"]))


# --- Files ----------------------------------------------------------------------------------------


def to_file(spec, path):
    """The same, with every array in a file."""
    spec = copy.deepcopy(spec)
    with open(path, "wb") as file:
        file.write(b"header")

        def put(array):
            data = np.ascontiguousarray(array).tobytes()
            offset = file.tell()
            file.write(data)
            return (str(path), offset, len(data), zlib.crc32(data))

        for leaf in spec["leaves"]:
            for piece in leaf["pieces"]:
                piece["codes"] = [put(x) for x in piece["codes"]]
                piece["words"] = [put(x) for x in piece["words"]]
                if piece["residuals"] is not None:
                    piece["residuals"] = put(piece["residuals"])
    return spec


@pytest.mark.parametrize("name", ["ratio", "float32"])
def test_from_a_file(device, name, tmp_path):
    tx, params, state = train_adam(tx=OPTIMIZERS[name](param_rounding="compensated"))
    restored = restore(state, to_file(read_state(state), tmp_path / "moments"))
    expected, last = run(tx, params, state, range(4, 6))
    actual, other = run(tx, params, restored, range(4, 6))
    assert_trees_equal(actual, expected)
    assert_same_moments(other, last)


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, match",
    [
        (damage_byte, "checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "too short"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "not a file"),
    ],
    ids=["bit", "cut", "gone", "folder"],
)
def test_damaged_files_are_refused_and_can_be_repaired(tmp_path, damage, match):
    tx, params, state = train_adam()
    path = tmp_path / "moments"
    spec = to_file(read_state(state), path)
    good = path.read_bytes()
    restored = restore(state, spec)
    damage(path)
    count = num_arenas()
    with pytest.raises(RAISES, match=match):
        finish(run(tx, params, restored, [4]))
    assert num_arenas() == count
    if path.is_dir():
        path.rmdir()
    path.write_bytes(good)
    assert_trees_equal(run(tx, params, restored, [4])[0], run(tx, params, state, [4])[0])


# --- Refusals -------------------------------------------------------------------------------------

SMALL = {"big": (600, 7), "small": (3, 5)}


@pytest.fixture(params=["ratio", "dynamic", "float32", "lion"])
def saved(request):
    tx, params, state = train_adam(shapes=SMALL, tx=OPTIMIZERS[request.param]())
    return tx, params, state, read_state(state)


def change(spec, **fields):
    spec = copy.deepcopy(spec)
    spec["leaves"][0] |= fields
    return spec


def change_piece(spec, **fields):
    spec = copy.deepcopy(spec)
    spec["leaves"][0]["pieces"][0] |= fields
    return spec


def test_descriptions_that_do_not_fit_together(saved):
    *_, spec = saved
    piece = spec["leaves"][0]["pieces"][0]
    huge = 2**62
    for wrong in [
        spec | {"rule": "sgd"},
        spec | {"leaves": []},
        spec | {"leaves": 3},
        {"rule": "adam"},
        change(spec, format="nf4"),
        change(spec, shape=(601, 7)),
        change(spec, shape=(7, 600)),
        change(spec, shape=(4200,)),
        change(spec, shape=(-600, -7)),
        change(spec, shape=(huge, huge)),
        change(spec, shape=(2**65,)),
        change(spec, pieces=[]),
        change(spec, pieces=[piece, piece]),
        change_piece(spec, start=(1, 0)),
        change_piece(spec, start=(0,)),
        change_piece(spec, start=(-1, 0)),
        change_piece(spec, start=(huge, 0)),
        change_piece(spec, shape=(600, 6)),
        change_piece(spec, shape=(huge, huge)),
        change_piece(spec, codes=piece["codes"][:-1]),
        change_piece(spec, codes=[x[:-1] for x in piece["codes"]]),
        change_piece(spec, words=[*piece["words"], np.zeros(1, f32)]),
        change_piece(spec, residuals=np.zeros(4200, np.uint8)),
        change_piece(spec, codes=[("file", -1, 4200, None)] * len(piece["codes"])),
        change_piece(spec, codes=[("file", 0, -1, None)] * len(piece["codes"])),
        change_piece(spec, codes=[("file", 0, huge, None)] * len(piece["codes"])),
        change_piece(spec, codes=[("file", 0)] * len(piece["codes"])),
        spec | {"has_residuals": True},
    ]:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ext.stage(wrong)
    assert num_unused() == 0


NAN, INF = f32("nan").view(np.uint32), f32("inf").view(np.uint32)
NEGATIVE = f32(-1).view(np.uint32)
BAD_WORDS = {
    "dynamic": [(0, NAN), (0, INF), (0, NEGATIVE), (1, NAN), (1, INF), (1, NEGATIVE)],
    "ratio": [
        (0, NAN),
        (0, NEGATIVE),
        (0, f32(2.0**32).view(np.uint32) + 1),
        (1, 1 << 16),  # no step
        (1, 0x100 | 129),  # too coarse a step
        (1, 0x200 | 4),  # an unknown bit
        (1, 0xFFFF << 16 | 0x100 | 128),  # the last code is not finite
        (1, 4),  # zeros of the padding would not be zero
    ],
    "ratio6": [
        (0, NAN),
        (0, f32(2.0**32).view(np.uint32) + 1),
        (1, 1 << 16),  # no step
        (1, 0x8000 | 513),  # too coarse a step
        (1, 0x7FFF << 16 | 0x8000 | 64),  # the last code is not finite
        (1, 4),  # zeros of the padding would not be zero
    ],
    "codes of 6 bits": [(0, 64), (1, 64), (0, 0xFF << 24), (1, 128 << 16)],
    "ratio4": [
        (0, NAN),
        (0, f32(2.0**32).view(np.uint32) + 1),
        (1, 1 << 16),  # no step
        (1, 0x8000 | 2049),  # too coarse a step
        (1, 49 << 16 | 0x8000 | 2048),  # the last code is not finite
        (1, 4),  # zeros of the padding would not be zero
    ],
    "codes of 4 bits": [(0, 16), (1, 16), (0, 0xFF << 24), (1, 128 << 16)],
    "lion": [(0, NAN), (0, NEGATIVE), (0, f32(2.0**100).view(np.uint32) + 1)],
    "float32": [(0, NAN), (0, INF), (1, NAN), (1, INF), (1, NEGATIVE)],
}


@pytest.mark.parametrize("via", ["copy", "blocks"])
@pytest.mark.parametrize("name, bad", [(n, bad) for n, all in BAD_WORDS.items() for bad in all])
def test_values_that_no_step_stores(name, bad, via):
    optimizer = {"codes of 6 bits": "ratio6", "codes of 4 bits": "ratio4"}.get(name, name)
    tx, params, state = train_adam(shapes=SMALL, tx=OPTIMIZERS[optimizer]())
    spec = read_state(state)
    kind = "codes" if name == "float32" or name.startswith("codes") else "words"
    index, bits = bad
    piece = spec["leaves"][0]["pieces"][0]
    arrays = [np.array(x) for x in piece[kind]]
    arrays[index].view(np.uint32)[-1] = bits
    piece[kind] = arrays
    if via == "blocks":
        spec = cut_rows(spec, 0, 1)
    restored = restore(state, spec)
    with pytest.raises(RAISES, match=r"\['big'\] have values that no step stores"):
        finish(run(tx, params, restored, [4], shapes=SMALL))
    assert num_unused() == 1  # the source is still there


def cut_rows(spec, leaf, row):
    """The leaf's only piece in two, of which the first has as many rows.

    Blocks of the second then start elsewhere than those of the leaf: nothing but their padding is
    exact, so this is for values that are looked at and not for those that count.
    """
    spec = copy.deepcopy(spec)
    (piece,) = spec["leaves"][leaf]["pieces"]
    rows, *rest = spec["leaves"][leaf]["shape"]
    size = row * int(np.prod(rest))
    left_blocks = -(-size // BLOCK)
    right_blocks = -(-(rows * int(np.prod(rest)) - size) // BLOCK)
    left, right = dict(piece), dict(piece)
    left |= {"start": (0, *[0] * len(rest)), "shape": (row, *rest)}
    right |= {"start": (row, *[0] * len(rest)), "shape": (rows - row, *rest)}
    left["codes"] = [x[:size] for x in piece["codes"]]
    right["codes"] = [x[size:] for x in piece["codes"]]
    left["words"] = [x[-left_blocks:] for x in piece["words"]]
    right["words"] = [x[-right_blocks:] for x in piece["words"]]
    if piece["residuals"] is not None:
        left["residuals"] = piece["residuals"][:size]
        right["residuals"] = piece["residuals"][size:]
    spec["leaves"][leaf]["pieces"] = [right, left]
    return spec


@pytest.mark.parametrize(
    "other, shapes, match",
    [
        (paged_lion8bit(1e-3), SMALL, "of the optimizer 'adam', and this step is one of 'lion'"),
        (paged_adam8bit(1e-3), SMALL | {"z": (2,)}, "belong to 2 leaves, and this step has 3"),
        (
            paged_adam8bit(1e-3),
            {"big": (7, 600), "small": (3, 5)},
            r"\['big'\] have shape \(600, 7\), and in this step it has shape \(7, 600\)",
        ),
        (
            paged_adam8bit(1e-3),
            {"large": (600, 7), "small": (3, 5)},
            r"leaf 0 is \['big'\], and in this step it is \['large'\]",
        ),
        (
            paged_adam8bit(1e-3, quantization=Quantization("dynamic")),
            SMALL,
            r"\['big'\] are stored in the format 'ratio', and this step wants them in 'dynamic'",
        ),
    ],
    ids=["rule", "count", "shape", "name", "format"],
)
def test_another_model_is_refused_and_the_right_one_goes_on(other, shapes, match):
    tx, params, state = train_adam(shapes=SMALL)
    restored = restore(state, read_state(state))
    token = token_of(restored)
    others = to_jax(make_tree(0, shapes))
    count = num_arenas()
    wrong = with_token(other.init(others), token)
    with pytest.raises(RAISES, match=match):
        finish(run(other, others, wrong, [3], shapes=shapes))
    assert num_arenas() == count
    actual = run(tx, params, restored, [3], shapes=SMALL)[0]
    assert_trees_equal(actual, run(tx, params, state, [3], shapes=SMALL)[0])


def test_residuals_only_where_there_were_some():
    dtypes = jnp.bfloat16
    plain = paged_adam8bit(1e-3)
    compensated = paged_adam8bit(1e-3, param_rounding="compensated")
    params = to_jax(make_tree(0, SMALL, dtypes))
    for first, second, match in [
        (plain, compensated, "does not have residuals"),
        (compensated, plain, "has residuals"),
    ]:
        _, state = run(first, params, first.init(params), [1], dtypes, SMALL)
        spec = read_state(state)
        wrong = with_token(second.init(params), ext.stage(spec))
        with pytest.raises(RAISES, match=match):
            finish(run(second, params, wrong, [2], dtypes, SMALL))
    # To start keeping them is a conversion; to lose them is none.
    _, state = run(plain, params, plain.init(params), [1], dtypes, SMALL)
    new = with_token(compensated.init(params), ext.stage(read_state(state) | {"convert": True}))
    jax.block_until_ready(run(compensated, params, new, [2], dtypes, SMALL))


# --- What is known of a handle --------------------------------------------------------------------


def test_staged_describes_what_waits():
    tx, params, state = train_adam(shapes=SMALL)
    restored = restore(state, read_state(state))
    handle, version = token_of(restored)
    assert version == 1
    assert ext.staged(handle) == {
        "rule": "adam",
        "has_residuals": False,
        "convert": False,
        "leaves": [("['big']", "ratio", (600, 7)), ("['small']", "float32", (3, 5))],
        "filled": 0,
    }
    assert ext.version_of(handle) == 1 and ext.is_alive(handle) and num_unused() == 1
    _, restored = jax.block_until_ready(run(tx, params, restored, [3], shapes=SMALL))
    assert ext.staged(handle) is None and num_unused() == 0
    assert ext.version_of(handle) == 2 and ext.is_alive(handle)
    release(restored)
    assert ext.version_of(handle) is None and not ext.is_alive(handle)
    assert ext.is_issued(handle) and not ext.is_issued(12)


def test_fresh_handles():
    tx = paged_adam8bit(1e-3)
    state = tx.init(to_jax(make_tree(0, SMALL)))
    handle = token_of(state)[0]
    assert ext.version_of(handle) == 0 and ext.is_alive(handle) and ext.staged(handle) is None
    assert ext.forget(handle, now=True)
    assert ext.version_of(handle) is None and not ext.is_alive(handle) and num_unused() == 0
    assert not ext.forget(handle)


def test_a_forgotten_handle_works_for_a_while():
    tx, params, state = train_adam(shapes=SMALL)
    spec = read_state(state)
    restored = restore(state, spec)
    fresh = tx.init(params)
    for each in (restored, fresh):
        assert ext.forget(token_of(each)[0])
    expected = run(tx, params, state, [3], shapes=SMALL)[0]
    assert_trees_equal(run(tx, params, restored, [3], shapes=SMALL)[0], expected)
    jax.block_until_ready(run(tx, params, fresh, [3], shapes=SMALL))
    assert num_unused() == 0
    assert not ext.forget(token_of(fresh)[0])  # it was used


def test_many_forgotten_handles_end():
    tx, params, state = train_adam(shapes=SMALL)
    spec = read_state(state)
    handles = [ext.stage(spec)[0] for _ in range(40)]
    for handle in handles:
        assert ext.forget(handle)
    assert num_unused() == 32 and not ext.is_alive(handles[7]) and ext.is_alive(handles[8])
    kept = [tx.init(params) for _ in range(300)]  # dropped ones end at once
    for fresh in kept:
        ext.forget(token_of(fresh)[0])
    assert num_unused() == 256


def test_release_drops_what_was_staged():
    tx, params, state = train_adam(shapes=SMALL)

    class Array(np.ndarray):
        alive = 0

        def __array_finalize__(self, obj):
            Array.alive += 1

        def __del__(self):
            Array.alive -= 1

    spec = read_state(state)
    piece = spec["leaves"][0]["pieces"][0]
    piece["codes"] = [np.array(x).view(Array) for x in piece["codes"]]
    for end in (ext.release, lambda handle: ext.forget(handle, now=True), None, "all"):
        restored = restore(state, spec)
        if end is None:  # the first step lets go too
            jax.block_until_ready(run(tx, params, restored, [3], shapes=SMALL))
        elif end == "all":
            release_all()
        else:
            end(token_of(restored)[0])
    assert Array.alive == 2
    piece["codes"] = []
    assert Array.alive == 0


# --- Several devices, other boxes -----------------------------------------------------------------

MESH_SHAPES = {
    "rows": (512, 256),
    "both": (64, 512),
    "columns": (8, 4096),
    "vector": (8192,),
    "replicated": (64,),
    "odd": (24, 1003),
}
MESH_SPECS = {
    "rows": P("x"),
    "both": P("x", "y"),
    "columns": P(None, "x"),
    "vector": P(("x", "y")),
    "replicated": P(),
    "odd": P("x"),
}
MESHES = {8: (4, 2), 4: (2, 2), 2: (2, 1), 1: (1, 1)}


def make_put(count, order=None):
    devices = jax.devices("cpu")[:count]
    devices = [devices[i] for i in order or range(count)]
    mesh = jax.make_mesh(
        MESHES[count], ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )
    specs = MESH_SPECS if count > 1 else dict.fromkeys(MESH_SPECS, P())

    def put(tree):
        return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}

    return mesh, put


def start_on(count, tx, steps=range(1, 4)):
    _, put = make_put(count)
    params = put(make_tree(0, MESH_SHAPES))
    state = jax.jit(tx.init)(params)
    return run(tx, params, state, steps, shapes=MESH_SHAPES, put=put)


def move(params, state, count, order=None):
    """Parameters and state on other devices, not yet stepped there."""
    mesh, put = make_put(count, order)
    spec = read_state(state)
    state = jax.device_put(jax.device_get(state), NamedSharding(mesh, P()))
    return put(jax.device_get(params)), restore(state, spec), put


@pytest.mark.parametrize("name", ["ratio", "dynamic", "lion"])
def test_eight_devices_go_on(name):
    tx = OPTIMIZERS[name]()
    params, state = start_on(8, tx)
    spec = read_state(state)
    _, put = make_put(8)
    restored = restore(state, spec)
    assert sum(len(leaf["pieces"]) for leaf in spec["leaves"]) == 4 + 8 + 4 + 8 + 1 + 4
    expected, last = run(tx, params, state, range(4, 7), shapes=MESH_SHAPES, put=put)
    actual, other = run(tx, params, restored, range(4, 7), shapes=MESH_SHAPES, put=put)
    assert_trees_equal(actual, expected)
    assert_trees_equal(moments(other), moments(last))
    assert ext.staged(token_of(restored)[0]) is None


def test_eight_devices_in_another_order():
    tx = OPTIMIZERS["dynamic"]()
    params, state = start_on(8, tx)
    others, moved, put = move(params, state, 8, order=[3, 1, 7, 0, 2, 5, 6, 4])
    expected, last = run(tx, params, state, range(4, 6), shapes=MESH_SHAPES, put=make_put(8)[1])
    actual, other = run(tx, others, moved, range(4, 6), shapes=MESH_SHAPES, put=put)
    assert_trees_equal(jax.device_get(actual), jax.device_get(expected))
    assert_trees_equal(moments(other), moments(last))


def test_eight_devices_refuse_as_one():
    """What does not fit is refused on all of them, also where another device was first."""
    tx, other = OPTIMIZERS["dynamic"](), OPTIMIZERS["ratio"]()
    params, state = start_on(8, tx)
    spec = read_state(state)
    restored = restore(state, spec)
    _, put = make_put(8)
    token = token_of(restored)
    wrong = with_token(other.init(params), token)
    stepped = jax.block_until_ready(make_step(other)(params, wrong, put(make_tree(4, MESH_SHAPES))))
    assert_trees_equal(jax.device_get(stepped[0]), jax.device_get(params))
    with pytest.raises(RAISES, match="stored in the format 'dynamic'"):
        raise_if_refused()
    raise_if_refused()  # one error for eight devices
    expected, _ = run(tx, params, state, [4], shapes=MESH_SHAPES, put=put)
    actual, _ = run(tx, params, restored, [4], shapes=MESH_SHAPES, put=put)
    assert_trees_equal(actual, expected)


def skip_one(tx, params, state, put):
    """The state after a step that is skipped: filled, and not changed."""
    bad = put({k: np.full(s, np.nan, f32) for k, s in MESH_SHAPES.items()})
    return make_step(tx)(params, state, bad)[1]


@pytest.mark.parametrize("name", ["ratio", "dynamic", "lion", "float32"])
def test_from_mesh_to_mesh(name):
    """Cuts that leave blocks whole keep every bit; others move once through float32."""
    tx = skip_non_finite(OPTIMIZERS[name](), "step")
    codec = "dynamic" if name == "dynamic" else "ratio"
    params, state = start_on(8, tx)
    before = moments(state)
    for count in (4, 1, 2, 8):
        params, moved, put = move(params, state, count)
        state = skip_one(tx, params, moved, put)
        after = moments(state)
        for leaf in MESH_SHAPES:
            whole = leaf in ("rows", "vector", "replicated") or name == "float32"
            pairs = [(x.mu[leaf], x.nu and x.nu[leaf]) for x in (before, after)]
            if whole:
                assert_trees_equal(pairs[1], pairs[0])
            else:
                check_rounded_once(codec, *pairs, params[leaf])
        before = after


# --- Re-blocking, against the specification in NumPy ----------------------------------------------


def random_leaf(format, shape, seed, has_residuals=False):
    """Moments of a leaf in one piece, and what they stand for."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    mu = (rng.standard_normal(size) * np.exp(rng.normal(0, 3, size))).astype(f32)
    nu = (mu * mu * np.exp(rng.normal(0, 1, size))).astype(f32)
    mu[::97] = nu[::97] = 0
    piece = encode(format, mu, nu)
    if has_residuals:
        piece["residuals"] = rng.integers(0, 256, size, np.uint8)
    return piece, decode(format, piece, size)


def pad(x, value=0):
    return np.pad(x, (0, -len(x) % BLOCK), constant_values=value)


def encode(format, mu, nu):
    size = len(mu)
    if format == "float32":
        return {"codes": [mu, nu], "words": [], "residuals": None}
    if format == "dynamic":
        parts = [reference.quantize(pad(x), signed) for x, signed in ((mu, True), (nu, False))]
        codes, words = [p.codes for p in parts], [p.scales for p in parts]
    else:
        random = np.full(len(pad(mu)), 0x80008000, np.uint32)
        bits = {"ratio6": 6, "ratio4": 4}.get(format, 8)
        state = reference.quantize_ratio(pad(mu), pad(nu), random, bits)
        codes, words = [state.mu_codes, state.nu_codes], [state.mu_scales, state.nu_words]
    return {"codes": [c[:size] for c in codes], "words": words, "residuals": None}


def decode(format, piece, size):
    if format == "float32":
        return piece["codes"]
    mu, nu = piece["codes"]
    if format == "dynamic":
        pairs = ((pad(mu, 127), True), (pad(nu), False))
        return [
            reference.dequantize(reference.Quantized(c, w), signed)[:size]
            for (c, signed), w in zip(pairs, piece["words"], strict=True)
        ]
    words = [np.asarray(w).view(f32) for w in piece["words"]]
    state = reference.from_arrays(format, [pad(mu), pad(nu), *words], (True, False))
    return [x[:size] for x in reference.dequantize_ratio(state)]


def make_spec(format, shape, piece, **options):
    """A state of one leaf, in one piece."""
    piece = {**piece, "start": (0,) * len(shape), "shape": shape}
    leaf = {"name": "['w']", "shape": shape, "format": format, "pieces": [piece]}
    has_residuals = piece["residuals"] is not None
    return {"rule": "adam", "has_residuals": has_residuals, "leaves": [leaf], **options}


def cut(spec, format, splits):
    """The same in more pieces, each encoded by itself; and what all of these stand for.

    Args:
      spec: of `make_spec`.
      format: of the pieces.
      splits: of each dimension, where it is cut.
    """
    (leaf,) = spec["leaves"]
    (piece,) = leaf["pieces"]
    shape, size = leaf["shape"], int(np.prod(leaf["shape"]))
    arrays = [x.reshape(shape) for x in decode(leaf["format"], piece, size)]
    wholes = [np.empty(shape, f32) for _ in arrays]
    pieces = []
    edges = [[0, *split, n] for split, n in zip(splits, shape, strict=True)]
    for box in itertools.product(*[list(itertools.pairwise(e)) for e in edges]):
        index = tuple(slice(*ends) for ends in box)
        new = encode(format, *[np.ascontiguousarray(x[index]).ravel() for x in arrays])
        if piece["residuals"] is not None:
            new["residuals"] = np.ascontiguousarray(piece["residuals"].reshape(shape)[index])
        starts, ends = zip(*box, strict=True)
        new |= {"start": starts, "shape": tuple(e - s for s, e in box)}
        for whole, x in zip(wholes, decode(format, new, int(np.prod(new["shape"]))), strict=True):
            whole[index] = x.reshape(new["shape"])
        pieces.append(new)
    np.random.default_rng(0).shuffle(pieces)
    return spec | {"leaves": [leaf | {"format": format, "pieces": pieces}]}, wholes


def fill(spec, format, has_residuals=False):
    """What an arena holds after it was filled: the parts of its only leaf, without padding."""
    (leaf,) = spec["leaves"]
    quantization = Quantization(format, 0) if format != "float32" else FLOAT32_MOMENTS
    rounding = {"param_rounding": "compensated"} if has_residuals else {}
    tx = skip_non_finite(paged_adam8bit(1e-3, quantization=quantization, **rounding), "step")
    params = {"w": jnp.zeros(leaf["shape"], jnp.bfloat16 if has_residuals else f32)}
    state = with_token(tx.init(params), ext.stage(spec))
    bad = {"w": jnp.full(leaf["shape"], jnp.nan, params["w"].dtype)}
    _, state = make_step(tx)(params, state, bad)
    with open_state(state) as snapshot:
        parts = snapshot.read(0)
    release(state)
    return parts


SPLITS = [  # shapes, and where their dimensions are cut
    ((1000, 37), ((), ())),
    ((1000, 37), ((256, 512), ())),
    ((1000, 37), ((), (5, 36))),
    ((3, 50, 41), ((1,), (7, 49), (40,))),
    ((64, 512), ((), (128, 384))),
    ((700,), ((256, 300),)),
    ((20, 3, 5, 7), ((), (1,), (), (2, 5))),
]


@pytest.mark.parametrize("source", ["ratio", "ratio6", "ratio4", "dynamic", "float32"])
@pytest.mark.parametrize("target", ["ratio", "ratio6", "ratio4", "dynamic", "float32"])
@pytest.mark.parametrize("shape, splits", SPLITS)
def test_other_boxes_and_formats(source, target, shape, splits):
    """Blocks as they were where they coincide; else the specification's, of what was stored."""
    piece, _ = random_leaf(source, shape, 0)
    spec, wholes = cut(make_spec(source, shape, piece, convert=True), source, splits)
    codes, words, _ = fill(spec, target)
    flat = [x.ravel() for x in wholes]
    expected = encode(target, *flat)
    if source == target:  # blocks that coincide
        size = len(flat[0])
        keep_stored_blocks(expected, spec, shape, size)
    for actual, desired in ((codes, expected["codes"]), (words, expected["words"])):
        for one, other in zip(actual, desired, strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), np.asarray(other).view(np.uint8))


def keep_stored_blocks(expected, spec, shape, size):
    """Puts stored blocks in the place of those that have the same elements in the same order."""
    number = np.arange(size).reshape(shape)
    for piece in spec["leaves"][0]["pieces"]:
        index = tuple(slice(s, s + n) for s, n in zip(piece["start"], piece["shape"], strict=True))
        elements = number[index].ravel()
        for b in range(-(-len(elements) // BLOCK)):
            here = elements[b * BLOCK : (b + 1) * BLOCK]
            there = np.arange(here[0] // BLOCK * BLOCK, size)[:BLOCK]
            if len(here) == len(there) and (here == there).all():
                for s in range(2):
                    expected["codes"][s] = np.array(expected["codes"][s])
                    expected["codes"][s][here] = piece["codes"][s][b * BLOCK : (b + 1) * BLOCK]
                    if expected["words"]:
                        expected["words"][s] = np.array(expected["words"][s])
                        expected["words"][s][here[0] // BLOCK] = piece["words"][s][b]


@pytest.mark.parametrize("shape, splits", SPLITS)
def test_residuals_move_exactly(shape, splits):
    piece, _ = random_leaf("dynamic", shape, 0, has_residuals=True)
    spec, _ = cut(make_spec("dynamic", shape, piece), "dynamic", splits)
    _, _, residuals = fill(spec, "dynamic", has_residuals=True)
    np.testing.assert_array_equal(residuals, piece["residuals"])
    # Those of a step that starts to keep some are zero.
    plain = make_spec("dynamic", shape, piece | {"residuals": None}, convert=True)
    _, _, residuals = fill(plain, "dynamic", has_residuals=True)
    assert (residuals == reference.ZERO_RESIDUAL).all()


def test_boxes_that_do_not_tile():
    piece, _ = random_leaf("dynamic", (10, 6), 0)
    spec, _ = cut(make_spec("dynamic", (10, 6), piece), "dynamic", ((4,), (3,)))
    (leaf,) = spec["leaves"]
    pieces = leaf["pieces"]
    moved = {**pieces[0], "start": tuple(1 + s for s in pieces[0]["start"])}
    for wrong in [
        pieces[:-1],
        pieces[1:],
        [*pieces, pieces[0]],
        [moved, *pieces[1:]],
        [pieces[0]] * 4,
    ]:
        with pytest.raises(ValueError, match=r"moments of \['w'\] are not complete"):
            ext.stage(spec | {"leaves": [leaf | {"pieces": wrong}]})


def test_pieces_in_files(tmp_path):
    piece, _ = random_leaf("ratio", (300, 41), 0)
    spec, _ = cut(make_spec("ratio", (300, 41), piece), "ratio", ((100,), (7,)))
    assert_trees_equal(fill(to_file(spec, tmp_path / "moments"), "ratio"), fill(spec, "ratio"))
