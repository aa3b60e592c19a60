"""`plan`: bytes of moments are those of real states, and the rest is what runs took."""

import importlib.util
import json
import re
import textwrap
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import paged_optax
from helpers import DTYPES, FORMATS, kept_by, parse_bytes, run_python
from optimizers import BY_NAME, DESCENTS
from paged_optax import Paging, Quantization, memory_report, paged_adamw8bit, plan
from paged_optax.__main__ import main

GIB = 2**30
COMPILE = Path(__file__).parent / "compile_for_gpu.py"
LLAMA = COMPILE.parent.parent / "examples" / "llama.py"
GUIDE = COMPILE.parent.parent / "docs" / "planning.md"
HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
PARAMS = {"w": np.ones((300, 70), DTYPES["bfloat16"]), "b": np.ones(300, np.float32)}
ROUNDINGS = ["direction", "nearest", "stochastic", "compensated"]


def predicted(kept):
    """What `memory_report` should say; a GPU gives out memory in chunks of 2 MiB."""
    on_gpu = jax.default_backend() == "gpu"
    return kept.forecast(2**40)["on_gpu" if on_gpu else "on_cpu"]


def assert_exact(tx, params):
    """Moments and the rest of the state have the bytes that the shapes alone foretold."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), params)
    kept = kept_by(tx, shapes)
    state = tx.init(params)
    assert kept.in_xla == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    _, state = jax.jit(tx.update)(params, state, params)
    assert predicted(kept) == memory_report(state).total > 0


def make(name, rounding, **options):
    row = BY_NAME[name]
    if rounding == "direction":
        return row.direction(**options)
    return row.descent(1e-3, param_rounding=rounding, **options)


# --- Moments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [False, True], ids=["one slot", "replay"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("name", [row.name for row in DESCENTS if pytest.mark.fast in row.marks])
def test_moments_are_exact(name, codec, rounding, replay):
    tx = make(name, rounding, replay=replay, quantization=Quantization(codec))
    assert_exact(tx, jax.tree.map(jnp.asarray, PARAMS))


@pytest.mark.slow
@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 9000), st.integers(1, 40), st.sampled_from(list(DTYPES))),
        min_size=1,
        max_size=5,
    ),
    min_size=st.sampled_from([0, 1, 4096, 50_000]),
    rounding=st.sampled_from(ROUNDINGS),
    name=st.sampled_from(["adam", "lion"]),
    codec=st.sampled_from(list(FORMATS)),
)
def test_moments_of_any_tree_are_exact(sizes, min_size, rounding, name, codec):
    params = [jnp.ones((m, n), DTYPES[dtype]) for m, n, dtype in sizes]
    assert_exact(make(name, rounding, quantization=Quantization(codec, min_size=min_size)), params)


def in_both_branches(tx):
    def update(grads, state, params=None):
        loud = jnp.sum(grads["b"]) > 3
        return jax.lax.cond(loud, tx.update, tx.update, grads, state, params)

    return optax.GradientTransformation(tx.init, update)


LABELS = {"w": "large", "b": "small"}
WRAPPERS = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(1e-3)),
    "momentum next to it": lambda: optax.chain(optax.trace(0.9), paged_adamw8bit(1e-3)),
    "masked": lambda: optax.masked(paged_adamw8bit(1e-3), {"w": True, "b": False}),
    "partition": lambda: optax.partition(
        {"large": paged_adamw8bit(1e-3), "small": optax.adamw(1e-3)}, LABELS
    ),
    "two paged states": lambda: optax.partition(
        {"large": paged_adamw8bit(1e-3), "small": paged_optax.paged_lion8bit(1e-3)}, LABELS
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(paged_adamw8bit)(
        learning_rate=1e-3, weight_decay=0.1
    ),
    "skip_non_finite": lambda: paged_optax.skip_non_finite(paged_adamw8bit(1e-3), "element"),
    "both branches of cond": lambda: in_both_branches(paged_adamw8bit(1e-3)),
    "MultiSteps": lambda: paged_optax.MultiSteps(paged_adamw8bit(1e-3), 1),
    "optax.MultiSteps": lambda: optax.MultiSteps(paged_adamw8bit(1e-3, replay=True), 1),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_moments_inside_wrappers_are_exact(wrapper):
    with jax.numpy_dtype_promotion("standard"):
        assert_exact(WRAPPERS[wrapper](), jax.tree.map(jnp.asarray, PARAMS))


def test_moments_of_shards_are_exact():
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2, devices=jax.devices("cpu"))
    shapes, specs = {"w": (1024, 512), "b": (512,), "r": (64, 80)}, {"w": P("x", "y"), "b": P("y")}
    params = {
        name: jax.device_put(jnp.ones(shape), NamedSharding(mesh, specs.get(name, P())))
        for name, shape in shapes.items()
    }
    tx = paged_adamw8bit(1e-3)
    kept = kept_by(tx, params)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    report = memory_report(state)
    assert len(report.devices) == 8
    assert {device.total for device in report.devices} == {kept.forecast(0)["on_cpu"]}
    usage = plan(params, tx, card=GIB, host=GIB).usage
    assert usage.host == 8 * usage.moments


def test_abstract_shards_count_on_each_of_their_devices():
    mesh = AbstractMesh((8,), ("x",))
    whole = jax.ShapeDtypeStruct((8 * 4096, 4096), jnp.bfloat16)
    cut = jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=NamedSharding(mesh, P("x")))
    one = plan(whole, paged_adamw8bit(1e-3), card="24GiB", host="64GiB")
    part = plan(cut, paged_adamw8bit(1e-3), card="24GiB", host="64GiB")
    assert part.params == one.params // 8 == part.gradients
    assert part.other.state < one.other.state / 7.9
    assert part.usage.moments == pytest.approx(one.usage.moments / 8, abs=2 * 2**20)
    assert part.usage.host == 8 * part.usage.moments


@pytest.mark.gpu
@pytest.mark.parametrize("mebibytes", [0, 3, 17, 40])
def test_residents_on_a_gpu_are_exact(mebibytes):
    params = jnp.ones((4096, 4096))
    tx = paged_adamw8bit(1e-3, paging=Paging(device_bytes=mebibytes * 2**20))
    _, state = tx.update(params, tx.init(params), params)
    (device,) = memory_report(state).devices
    forecast = kept_by(tx, params).forecast(device.free)
    assert (device.total, device.resident) == (forecast["on_gpu"], forecast["resident"])


def test_nothing_is_allocated():
    before = paged_optax.release_all()
    plan("65b", card="48GiB", host="64GiB", rank=64)
    assert before == paged_optax.release_all() == 0


# --- The whole ----------------------------------------------------------------------------------

LORA = {"rank": 64}
# One H200 (jax 0.11.2, benchmarks/big_models.py): GiB of XLA's pool, at most in use or as compiled.
PAGED_POOLS = [
    ("65b", LORA, 2048, 43.77),
    ("13b", LORA, 1024, 9.99),
    ("13b", LORA, 2048, 10.67),
    ("13b", LORA, 8064, 14.49),
    ("33b", LORA, 1024, 22.37),
    ("33b", LORA, 2048, 23.34),
    ("8b", {}, 4096, 34.42),
    ("24b", {}, 4096, 102),
]
ADAMW_POOLS = [
    ("13b", LORA, 1024, 11.85),
    ("13b", LORA, 2048, 12.53),
    ("13b", LORA, 5248, 14.63),
    ("33b", LORA, 1024, 25.91),
    ("33b", LORA, 2048, 26.94),
    ("8b", {}, 4096, 61.03),
]


# In place, with gradients that are clipped while the step runs.
IN_PLACE_POOLS = [("24b", {"clip": False}, 4096, 91.60), ("32b", {"clip": False}, 4096, 126.52)]
# In the same runs: bytes of moments by memory_report.
MOMENTS = [
    ("65b", LORA, 1_625_292_800),
    ("13b", LORA, 509_607_936),
    ("8b", {}, 24_473_763_840),
    ("24b", {}, 71_840_038_912),
    ("32b", {}, 99_853_795_328),
]


def planned_pool(usage, name, options, sequence):
    planned = plan(name, card="139GiB", host="128GiB", sequence=sequence, **options)
    return getattr(planned, usage).pool / GIB


@pytest.mark.fast
@pytest.mark.parametrize(("name", "options", "sequence", "pool"), PAGED_POOLS)
def test_pool_is_as_measured(name, options, sequence, pool):
    assert planned_pool("usage", name, options, sequence) == pytest.approx(pool, rel=0.01)


@pytest.mark.parametrize(("name", "options", "sequence", "pool"), IN_PLACE_POOLS)
def test_pool_in_place_is_as_measured(name, options, sequence, pool):
    assert planned_pool("usage", name, options, sequence) == pytest.approx(pool, rel=0.015)


@pytest.mark.parametrize(("name", "options", "sequence", "pool"), ADAMW_POOLS)
def test_pool_with_optax_is_as_measured(name, options, sequence, pool):
    assert planned_pool("other", name, options, sequence) == pytest.approx(pool, rel=0.01)


@pytest.mark.parametrize(("name", "options", "moments"), MOMENTS)
def test_moments_are_as_measured(name, options, moments):
    planned = plan(name, card="139GiB", host="128GiB", **options)
    assert planned.usage.moments == moments


def test_clipping_takes_a_copy_of_the_largest_gradient():
    """XLA:GPU said 90.27 GiB without clipping (a described H200)."""
    assert planned_pool("usage", "24b", {"clip": False}, 4096) == pytest.approx(90.27, rel=0.01)


def test_a_65b_model_on_a_48gib_card():
    """As measured with a pool of 46.2 GiB: 48,553 MiB for the driver, 0.59 GiB of moments there."""
    planned = plan("65b", card="48GiB", host="64GiB", rank=64)
    assert planned.fits and not planned.is_tight and not planned.other.fits
    assert planned.total <= 48 * GIB
    assert "optax.adamw does not fit" in str(planned)
    tx = paged_adamw8bit(1e-3, paging=Paging(device_bytes=int(0.6 * GIB)))
    resident = plan("65b", tx, card="48GiB", host="64GiB", rank=64).usage.resident
    assert resident == 637_534_208
    assert (46.2 * GIB + resident + planned.context) / 2**20 == pytest.approx(48_553, rel=0.005)


@pytest.mark.parametrize(
    ("share", "mebibytes", "milliseconds"),
    [(0.75, 138, 3.58), (0.5, 266, 6.76), (0.25, 394, 9.96), (0.0, 522, 13.20)],
)
def test_time_of_moments_on_the_host(share, mebibytes, milliseconds):
    """docs/paging.md has these steps: 268M parameters and a link of 50.5 GB/s each way."""
    budget = int(share * 520 * 2**20)
    tx = paged_adamw8bit(1e-3, paging=Paging(device_bytes=budget))
    params = jax.ShapeDtypeStruct((2**28,), jnp.float32)
    usage = plan(params, tx, card="24GiB", host="64GiB", link=50.5e9).usage
    assert usage.on_host == mebibytes * 2**20
    assert usage.host_milliseconds == pytest.approx(milliseconds, rel=0.03)


def test_a_slow_link_takes_longer_and_replay_does_not():
    params = jax.ShapeDtypeStruct((2**28,), jnp.float32)

    def milliseconds(link, **options):
        tx = paged_adamw8bit(1e-3, paging=Paging(device_bytes=0), **options)
        return plan(params, tx, card="24GiB", host="64GiB", link=link).usage.host_milliseconds

    assert milliseconds(12e9) == pytest.approx(522 * 2**20 / 12e9 / 0.95 * 1000, rel=0.01)
    assert milliseconds(12e9, replay=True) == milliseconds(12e9)  # reads one slot, writes one


@pytest.mark.fast
def test_settings_leave_room_for_everything():
    for gibibytes in range(44, 64):
        planned = plan("65b", card=gibibytes * GIB, host="64GiB", rank=64)
        usage = planned.usage
        assert planned.fits == (gibibytes > 44)
        if not planned.fits:
            continue
        share = 0.75 if usage.mem_fraction is None else usage.mem_fraction
        pool = share * planned.card
        assert usage.pool <= pool
        assert pool + usage.resident + planned.context <= planned.card
        assert planned.is_tight == (pool < usage.pool + usage.reserve)
        assert f"MEM_FRACTION={str(round(share, 3)).lstrip('0')}" in str(planned) or share == 0.75
    assert usage.resident == usage.moments


def test_the_default_pool_is_kept_where_it_does():
    planned = plan("13b", card="24GiB", host="64GiB", rank=16)
    assert planned.usage.mem_fraction is None
    assert "set nothing" in str(planned)


def test_moments_without_host_memory_do_not_fit():
    planned = plan("8b", card="139GiB", host="16GiB", sequence=4096)
    assert not planned.fits
    (problem,) = planned.usage.problems
    assert "22.79 GiB of host memory" in problem and "16.00 GiB" in problem
    assert planned.other.fits


def test_a_card_smaller_than_the_parameters():
    planned = plan("8b", card="8GiB", host="64GiB")
    assert not planned.fits and planned.usage.resident == 0
    assert "more than the card's 8.00 GiB" in str(planned)
    assert "MEM_FRACTION" not in str(planned)


def test_budgets_count():
    tx = paged_adamw8bit(1e-4, param_rounding="compensated", paging=Paging(device_bytes=20 * GIB))
    planned = plan("24b", tx, card="139GiB", host="128GiB", sequence=4096)
    assert planned.usage.resident == 20 * GIB
    assert f"Paging(device_bytes={20 * GIB})" in str(planned)


@pytest.mark.parametrize("base", ["nf4", "nf4-double", "bfloat16"])
def test_frozen_weights(base):
    """By counting what a layer has."""
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    bits = {"nf4": 4 + 16 / 64, "nf4-double": 4 + 8 / 64 + 64 / (64 * 256), "bfloat16": 16}[base]
    rest = 2 * 32_000 * 4096 + 65 * 4096
    planned = plan("7b", card="80GiB", host="64GiB", rank=8, base=base)
    assert planned.frozen == 32 * layer * bits / 8 + 2 * rest


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("7b", 6.74),
        ("8b", 8.03),
        ("13b", 13.0),
        ("24b", 23.6),
        ("32b", 32.8),
        ("33b", 32.5),
        ("65b", 65.3),
    ]
    + [("70b", 69.0)],
)
def test_shapes_have_the_published_size(name, billions):
    planned = plan(name, card="200GiB", host="300GiB")
    assert planned.params / 2 == pytest.approx(billions * 1e9, rel=0.003)


@pytest.mark.skipif(not LLAMA.exists(), reason="without examples/llama.py")
@pytest.mark.parametrize("rank", [0, 64])
def test_shapes_are_those_of_the_example(rank, monkeypatch):
    monkeypatch.syspath_prepend(LLAMA.parent)
    import llama

    for name in set(llama.SHAPES) - {"tiny"}:
        base, lora = example_bytes(llama, llama.SHAPES[name], rank)
        planned = plan(name, card="139GiB", host="256GiB", rank=rank or None)
        assert (planned.frozen, planned.params) == ((base, lora) if rank else (0, base)), name


def example_bytes(llama, config, rank):
    """Bytes of the weights of examples/llama.py, and of adapters."""

    def count(make):
        leaves = jax.tree.leaves(jax.eval_shape(make))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    key = jax.random.key(0)
    base = count(lambda: llama.random_base(key, config, bool(rank)))
    return base, count(lambda: llama.init_lora(key, config, rank or 1))


# Of steps whose peak is in the backward pass, and of others whose peak is in the update.
COMPILED = ["65b:64:1:2048", "33b:64:1:2048", "13b:64:2:1024", "8b:0:1:4096", "24b:0:1:4096"]


@pytest.mark.slow
@pytest.mark.skipif(not COMPILE.exists(), reason="tests without the source tree")
@pytest.mark.skipif(not LLAMA.exists(), reason="without examples/llama.py")
def test_named_shapes_take_what_xla_compiles(tmp_path):
    """XLA:GPU compiles steps of examples/llama.py; without a GPU too, if its plugin is there."""
    if not HAS_PLUGIN and jax.default_backend() != "gpu":
        pytest.skip("needs jax-cuda13-plugin")
    code = COMPILE.read_text(encoding="utf-8")
    platforms = "cuda,cpu" if jax.default_backend() == "gpu" else "cpu"
    process = run_python(code, tmp_path, LLAMA.parent, *COMPILED, JAX_PLATFORMS=platforms)
    for run, nbytes in json.loads(process.stdout.splitlines()[-1]).items():
        name, rank, batch, sequence = run.split(":")
        planned = plan(
            name,
            card="139GiB",
            host="128GiB",
            rank=int(rank) or None,
            batch=int(batch),
            sequence=int(sequence),
        )
        assert planned.usage.pool == pytest.approx(nbytes, rel=0.03), run


# --- Your own model -----------------------------------------------------------------------------


def train_step(tx):
    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.sum((x @ p["w"]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("analysed", [False, True], ids=["compiled", "memory_analysis"])
def test_a_compiled_step_tells_what_xla_needs(analysed):
    tx = optax.chain(optax.trace(0.9), paged_adamw8bit(1e-3))
    params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    step = jax.jit(train_step(tx), donate_argnums=(0, 1))
    compiled = step.lower(params, jax.eval_shape(tx.init, params), x).compile()
    stats = compiled.memory_analysis()
    about = stats if analysed else compiled
    planned = plan(params, tx, card="1GiB", host="1GiB", compiled=about)
    taken = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    taken += stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert planned.usage.pool == taken
    assert planned.frozen == 64 * 512 * 4
    assert planned.usage.state == 512 * 512 * 4 + 12
    assert planned.other.pool == taken + 512 * 512 * 4 - 12 + 4  # two moments instead of one


def test_without_activations_it_may_fit():
    planned = plan(PARAMS, paged_adamw8bit(1e-3), card="4GiB", host="1GiB", frozen="1GiB")
    assert planned.frozen == GIB and planned.usage.temporaries is None
    assert "it may fit" in str(planned) and "not known" in str(planned)
    known = plan(PARAMS, paged_adamw8bit(1e-3), card="4GiB", host="1GiB", activations="5GiB")
    assert not known.fits
    frozen = {"base": jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)}
    with_tree = plan(PARAMS, paged_adamw8bit(1e-3), card="4GiB", host="1GiB", frozen=frozen)
    assert with_tree.frozen == 2 * 1024**2


def test_to_dict_is_json():
    planned = plan("65b", card="48GiB", host="64GiB", rank=64)
    about = json.loads(json.dumps(planned.to_dict()))
    assert about["usage"]["moments"] == planned.usage.moments
    assert about["fits"] and not about["other"]["fits"]
    assert about["total"] == planned.total


def test_another_optimizer_has_no_moments():
    planned = plan("7b", optax.sgd(1e-3), card="48GiB", host="64GiB", name="optax.sgd")
    assert planned.usage.moments == planned.usage.host == 0
    assert "optax.sgd" in str(planned) and "Paging" not in str(planned)


# --- In a shell ---------------------------------------------------------------------------------


@pytest.fixture
def shell(monkeypatch, capsys):
    """Runs a command of `python -m paged_optax`; returns its status, output and errors."""

    def run(command):
        monkeypatch.setattr("sys.argv", ["paged_optax", *command.split()])
        try:
            status = main()
        except SystemExit as exit:  # of argparse
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.skipif(not GUIDE.exists(), reason="tests without the source tree")
def test_the_guide_shows_what_the_command_prints(shell):
    command, shown = re.search(
        r"^    python -m paged_optax (plan .*)\n\n((?:    .*\n|\n)+)",
        GUIDE.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    ).groups()
    status, printed, _ = shell(command)
    assert status == 0
    assert printed.strip() == textwrap.dedent(shown).strip()


def test_options_of_the_command(shell):
    options = "--model 24b --card 139GiB --host 256GiB --sequence 4096 --json"
    tx = paged_optax.paged_lion8bit(
        1e-3,
        param_rounding="stochastic",
        replay=True,
        quantization=Quantization("float32", min_size=9),
        paging=Paging(device_bytes=20 * GIB, headroom_bytes=0),
    )
    paged = "--optimizer paged_lion8bit --param-rounding stochastic --replay --codec float32"
    budget = "--min-size 9 --device-bytes 20GiB --headroom-bytes 0 --link 25GB"
    status, printed, _ = shell(f"plan {options} {paged} {budget}")
    wanted = plan(
        "24b", tx, card="139GiB", host="256GiB", sequence=4096, link=25e9, name="paged_lion8bit"
    )
    assert json.loads(printed) == json.loads(json.dumps(wanted.to_dict()))
    assert status == 0 and 18 * GIB < wanted.usage.resident <= 20 * GIB


def test_status_of_the_command(shell):
    assert shell("plan --model 8b --card 8GiB --host 64GiB --optimizer optax.sgd")[0] == 1
    assert shell("plan --model 7b --card 24GiB --host 64GiB --rank 8 --activations 1GiB")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model 9b", "unknown model '9b'"),
        ("--model 7b --card 48GBB", "card is '48GBB', which is not a size"),
        ("--model 7b --optimizer adamw", "unknown optimizer 'adamw'; there are paged_adagrad8bit"),
        ("--model 7b --optimizer optax.nonsense", "unknown optimizer 'optax.nonsense'"),
        ("--model 7b --optimizer optax.sgd --replay", "--replay is for paged optimizers"),
        ("--model 7b --codec int3", "unknown codec 'int3'"),
        ("--card 24GiB", "the following arguments are required: --model"),
    ],
)
def test_a_command_that_makes_no_sense(shell, options, message):
    status, printed, errors = shell(f"plan --card 24GiB {options}")
    assert status == 2 and not printed
    assert message in errors and "Traceback" not in errors


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("48GiB", 48 * GIB), ("48 gib", 48 * GIB), ("80GB", 80 * 10**9), ("1.5KiB", 1536)]
    + [("17", 17), (".5MiB", 2**19), (4096, 4096), (np.int64(5), 5), ("7 B", 7)],
)
def test_sizes(text, size):
    assert parse_bytes("card", text) == size


@pytest.mark.parametrize("text", ["48GBB", "", "GiB", "-1GiB", "1e3", "48 Gi B", "1.2.3GiB", "48G"])
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="card is .* not a size; .* '48GiB'"):
        plan("7b", card=text, host=GIB)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("66b", {}, "unknown model '66b'; there are 7b, 8b"),
        ("7b", {"rank": 0}, "rank is 0; it must be an int of at least 1"),
        ("7b", {"batch": 1.5}, "batch is 1.5"),
        ("7b", {"base": "nf4"}, "there is no rank"),
        ("7b", {"rank": 8, "base": "int3"}, "base is 'int3'; it must be one of nf4"),
        ("7b", {"link": 0}, "link is 0; it is a rate in bytes per second"),
        ("7b", {"host": -1}, "host is -1"),
        (PARAMS, {"rank": 8}, "are for named models"),
        (PARAMS, {"compiled": 3}, "compiled is a int"),
        ({}, {}, "neither a name nor a tree of arrays"),
        ({"w": "no array"}, {}, "neither a name nor a tree of arrays"),
    ],
)
def test_what_makes_no_sense(model, options, message):
    with pytest.raises(ValueError, match=message):
        plan(model, paged_adamw8bit(1e-3), card="24GiB", **{"host": "64GiB"} | options)


def test_a_step_of_other_parameters():
    tx = paged_adamw8bit(1e-3)
    small = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    step = jax.jit(train_step(tx)).lower(small, jax.eval_shape(tx.init, small), x).compile()
    with pytest.raises(ValueError, match="less than its parameters"):
        plan(PARAMS, tx, card="24GiB", host="64GiB", compiled=step)
    with pytest.raises(ValueError, match="leave those out"):
        plan(small, tx, card="24GiB", host="64GiB", compiled=step, frozen=1)


def test_a_size_that_is_no_size():
    with pytest.raises(TypeError, match="card is 4.5; it must be an int"):
        plan("7b", card=4.5, host=GIB)


def test_parameters_that_the_optimizer_refuses():
    with pytest.raises(TypeError, match="int32; paged optimizers take float32"):
        plan({"w": jax.ShapeDtypeStruct((4,), jnp.int32)}, card=GIB, host=GIB)


def test_without_a_gpu_the_card_has_to_be_named():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="no GPU here to plan for .*card='48GiB'"):
        plan("7b", rank=8)
