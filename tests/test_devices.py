"""One update spread over many devices: eight CPU devices and, where there are two, GPUs.

Each device works on its shards, nothing is moved, and the results are those of one device: to the
bit where shards consist of whole blocks of moments, else within a bound that is derived here.
"""

import contextlib
import functools
import itertools
import pickle
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import paged_optax
from helpers import RAISES, Shards, assert_trees_equal, cuts_of, finish, layout_bytes
from helpers import make_tree as make_random_tree
from paged_optax import memory_report, moments, paged_adamw8bit, release

# Every shard has whole blocks of 256 elements, in the order of the whole leaf.
SHAPES = {"rows": (512, 1024), "both": (64, 2048), "columns": (4, 4096), "replicated": (64,)}
SPECS = {"rows": P("x"), "both": P("x", "y"), "columns": P(None, "x"), "replicated": P()}
FSDP = {name: P() if name == "replicated" else P(*spec) for name, spec in SPECS.items()}

# No random bits: those of the ratio code follow from the place in a device's part of a leaf.
DYNAMIC = paged_optax.Quantization("dynamic")

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def devices(request):
    """Eight CPU devices, or two GPUs."""
    found = jax.devices(request.param)
    if request.param == "gpu" and len(found) < 2:
        pytest.skip("there is only one GPU")
    return found[: 8 if request.param == "cpu" else 2]


def make_mesh(devices, *kinds):
    """A mesh ('x', 'y') of 4 x 2 devices, or 2 x 1; with one axis type, ('x',)."""
    count = len(devices)
    shape = (count,) if len(kinds) == 1 else (4, 2) if count == 8 else (2, 1)
    kinds = tuple(getattr(AxisType, kind) for kind in kinds)
    return jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=kinds, devices=devices)


def make_tree(seed, shapes=SHAPES):
    return make_random_tree(seed, shapes)


def place(tree, mesh, specs=SPECS):
    return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}


def train(tx, put, num_steps=3, shapes=SHAPES):
    """Parameters, state and the compiled step."""
    params = put(make_tree(0, shapes))
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(num_steps):
        grads = put(make_tree(1 + i, shapes))
        params, state = step(params, state, grads)
    return params, state, step.lower(params, state, grads).compile().as_text()


def on(device):
    return functools.partial(jax.device_put, device=device)


def assert_sharded(tree, mesh, specs=SPECS):
    for name, leaf in tree.items():
        wanted = NamedSharding(mesh, specs[name])
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (name, leaf.sharding)


def bytes_of_shards(mesh, specs=SPECS, shapes=SHAPES):
    """Bytes of the moments of one device's shards, from the format alone."""
    num_blocks = {True: 0, False: 0}
    for name, shape in shapes.items():
        size = int(np.prod(NamedSharding(mesh, specs[name]).shard_shape(shape)))
        num_blocks[size >= 4096] += -(-size // 256)
    return layout_bytes(num_blocks[True], num_blocks[False])


def assert_each_holds_its_shards(state, mesh, **layout):
    report = memory_report(state)
    assert len(report.devices) == mesh.size
    wanted = bytes_of_shards(mesh, **layout)
    for device in report.devices:
        assert wanted <= device.total <= wanted + 2 * 2**20, device  # GPUs round up to 2 MiB


@pytest.mark.parametrize(
    "kinds", list(itertools.product(["Auto", "Explicit"], repeat=2)), ids="-".join
)
def test_shards_are_updated_where_they_are(devices, kinds):
    """Fully sharded, tensor-parallel and replicated leaves in one tree, against one device."""
    tx = paged_adamw8bit(1e-2, quantization=DYNAMIC)
    expected, single, _ = train(tx, on(devices[0]))
    mesh = make_mesh(devices, *kinds)
    with jax.set_mesh(mesh):
        params, state, program = train(tx, functools.partial(place, mesh=mesh))
    assert_trees_equal(params, expected)
    assert_sharded(params, mesh)
    assert not [name for name in COLLECTIVES if name in program]
    assert_each_holds_its_shards(state, mesh)
    auto = [name for name, kind in zip(mesh.axis_names, kinds, strict=True) if kind == "Auto"]
    if len(set(kinds)) == 1 or all(mesh.shape[name] == 1 for name in auto):
        assert_trees_equal(moments(state), moments(single))
    else:
        with pytest.raises(NotImplementedError, match="axes of several types"):
            moments(state)
    release(state)
    release(single)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_shards_draw_random_bits_as_leaves_of_their_own(devices, kind):
    """The ratio code: a shard is updated as if it were the whole leaf; replicas stay equal."""
    tx = paged_optax.scale_by_paged_adam8bit(quantization=paged_optax.Quantization("ratio"))
    shapes, specs = {"rows": (64, 1024), "copies": (64, 64)}, {"rows": P("x"), "copies": P()}
    mesh = make_mesh(devices, kind)
    rows = slice(0, 64 // len(devices)), slice(-64 // len(devices), None)
    state = tx.init(make_tree(0, shapes))
    single = [tx.init(make_tree(0, shapes)) for _ in rows]
    with jax.set_mesh(mesh):
        for i in range(3):
            updates, state = jax.jit(tx.update)(place(make_tree(i, shapes), mesh, specs), state)
    for j, part in enumerate(rows):
        for i in range(3):
            grads = make_tree(i, shapes)
            expected, single[j] = tx.update(grads | {"rows": grads["rows"][part]}, single[j])
        np.testing.assert_array_equal(np.asarray(updates["rows"])[part], expected["rows"])
        for copy in updates["copies"].addressable_shards:
            np.testing.assert_array_equal(copy.data, expected["copies"])
        for whole, alone in zip(moments(state)[:2], moments(single[j])[:2], strict=True):
            np.testing.assert_array_equal(whole["rows"][part], alone["rows"])
    release([state, single])


@pytest.mark.parametrize("with_mesh", [True, False], ids=["set_mesh", "arrays alone"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_mesh_known_from_arrays_alone(devices, transform, with_mesh):
    tx = paged_optax.scale_by_paged_adam8bit()
    mesh = make_mesh(devices, "Auto", "Auto")
    params, grads = place(make_tree(0), mesh), place(make_tree(1), mesh)
    expected, _ = tx.update(make_tree(1), tx.init(make_tree(0)), make_tree(0))
    with jax.set_mesh(mesh) if with_mesh else contextlib.nullcontext():
        updates, state = transform(tx.update)(grads, transform(tx.init)(params), params)
    assert_trees_equal(updates, expected)
    assert_sharded(updates, mesh)
    assert_each_holds_its_shards(state, mesh)
    release(state)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_update_inside_shard_map(devices, check_vma):
    tx = paged_optax.scale_by_paged_adam8bit()
    mesh = make_mesh(devices, "Auto")
    specs = {"rows": P("x"), "columns": P(None, "x"), "replicated": P()}
    shapes = {name: SHAPES[name] for name in specs}
    params, grads = make_tree(0, shapes), make_tree(1, shapes)
    expected, single = tx.update(grads, tx.init(params), params)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, P(), specs),
        out_specs=(specs, P()),
        check_vma=check_vma,
    )
    def step(grads, state, params):
        return tx.update(grads, state, params)

    updates, state = step(place(grads, mesh, specs), tx.init(params), place(params, mesh, specs))
    assert_trees_equal(updates, expected)
    assert_each_holds_its_shards(state, mesh, specs=specs, shapes=shapes)
    for read in (moments, pickle.dumps):  # and none leaves moments out
        with pytest.raises(NotImplementedError, match="inside jax.shard_map"):
            read(state)
    release(state)
    release(single)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_update_where_some_axes_are_manual(devices, kind, check_vma):
    """`jax.shard_map` over one axis of two, the other left to the compiler or to types."""
    tx = paged_optax.scale_by_paged_adam8bit()
    mesh = make_mesh(devices, kind, kind)
    params, grads = make_tree(0), make_tree(1)
    expected, single = tx.update(grads, tx.init(params), params)
    manual = {k: P(*(axis if axis == "x" else None for axis in spec)) for k, spec in SPECS.items()}

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(manual, P(), manual),
        out_specs=(manual, P()),
        axis_names={"x"},
        check_vma=check_vma,
    )
    def step(grads, state, params):
        return tx.update(grads, state, params)

    updates, state = step(place(grads, mesh), tx.init(params), place(params, mesh))
    assert_trees_equal(updates, expected)
    assert_each_holds_its_shards(state, mesh)
    release(state)
    release(single)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_moments_follow_parameters_and_not_gradients(devices, kind):
    """Gradients of a program of their own often come out replicated."""
    tx = paged_adamw8bit(1e-2)
    mesh = make_mesh(devices, kind, kind)
    params, grads = place(make_tree(0), mesh), place(make_tree(1), mesh, dict.fromkeys(SPECS, P()))
    with jax.set_mesh(mesh):
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        program = jax.jit(tx.update).lower(grads, state, params).compile().as_text()
    assert_sharded(updates, mesh)
    assert_each_holds_its_shards(state, mesh)
    assert not [name for name in COLLECTIVES if name in program]
    release(state)


LAYOUTS = {  # of the parameters and the batch; the bias is replicated
    "tensor parallel": ({"in": P(None, "x"), "bias": P(), "out": P("x")}, P()),
    "fully sharded": ({"in": P("x"), "bias": P(), "out": P("x")}, P("x")),
}


@pytest.mark.parametrize(("specs", "batch"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("replay", [False, True])
def test_parameters_keep_their_sharding(devices, specs, batch, replay):
    """The compiler would like to cut the new bias as it cuts its gradient (optax.adamw's is so).

    The next step would then find parameters that are not where their moments are.
    """
    mesh = make_mesh(devices, "Auto")
    shapes = {"in": (64, 640), "bias": (640,), "out": (640, 64)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(1e-2, replay=replay))

    def loss(params, x):
        hidden = jnp.tanh(x @ params["in"] + params["bias"])
        return jnp.mean((hidden @ params["out"]) ** 2)

    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    def run(put, put_batch):
        params = put(make_tree(0, shapes))
        state = jax.jit(tx.init)(params)
        for i in range(3):
            params, state = step(params, state, put_batch(make_tree(1 + i, {"x": (16, 64)})["x"]))
        return params, state

    expected, single = run(on(devices[0]), on(devices[0]))
    params, state = run(
        functools.partial(place, mesh=mesh, specs=specs), on(NamedSharding(mesh, batch))
    )
    assert_sharded(params, mesh, specs)
    # Sums over devices are rounded in another order, and the first steps go by a gradient's sign.
    x = make_tree(9, {"x": (16, 64)})["x"]
    np.testing.assert_allclose(loss(params, x), loss(expected, x), rtol=1e-3)
    assert loss(params, x) < 0.96 * loss(make_tree(0, shapes), x)
    assert int(state[1][0].token.value[1]) == 3
    release(state)
    release(single)


@pytest.mark.parametrize("with_params", [True, False])
def test_unreduced_gradients_are_summed(devices, with_params):
    """Explicit axes know gradients of which every device has a term; optax.adamw refuses those."""
    mesh = make_mesh(devices, "Explicit")
    tx = paged_optax.scale_by_paged_adam8bit()
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-8, 9, (16, n)).astype(np.float32) for n in (64, 80))  # exact sums
    expected, single = tx.update({"w": x.T @ y}, tx.init({"w": x.T @ y}))

    @jax.jit
    def step(x, y, state):
        product = functools.partial(jax.lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ())))
        grads = {"w": product(x, y, out_sharding=P(unreduced={"x"}))}
        assert jax.typeof(grads["w"]).sharding.spec.unreduced == {"x"}
        params = {"w": product(x, y, out_sharding=P())}
        return tx.update(grads, state, params if with_params else None)

    with jax.set_mesh(mesh):
        x, y = (jax.device_put(a, NamedSharding(mesh, P("x"))) for a in (x, y))
        updates, state = step(x, y, tx.init({"w": x}))
    assert_trees_equal(updates, expected)
    assert_trees_equal(moments(state), moments(single))
    release(state)
    release(single)


def test_compilers_uneven_shards_are_not_padded(devices):
    """Arrays are cut evenly, but the compiler may cut what is inside a program as it likes."""
    mesh = make_mesh(devices, "Auto")
    tx = paged_optax.scale_by_paged_adam8bit(quantization=paged_optax.Quantization(min_size=0))
    whole = np.random.default_rng(0).standard_normal((16, 300)).astype(np.float32)

    @jax.jit
    def step(whole, state):
        return tx.update({"w": 2 * whole[:11]}, state)

    shape = {"w": jax.ShapeDtypeStruct((11, 300), jnp.float32)}
    updates, state = step(jax.device_put(whole, NamedSharding(mesh, P("x"))), tx.init(shape))
    expected, single = tx.update({"w": 2 * jnp.asarray(whole[:11])}, tx.init(shape))
    assert_trees_equal(updates, expected)
    assert_trees_equal(moments(state), moments(single))
    release(state)
    release(single)


def test_blocks_that_do_not_coincide(devices):
    """Shards of parts of blocks have other scales, so codes differ, and updates by a little.

    Gradients keep their sign, and magnitudes in [0.7, 1], in a step that makes moments and one that
    reads them. Moments of a block then lie between 0.7 (first) or 0.49 (second) and 1 of its
    largest: in the codes' top decade, [0.1, 1], which is cut into 64 and 128 bins, and rounding is
    off by half a bin at the most. The update m / sqrt(v) is off by e + f / 2 and higher orders if m
    and v are off by relative errors e and f, or by less, since the new gradient is exact.
    """
    shapes = {"w": (24, 1000)}
    specs = {"w": P("x")}
    smallest = 0.7
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], shapes["w"])
    grads = [
        {"w": (signs * rng.uniform(smallest, 1, shapes["w"])).astype(np.float32)} for _ in range(2)
    ]
    tx = paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC)
    mesh = make_mesh(devices, "Auto")

    def run(put):
        state = tx.init(put(grads[0]))
        updates = []
        for g in grads:
            u, state = jax.jit(tx.update)(put(g), state)
            updates.append(np.asarray(u["w"]))
        release(state)
        return updates

    single = run(on(devices[0]))
    sharded = run(functools.partial(place, mesh=mesh, specs=specs))
    np.testing.assert_array_equal(single[0], sharded[0])  # made from moments before their rounding
    e, f = 0.9 / 64 / 2 / smallest, 0.9 / 128 / 2 / smallest**2
    bound = 2 * (e + f / 2) * 1.1  # on either side; 1.1 for the higher orders
    difference = np.abs(single[1] - sharded[1]) / np.abs(single[1])
    assert 0 < difference.max() < bound, (difference.max(), bound)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_state_of_other_devices_is_refused_and_not_lost(devices, kind):
    """First used on half of the devices, then on all: every device refuses, and none moves on."""
    if devices[0].platform != "cpu":
        pytest.skip("a GPU reports with the next call: test_gpu.py")
    shapes, specs = {"w": (64, 1024)}, {"w": P("x")}
    tx = paged_optax.scale_by_paged_adam8bit()
    update = jax.jit(tx.update)
    few, all_ = make_mesh(devices[:4], kind), make_mesh(devices, kind)
    state = tx.init(make_tree(0, shapes))
    _, state = update(place(make_tree(0, shapes), few, specs), state)
    before = moments(state)
    # Which device refuses first is not certain: one with moments, or one without.
    either = (
        r"made by a program on 4 device.* this step runs on 8|are on cpu:\d but the step ran on"
    )
    with pytest.raises(RAISES, match=either):
        elsewhere = jax.device_get(state)
        finish(update(place(make_tree(1, shapes), all_, specs), elsewhere))
    with pytest.raises(RAISES, match="made by a program on 4 device.* this step runs on 1"):
        finish(update(make_tree(1, shapes), jax.device_get(state)))
    assert_trees_equal(moments(state), before)
    _, state = update(place(make_tree(1, shapes), few, specs), state)
    assert int(state.token.value[1]) == 2
    release(state)


OTHER_CUTS = {  # of the same size on every device
    "another axis": (((2, 2, 2), "xyz", P("x")), ((2, 2, 2), "xyz", P("y"))),
    "axes in another order": (((4, 2), "xy", P(("x", "y"))), ((4, 2), "xy", P(("y", "x")))),
    "another mesh": (((4, 2), "xy", P("x")), ((2, 4), "yx", P("x"))),
    "another dimension": (((4, 2), "xy", P("x", "y")), ((2, 4), "xy", P("y", "x"))),
}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("cuts", OTHER_CUTS.values(), ids=OTHER_CUTS)
def test_other_parts_of_the_same_size_are_refused(cuts, kind):
    """Devices would step parts that they do not have the moments of."""
    devices = jax.devices("cpu")[:8]
    tx = paged_optax.scale_by_paged_adam8bit()
    update = jax.jit(tx.update)
    shapes = {"w": (64, 1024)}

    def put(seed, cut):
        shape, names, spec = cut
        kinds = (getattr(AxisType, kind),) * len(shape)
        mesh = jax.make_mesh(shape, tuple(names), axis_types=kinds, devices=devices)
        return place(make_tree(seed, shapes), mesh, {"w": spec})

    _, state = update(put(0, cuts[0]), tx.init(make_tree(0, shapes)))
    before = moments(state)
    with pytest.raises(RAISES, match="sharded differently from the first step.*left as they were"):
        finish(update(put(1, cuts[1]), jax.device_get(state)))
    assert_trees_equal(moments(state), before)
    _, state = update(put(1, cuts[0]), state)
    assert int(state.token.value[1]) == 2


ORDERS = {"swapped": (1, 0, 2, 3, 4, 5, 6, 7), "turned": (7, 6, 5, 4, 3, 2, 1, 0)}
MESHES = ("Auto", "Auto"), ("Explicit", "Explicit"), ("Auto", "Explicit"), ("Explicit", "Auto")


@pytest.mark.parametrize("kinds", MESHES, ids="-".join)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_devices_in_another_order_are_refused(devices, kinds, order):
    """The state comes to the same mesh with its devices in other places, through the host."""
    tx = paged_optax.scale_by_paged_adam8bit()
    shapes, specs = {"w": (64, 1024)}, {"w": P("x", "y")}
    mesh = make_mesh(devices, *kinds)
    order = [i for i in order if i < len(devices)]
    there = jax.sharding.Mesh(
        mesh.devices.reshape(-1)[order].reshape(mesh.devices.shape),
        mesh.axis_names,
        axis_types=mesh.axis_types,
    )
    update = jax.jit(tx.update)
    with jax.set_mesh(mesh):
        _, state = update(place(make_tree(0, shapes), mesh, specs), tx.init(make_tree(0, shapes)))
    with (
        jax.set_mesh(there),
        pytest.raises(RAISES, match="the devices are in another order than at the first step"),
    ):
        grads = place(make_tree(1, shapes), there, specs)
        jax.block_until_ready(update(grads, jax.device_get(state)))
        memory_report(state)  # on a GPU the error comes with the next call
    if order == sorted(order, reverse=True):  # no device kept its place, and so none stepped
        with jax.set_mesh(mesh):
            _, state = update(place(make_tree(2, shapes), mesh, specs), state)
        assert int(state.token.value[1]) == 2


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_order_of_devices_with_the_same_parts_is_free(kind):
    """Along 'y' nothing is cut, so its devices may change places."""
    devices = jax.devices("cpu")[:8]
    tx = paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC)
    update = jax.jit(tx.update)
    shapes, specs = {"w": (64, 1024), "b": (64,)}, {"w": P("x"), "b": P()}
    here = make_mesh(devices, kind, kind)
    there = make_mesh([devices[i] for i in ORDERS["swapped"]], kind, kind)
    assert here.devices.tolist() != there.devices.tolist()
    _, state = update(place(make_tree(0, shapes), here, specs), tx.init(make_tree(0, shapes)))
    grads = place(make_tree(1, shapes), there, specs)
    updates, state = update(grads, jax.device_get(state))
    _, single = tx.update(make_tree(0, shapes), tx.init(make_tree(0, shapes)))
    expected, single = tx.update(make_tree(1, shapes), single)
    assert_trees_equal(updates, expected)
    assert_trees_equal(moments(state), moments(single))


@pytest.mark.fast
@pytest.mark.parametrize("sizes", [(8,), (4, 2), (2, 2, 2), (3, 2, 5)], ids=str)
def test_numbers_of_parts(sizes):
    """Two devices have one number exactly if the indices of all their shards are equal."""
    rng = random.Random(0)
    names = "xyz"[: len(sizes)]
    mesh = jax.sharding.AbstractMesh(sizes, tuple(names))
    for _ in range(50):
        cuts = []
        for _ in range(rng.randint(1, 3)):
            used = rng.sample(names, rng.randint(0, len(names)))
            split = rng.randint(0, len(used))
            cuts.append(cuts_of(mesh, P(tuple(used[:split]), tuple(used[split:])), 2))
        shards = Shards(tuple(cuts))
        numbers = [shards.part(position) for position in range(mesh.size)]
        parts = [
            [shards.index(leaf, position, (7, 7)) for leaf in range(len(cuts))]
            for position in range(mesh.size)
        ]
        assert numbers == [parts.index(part) for part in parts]


def test_equal_cuts_of_other_meshes_go_on():
    """Eight devices in one axis or two: the same parts in the same places."""
    devices = jax.devices("cpu")[:8]
    tx = paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC)
    update = jax.jit(tx.update)
    shapes = {"w": (64, 1024)}
    one, two = make_mesh(devices, "Auto"), make_mesh(devices, "Auto", "Auto")
    _, state = update(
        place(make_tree(0, shapes), one, {"w": P("x")}), tx.init(make_tree(0, shapes))
    )
    grads = place(make_tree(1, shapes), two, {"w": P(("x", "y"))})
    updates, state = update(grads, jax.device_get(state))
    _, single = tx.update(make_tree(0, shapes), tx.init(make_tree(0, shapes)))
    expected, single = tx.update(make_tree(1, shapes), single)
    assert_trees_equal(updates, expected)
    assert_trees_equal(moments(state), moments(single))


def test_two_meshes_in_one_tree_are_refused_by_jax():
    devices = jax.devices("cpu")[:8]
    one, two = make_mesh(devices, "Auto"), make_mesh(devices, "Auto", "Auto")
    params = {
        "a": jax.device_put(np.ones((64, 64), np.float32), NamedSharding(one, P("x"))),
        "b": jax.device_put(np.ones((64, 64), np.float32), NamedSharding(two, P("y"))),
    }
    tx = paged_optax.scale_by_paged_adam8bit()
    with pytest.raises(ValueError, match="mesh should be the same across the entire program"):
        tx.update(params, tx.init(params), params)


def test_devices_that_disagree_are_noticed():
    """Two of four devices are in the next mesh too, in their old places: those step."""
    devices = jax.devices("cpu")
    elsewhere = [devices[i] for i in (4, 5, 2, 3)]
    tx = paged_optax.scale_by_paged_adam8bit(replay=True)
    update = jax.jit(tx.update)
    shapes, specs = {"w": (64, 1024)}, {"w": P("x")}
    here, there = make_mesh(devices[:4], "Auto"), make_mesh(elsewhere, "Auto")
    _, state = update(place(make_tree(0, shapes), here, specs), tx.init(make_tree(0, shapes)))
    with pytest.raises(RAISES, match="not in this process|are on cpu:0"):
        grads = place(make_tree(1, shapes), there, specs)
        finish(update(grads, jax.device_get(state)))
    _, state = update(place(make_tree(2, shapes), here, specs), state)
    with pytest.raises(RuntimeError, match="the devices disagree about this optimizer state"):
        moments(state)


@pytest.mark.parametrize("kinds", list(itertools.product(["Auto", "Explicit"], repeat=2)), ids=str)
def test_eager_steps_on_a_mesh_compile_once(kinds, caplog):
    mesh = make_mesh(jax.devices("cpu")[:8], *kinds)
    tx = paged_optax.scale_by_paged_adam8bit()
    params = place(make_tree(0), mesh)
    with jax.set_mesh(mesh):
        _, state = tx.update(params, tx.init(params), params)
        _, state = tx.update(params, state, params)  # the state's sharding is now the mesh's
        with jax.log_compiles(), caplog.at_level("WARNING"):
            _, state = tx.update(params, state, params)
    assert not [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
    assert_each_holds_its_shards(state, mesh)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("replay", [False, True])
def test_loops_and_branches_over_shards(devices, kind, replay):
    """scan and cond around the update; with replay, a discarded step."""
    tx = paged_optax.scale_by_paged_adam8bit(replay=replay, quantization=DYNAMIC)
    shapes, specs = {"w": (64, 1024)}, {"w": P("x")}
    mesh = make_mesh(devices, kind)

    def run(put):
        @jax.jit
        def steps(grads, state):
            def body(state, i):
                def step():
                    return tx.update(jax.tree.map(lambda g: g * (1.0 + i), grads), state)

                skipped = jax.tree.map(jnp.zeros_like, grads), state
                updates, state_ = jax.lax.cond(i % 2 == 0, step, lambda: skipped)
                return state_, updates

            return jax.lax.scan(body, state, jnp.arange(4.0))

        state, updates = steps(put(make_tree(1, shapes)), tx.init(make_tree(0, shapes)))
        if replay:
            tx.update(put(make_tree(2, shapes)), state)
            updates, state = tx.update(put(make_tree(3, shapes)), state)
        result = jax.tree.map(np.asarray, updates), int(state.token.value[1]), moments(state)
        release(state)
        return result

    expected = run(on(devices[0]))
    with jax.set_mesh(mesh):
        assert_trees_equal(run(functools.partial(place, mesh=mesh, specs=specs)), expected)


def test_accumulation_over_shards(devices):
    """`optax.MultiSteps` on sharded gradients, whose dropped steps `replay=True` allows."""
    mesh = make_mesh(devices, "Auto")
    shapes, specs = {"w": (64, 1024)}, {"w": P("x")}

    def run(put):
        with jax.numpy_dtype_promotion("standard"):
            tx = optax.MultiSteps(paged_adamw8bit(1e-2, replay=True, quantization=DYNAMIC), 2)
            params = put(make_tree(0, shapes))
            state = tx.init(params)
            for i in range(4):
                updates, state = jax.jit(tx.update)(put(make_tree(i, shapes)), state, params)
                params = optax.apply_updates(params, updates)
        result = jax.tree.map(np.asarray, params)
        release(state)
        return result

    expected = run(on(devices[0]))
    assert_trees_equal(run(functools.partial(place, mesh=mesh, specs=specs)), expected)


def test_states_made_in_one_program_have_one_handle_on_all_devices(devices):
    mesh = make_mesh(devices[:4], "Auto")
    tx = paged_optax.scale_by_paged_adam8bit()
    params = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, P("x")))
    for _ in range(20):
        states = jax.jit(lambda p: [tx.init(p @ p * i) for i in range(8)])(params)
        tokens = [
            [tuple(np.asarray(s.data)) for s in state.token.value.addressable_shards]
            for state in states
        ]
        assert all(len(set(token)) == 1 for token in tokens), tokens
        assert len({token[0] for token in tokens}) == 8
        for state in states:
            release(state)


def test_nothing_is_compiled_after_the_first_step(devices, caplog):
    mesh = make_mesh(devices, "Auto", "Auto")
    tx = paged_adamw8bit(1e-2)
    params = place(make_tree(0), mesh)
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    _, state = update(params, init(params), params)
    _, state = update(params, state, params)  # the state's sharding is now the mesh's
    release(state)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        _, state = update(params, init(params), params)
        _, state = update(params, state, params)
    assert not [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
    release(state)


def test_ensemble_of_one_state_a_device(devices):
    """Members that step in one program, each with a model and a state of its own."""
    tx = paged_optax.scale_by_paged_adam8bit()
    mesh = make_mesh(devices, "Auto")
    grads = make_tree(1, {"w": (mesh.size, 64, 80)})
    members = [tx.init({"w": grads["w"][i]}) for i in range(mesh.size)]

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    def step(grads, states):
        updates, states = tx.update(*jax.tree.map(lambda leaf: leaf[0], (grads, states)))
        return jax.tree.map(lambda leaf: leaf[None], (updates, states))

    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    for _ in range(2):
        updates, states = step(grads, states)
    for i in range(mesh.size):
        member = {"w": grads["w"][i]}
        _, single = tx.update(member, tx.init(member))
        expected, single = tx.update(member, single)
        np.testing.assert_array_equal(updates["w"][i], expected["w"])
        report = memory_report(jax.tree.map(lambda leaf, i=i: leaf[i], states))
        assert (report.total, report.elsewhere) == (memory_report(single).total, 0)
        assert len(report.devices) == 1


def test_pmap(devices):
    """Data parallelism of old: every device has all parameters, and moments of its own for them."""
    tx = paged_optax.scale_by_paged_adam8bit()
    count = len(devices)
    grads = make_tree(1, {"w": (count, 64, 80)})
    update = jax.pmap(
        lambda g, state: tx.update(jax.lax.pmean(g, "devices"), state), "devices", devices=devices
    )
    mean = {"w": grads["w"].mean(0)}
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), tx.init(mean))
    single = tx.init(mean)
    for _ in range(3):
        updates, stacked = update(grads, stacked)
        expected, single = jax.jit(tx.update)(mean, single)
    for i in range(count):
        np.testing.assert_allclose(updates["w"][i], expected["w"], rtol=1e-5)
    state = jax.tree.map(lambda leaf: leaf[0], stacked)
    report = memory_report(state)
    assert [d.total for d in report.devices] == [memory_report(single).total] * count
    with pytest.raises(ValueError, match="pass one: jax.tree.map"):
        memory_report(stacked)
    with pytest.raises(NotImplementedError, match="which part of the parameters each device has"):
        moments(state)
    release(state)
    release(single)


def test_a_fresh_state_is_on_the_mesh_of_its_parameters():
    """Trainers that restore a state look for the mesh in it."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = {"w": jax.device_put(jnp.ones((64, 80)), NamedSharding(mesh, P("x")))}
    for tx in (paged_adamw8bit(1e-3), optax.chain(optax.clip(1.0), paged_adamw8bit(1e-3))):
        state = tx.init(params)
        for leaf in jax.tree.leaves(state):
            assert leaf.sharding == NamedSharding(mesh, P())
        step = jax.jit(tx.update)
        _, state = step(params, state, params)
        _, state = step(params, state, params)
        assert step._cache_size() == 1


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_rule_for_all_leaves_cuts_the_token_of_any(kind):
    """As below, for a transformation that is run leaf by leaf."""
    mesh = make_mesh(jax.devices("cpu")[:2], kind)

    def shardings(tree):
        return jax.tree.map(
            lambda x: NamedSharding(mesh, P("x") if x.ndim and x.shape[0] % 2 == 0 else P()), tree
        )

    tx = paged_optax.paged(optax.adam(1e-2), quantization=paged_optax.Quantization("float32"))
    whole = {"w": jnp.ones((64, 128))}
    with jax.set_mesh(mesh):
        params = jax.device_put(whole, shardings(whole))
        fresh = shardings(jax.eval_shape(tx.init, params))
        state = jax.jit(tx.init, out_shardings=fresh)(params)
        update = jax.jit(tx.update, out_shardings=shardings((params, state)))
        for _ in range(2):
            updates, state = update(params, state, params)
        assert not state.arrays.token.value.is_fully_replicated
        assert len(memory_report(state).devices) == 2
    alone = optax.adam(1e-2)
    _, state_alone = alone.update(whole, alone.init(whole))
    expected, _ = alone.update(whole, state_alone)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)
    assert release(state) > 0


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_rule_for_all_leaves_cuts_the_token(kind):
    """A usual FSDP rule, on an axis of two devices: the token is an array of two elements."""
    mesh = make_mesh(jax.devices("cpu")[:2], kind)

    def shardings(tree):
        return jax.tree.map(
            lambda x: NamedSharding(mesh, P("x") if x.ndim and x.shape[0] % 2 == 0 else P()), tree
        )

    tx = paged_adamw8bit(1e-2, quantization=DYNAMIC)
    whole = {"w": jnp.ones((64, 128))}
    with jax.set_mesh(mesh):
        params = jax.device_put(whole, shardings(whole))
        fresh = shardings(jax.eval_shape(tx.init, params))
        state = jax.jit(tx.init, out_shardings=fresh)(params)

        def step(params, state):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        update = jax.jit(step, out_shardings=shardings((params, state)))
        for _ in range(2):
            params, state = update(params, state)
        assert not state[0].token.value.is_fully_replicated
        _, single = step(*step(whole, tx.init(whole)))
        assert_trees_equal(moments(state), moments(single))
        assert len(memory_report(state).devices) == 2
        paged_optax.evict(state)
        assert_trees_equal(paged_optax.newest(state), state)
        assert all(entry.is_held for entry in paged_optax.states())
        finish(update(params, state))
        with pytest.raises(paged_optax.StateRefused, match="not the newest"):
            finish(update(params, state))
        assert release(state) > 0


def test_one_traced_init_many_times_in_a_program():
    """All calls have the same seed, and devices may run them in any order."""
    devices = jax.devices("cpu")[:8]
    mesh = make_mesh(devices, "Auto")
    tx = paged_optax.scale_by_paged_adam8bit()
    params = place({"w": jnp.ones((64, 128))}, mesh, {"w": P("x")})
    init = jax.jit(tx.init)
    program = jax.jit(lambda p: [tx.update(p, init(p))[1] for _ in range(8)])
    for _ in range(3):
        states = program(params)
        assert len({paged_optax.moments(state).mu["w"].shape for state in states}) == 1
        for state in states:
            assert len(memory_report(state).devices) == 8
            assert release(state) > 0
