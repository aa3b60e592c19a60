"""Programs with our calls in them that were written by hand, or changed after they were exported.

What does not fit is refused before anything is read or written. Under AddressSanitizer nothing is
touched outside of an array either (`.ci/run`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import (
    RAISES,
    Rule,
    finish,
    make_options,
    make_step,
    new_token,
    on_cpu,
    part_of,
    release_all,
)
from paged_optax import Quantization

pytestmark = on_cpu

SIZE = 5000
PARAMS = {"w": jnp.ones(SIZE)}
ADAM = Rule("adam", b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False)
F32, F16, I32 = np.float32, np.float16, np.int32
TOKEN, LEAF = ((2,), I32), ((SIZE,), F32)


def call(target, results, operands, attributes):
    results = [jax.ShapeDtypeStruct(*result) for result in results]
    run = jax.ffi.ffi_call(f"paged_optax_{target}", results, has_side_effect=True)
    return run(*operands, **attributes)


def step_of(rule, output):
    options = make_options(
        replay=False, non_finite="propagate", quantization=Quantization("ratio"), paging=None
    )
    tree = jax.tree.structure(PARAMS)
    return make_step(rule, options, [PARAMS["w"]], ("['w']",), tree, output=output)


def token():
    return jax.tree.leaves(new_token(1))[0]


@dataclasses.dataclass
class Issue:
    results: tuple = (TOKEN,)
    seed: tuple = (2,)

    def __call__(self):
        return call("issue", self.results, [jnp.zeros(self.seed, I32)], dict(shared=False, site=""))


@dataclasses.dataclass
class Update:
    results: tuple = (TOKEN, LEAF)
    operands: dict = dataclasses.field(default_factory=dict)  # others than the right ones
    attributes: dict = dataclasses.field(default_factory=dict)

    def __call__(self):
        hyperparams = np.array([0.9, 0.999, 1e-8, 0], F32)
        right = [token(), np.int32(0), hyperparams, np.int32(0), np.ones(SIZE, F32)]
        operands = [self.operands.get(i, operand) for i, operand in enumerate(right)]
        attributes = step_of(ADAM, "direction").attributes() | self.attributes
        return call("update", self.results, operands, attributes)


def opened():
    """A step that was opened, and the token for its loads and stores."""
    step = step_of(Rule("array"), "open")
    operands = [token(), np.int32(0), np.zeros(1, F32), np.int32(0), np.ones(SIZE, F32)]
    return step, call("update", [TOKEN], operands, step.attributes())[0]


@dataclasses.dataclass
class Load:
    results: tuple = (TOKEN, LEAF)
    attributes: dict = dataclasses.field(default_factory=dict)

    def __call__(self):
        step, open_token = opened()
        attributes = part_of(step, [0]).attributes() | self.attributes
        return call("load", self.results, [open_token, np.ones(SIZE, F32)], attributes)


@dataclasses.dataclass
class Store:
    array: tuple = LEAF
    results: tuple = (TOKEN,)
    attributes: dict = dataclasses.field(default_factory=dict)

    def __call__(self):
        step, open_token = opened()
        operands = [open_token, np.int32(0), np.ones(*self.array)]
        attributes = part_of(step, [0], closes=True).attributes() | self.attributes
        return call("store", self.results, operands, attributes)


def i8(*values):
    return np.array(values, np.int8)


def i64(*values):
    return np.array(values, np.int64)


SMALL_TOKEN = ((1,), I32)
OTHER_PART = "in another way than when its step began"
MISFITS = [
    (Issue(results=(SMALL_TOKEN,)), "the new token has another size"),
    (Issue(results=(((0,), I32),)), "the new token has another size"),
    (Issue(seed=(0,)), "the seed has another size"),
    (Update(results=(TOKEN, ((SIZE,), F16))), "an update has another type"),
    (Update(results=(TOKEN, ((16,), F32))), "a result has another size"),
    (Update(results=(SMALL_TOKEN, LEAF)), "the new token has another size"),
    (Update(results=(TOKEN,)), "a wrong number of results"),
    (Update(operands={0: np.zeros(1, I32)}), "operand 0 has another size"),
    (Update(operands={1: np.float32(0)}), "operand 1 has another size or type"),
    (Update(operands={2: np.zeros(3, F32)}), "operand 2 has another size"),
    (Update(operands={3: np.zeros(2, I32)}), "operand 3 has another size"),
    (Update(operands={4: np.ones(SIZE, I32)}), "must be float32, bfloat16 or float16"),
    (Update(attributes={"formats": i8(77)}), "a format is 77"),
    (Update(attributes={"formats": i8()}), "5 operands for 0 leaves"),
    (Update(attributes={"keys": i64(1, 2)}), "a wrong number of keys"),
    (Update(attributes={"decays": i8(1)}), "a wrong number of decays"),
    (Update(attributes={"rule": np.int64(99)}), "rule is 99"),
    (Update(attributes={"flags": np.int64(2)}), "flags is 2"),
    (Update(attributes={"output": np.int64(3)}), "a rule and an output"),
    (Update(attributes={"param_rounding": np.int64(9)}), "param_rounding is 9"),
    (Load(results=(TOKEN, ((2 * SIZE,), F32))), OTHER_PART),
    (Load(results=(TOKEN, ((50, 100), F32))), OTHER_PART),
    (Load(results=(SMALL_TOKEN, LEAF)), "another size"),
    (Load(results=(TOKEN, ((SIZE,), I32))), "must be float32"),
    (Load(attributes={"leaves": i64(1)}), OTHER_PART),
    (Load(attributes={"leaves": i64(-1)}), OTHER_PART),
    (Load(attributes={"leaves": i64()}), "a wrong number of leaves"),
    (Load(attributes={"formats": i8(77)}), "an unknown format"),
    (Load(attributes={"shards": "no shards"}), "which parts the devices have"),
    (Store(array=((2 * SIZE,), F32)), OTHER_PART),
    (Store(array=((16,), F32)), OTHER_PART),
    (Store(results=(SMALL_TOKEN,)), "another size"),
    (Store(attributes={"leaves": i64(1 << 40)}), OTHER_PART),
    (Store(attributes={"keys": i64(1, 2)}), "a wrong number of leaves"),
]


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    release_all()


@pytest.mark.parametrize(
    "program, match", [pytest.param(*case, id=f"{case[0]}"[:60]) for case in MISFITS]
)
def test_what_does_not_fit_is_refused(program, match):
    with pytest.raises(RAISES, match=match):
        jax.block_until_ready(program())


@pytest.mark.parametrize(
    "program", [Issue(), Update(), Load(), Store()], ids=["issue", "update", "load", "store"]
)
def test_what_fits_runs(program):
    finish(program())
