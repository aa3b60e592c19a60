"""Optax's own tests, with paged optimizers where they say Adam.

Optax ships its test modules. Here they are run with other meanings for some names in them: what
builds an `optax.adam` there builds a `paged_adam8bit`. A case that ends without having made a paged
state fails, and so does one that works although `LEFT_OUT` says that it cannot.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
import types
import unittest
import unittest.mock
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import optax
import pytest

import paged_optax
from helpers import raise_if_refused
from paged_optax import Quantization, ScaleByPagedAdam8bitState

pytestmark = [pytest.mark.optax_suite, pytest.mark.slow]

OPTAX = importlib.metadata.version("optax")
KNOWN_OPTAX = "0.2.8"  # what the tables below were written for
ADAM = r"\b(scale_by_)?n?adamw?\b"
DOCS = Path(__file__).parent.parent / "docs" / "compatibility.md"

# Leaves are small in these tests, so moments are float32 unless min_size says otherwise.
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "8bit": {"quantization": Quantization(min_size=0)},
    "replay": {"quantization": Quantization(min_size=0), "replay": True},
}
ONE_SLOT = ("float32", "8bit")

PAGED = {
    "adam": (paged_optax.paged_adam8bit, {}),
    "adamw": (paged_optax.paged_adamw8bit, {}),
    "nadam": (paged_optax.paged_adam8bit, {"nesterov": True}),
    "nadamw": (paged_optax.paged_adamw8bit, {"nesterov": True}),
    "scale_by_adam": (paged_optax.scale_by_paged_adam8bit, {}),
}


class Suite(NamedTuple):
    """Tests of one module of optax.

    Attributes:
      module: its name, without ``optax.``.
      tests: regular expression for the start of ``Class.test (parameters)``: what concerns Adam.
      tables: its tables of optimizers, and the names whose rows stay.
      instead: what else to replace, and how: by the optimizer of that name in `PAGED`, or by a
        method of `Substitution`.
      variants: which of `VARIANTS` run, each with a regular expression like `tests`.
    """

    module: str
    tests: str = ""
    tables: dict[str, tuple[str, ...]] = {}
    instead: dict[str, str] = {}
    variants: dict[str, str] = {"8bit": ""}


ALIASES = ("adam", "adamw", "nadam", "nadamw")
BOTH = {"float32": "", "8bit": ""}
# Where a test knows SGD's numbers, a paged optimizer runs beside SGD and its updates are dropped.
BESIDE_SGD = {"sgd": "beside"}
COMBINING = (
    r"\w+\.test_chain|ExtraArgsTest\.test_extra_args$"
    r"|PartitionTest\.test_(empty|labels_mismatch[01])"
)
STATES = r"\w+\.test_(gradient_accumulation|state_shape.*\.float32|optimizers_can)"
NUMBERS = r"\w+\.test_(optimization\d|optimizers\d)"

SUITES = (
    Suite(
        "_src.alias_test",
        r"AliasTest\.(?!.*sgd_mom)",
        {"_OPTIMIZERS_UNDER_TEST": ALIASES},
        variants={"float32": "", "8bit": NUMBERS, "replay": STATES},
    ),
    Suite("_src.combine_test", COMBINING, instead=BESIDE_SGD),
    Suite("_src.float64_test", tables={"ALL_MODULES": ("adam", "adamw", "scale_by_adam")}),
    Suite(
        "_src.linesearch_test",
        r"\w+\.test_(gradient_descent_with_linesearch|recycling|armijo|value_and_grad_from_state)",
        instead=BESIDE_SGD,
    ),
    Suite(
        "_src.lookahead_test",
        instead={"_test_optimizer": "beside"},
        variants={"8bit": "", "replay": ""},
    ),
    Suite(
        "_src.transform_test",
        r"\w+\.test_(scalers_adam$|rms_match|apply_every)",
        instead=BESIDE_SGD,
        variants=BOTH,
    ),
    Suite(
        "contrib._common_test",
        # Some take the wrapper away: nothing is new then in the rows of SGD.
        "(?!.*(state_shape|accept_learning).*opt_name='sgd'|.*opt_name='sgd'.*wrap=False)",
        tables={"_MAIN_OPTIMIZERS_UNDER_TEST": ("sgd",), "_BASE_OPTIMIZERS": ("adam", "adamw")},
        instead={"sgd": "adamw"},
        variants={"float32": "", "8bit": NUMBERS, "replay": STATES},
    ),
    Suite("contrib._complex_valued_test", r"\w+\.\w+_adam$", variants=BOTH),
    Suite(
        "contrib._galore_test",
        "(?!.*test_projector)",  # a part of GaLore's own
        instead={"galore": "base_optimizer"},
        variants={"float32": "", "8bit": ".*(converge|decreases)"},
    ),
    Suite("contrib._mechanic_test", instead={"_test_optimizer": "beside"}),
    Suite(
        "contrib._sam_test",
        # Only SGD does without a reset: Adam comes to where the gradient, to be normalized, is 0.
        tables={"_ADVERSARIAL_OPTIMIZERS_UNDER_TEST": ("sgd",)},
        instead={"sam": "keep_state", **BESIDE_SGD},
        variants={"8bit": "", "replay": ".*opaque_mode=False"},
    ),
    Suite("contrib._schedule_free_test", "(?!.*buffer_donation)", instead={"sgd": "adam"}),
    Suite("experimental._aggregating_test", "(?!.*standard1)", instead=BESIDE_SGD),
    Suite(
        "schedules._inject_test",
        r"\w+\.test_(constant|numeric_static|hyperparam_d)",
        variants=BOTH,
    ),
    Suite(
        "schedules._schedule_test",
        "ScheduleAsLearningRateTest",
        {"_OPTIMIZERS_UNDER_TEST": ALIASES},
    ),
    Suite(
        "transforms._accumulation_test",
        r"\w+\.test_multi_steps(?!_computes)",
        {"OPTIMIZERS_TO_TEST": ("adam",)},
        {"MultiSteps": "jit", **BESIDE_SGD},
        variants={"8bit": "(?!.*precision0)", "replay": ""},
    ),
    Suite("transforms._combining_test", COMBINING, instead=BESIDE_SGD),
    Suite(
        "transforms._conditionality_test",
        "(?!.*statefull)",
        instead={"scale": "beside", **BESIDE_SGD},
    ),
    # Without test_selective_bad_structure, which fails with SGD too: jax changed its message.
    Suite("transforms._freezing_test", r"Selective(?!.*bad_structure)", instead=BESIDE_SGD),
    Suite("transforms._layouts_test", instead=BESIDE_SGD),
    Suite(
        "transforms._masking_test",
        r"\w+\.test_(masked_(sgd|stateful)|prefix|empty|nested|mask_comp)",
        instead=BESIDE_SGD,
    ),
    Suite("transforms._monitoring_test", instead=BESIDE_SGD),
    Suite("tree_utils._state_utils_test", "(?!.*test_map_params)", instead=BESIDE_SGD),
)
# In a process with eight devices.
SHARDING = Suite(
    "_src.sharding_test",
    "(?!.*microbatch)",
    {"OPTIMIZERS": ALIASES},
    variants={"8bit": "", "replay": ""},
)


class LeftOut(NamedTuple):
    """Cases that rightly raise here and not with optax.adam, or that need a larger tolerance.

    Attributes:
      test: module and name of the tests.
      what: which of their cases; this, `test` and `why` are for readers of `DOCS`.
      why: the reason.
      cases: regular expression somewhere in ``Class.test (parameters)``.
      error: what they raise; None if they hold with `rtol` and `atol`.
      match: regular expression for the error's text.
      variants: which of `VARIANTS` are affected.
      rtol, atol: tolerances that hold.
    """

    test: str
    what: str
    why: str
    cases: str
    error: type[Exception] | tuple[type[Exception], ...] | None = None
    match: str = ""
    variants: tuple[str, ...] = tuple(VARIANTS)
    rtol: float = 0.0
    atol: float = 0.0

    def has(self, case: "Case") -> bool:
        module, test = self.test.split(" ")
        return (
            module == case.suite.module
            and case.description.startswith(test)
            and re.search(self.cases, case.description) is not None
            and case.variant in self.variants
        )


OLD_STATE = ((RuntimeError, ValueError), "this optimizer state is not the newest one", ONE_SLOT)
MU_DTYPE = (TypeError, "mu_dtype is .* it can only be None")
NO_MU_DTYPE = "`mu_dtype` can only be None: moments have 8 bits"
NO_COMPLEX = "complex parameters; `split_real_and_imaginary` takes them apart, and its test runs"
NO_FLOAT64 = "float64 parameters"
NO_MU = "the moments are outside JAX; `paged_optax.moments` reads them"
TWICE = "uses a state twice, which takes `replay=True`"

LEFT_OUT = (
    LeftOut(
        "_src.alias_test AliasTest.test_explicit_dtype",
        "adam, adamw",
        f"{NO_MU_DTYPE}, and the state has no `mu`",
        "",
        (TypeError, AttributeError),
        f"{MU_DTYPE[1]}|'NoneType' object has no attribute 'dtype'|has dtype complex64",
    ),
    LeftOut(
        "_src.alias_test AliasTest.test_optimization",
        "complex64",
        NO_COMPLEX,
        "complex64",
        TypeError,
        "has dtype complex64",
    ),
    LeftOut(
        "_src.alias_test AliasTest.test_state_shape_dtype_shard_stability",
        "complex64, complex128",
        NO_COMPLEX,
        "complex",
        TypeError,
        "has dtype complex",
    ),
    LeftOut(
        "_src.alias_test AliasTest.test_state_shape_dtype_shard_stability",
        "float64",
        NO_FLOAT64,
        "float64",
        TypeError,
        "has dtype float64",
    ),
    LeftOut(
        "_src.combine_test ExtraArgsTest.test_extra_args",
        "all",
        "integer parameters",
        "",
        TypeError,
        "has dtype int32",
    ),
    LeftOut(
        "_src.float64_test Float64Test.test_mixed_dtype_input_outputs",
        "all",
        NO_FLOAT64,
        "",
        TypeError,
        "has dtype float64",
    ),
    LeftOut(
        "_src.transform_test TransformTest.test_rms_match_adam",
        "rtol=1e-6; 2e-5 holds",
        "optax's first update is off by 6e-6: `1 - b2**t` is computed in float32, `1 - b2` is not",
        "",
        variants=("float32",),
        rtol=2e-5,
    ),
    LeftOut(
        "_src.transform_test TransformTest.test_rms_match_adam",
        "rtol=1e-6 with 8-bit moments; 1e-3 holds",
        "the second moment is rounded to 8 bits",
        "",
        variants=("8bit",),
        rtol=1e-3,
    ),
    LeftOut(
        "contrib._common_test ContribTest.test_state_shape_dtype_shard_stability",
        "float64",
        NO_FLOAT64,
        "float64",
        TypeError,
        "has dtype float64",
    ),
    LeftOut(
        "contrib._common_test ContribTest.test_optimizers_can_be_wrapped_in_inject_hyperparams",
        "reduce_on_plateau",
        "optax skips it for every optimizer",
        "reduce_on_plateau",
        unittest.SkipTest,
        "reduce_on_plateau is not supported",
    ),
    LeftOut(
        "contrib._galore_test GaLoreTest",
        "tests that read `state.mu`",
        NO_MU,
        "_projection_state_shapes|_clipped_|memory_reduction|_right_projection",
        AttributeError,
        "has no attribute 'mu'",
    ),
    LeftOut(
        "contrib._galore_test GaLoreTest",
        "test_mixed_pytree_shapes_jittable_regression, test_mu_dtype_controls_moment_dtype",
        NO_MU_DTYPE,
        "test_mixed_pytree|test_mu_dtype",
        *MU_DTYPE,
    ),
    LeftOut(
        "contrib._sam_test SAMTest.test_optimization",
        "opaque_mode=False, without `replay=True`",
        TWICE,
        "opaque_mode=False",
        *OLD_STATE,
    ),
    LeftOut(
        "contrib._schedule_free_test ScheduleFreeTest.test_explicit_dtype",
        "complex64 parameters",
        NO_COMPLEX,
        "params_dtype='complex64', state_dtype='complex64'",
        TypeError,
        "has dtype complex64",
    ),
    LeftOut(
        "contrib._schedule_free_test ScheduleFreeTest.test_explicit_dtype",
        "complex64 parameters with a real state",
        "optax skips it for every optimizer",
        "params_dtype='complex64', state_dtype=(?!'complex64')",
        unittest.SkipTest,
        "Complex params with non-complex state",
    ),
    LeftOut(
        "contrib._schedule_free_test ScheduleFreeTest.test_schedule_free_adamw",
        "atol=1e-6 with 8-bit moments; 5e-3 holds",
        "moments are rounded to 8 bits",
        "",
        variants=("8bit",),
        atol=5e-3,
    ),
    LeftOut(
        "contrib._complex_valued_test ComplexValuedTest.test_split_real_and_imaginary_adam",
        "rtol=1e-6 with 8-bit moments",
        "moments are rounded at random, each leaf by bits of its own",
        "",
        AssertionError,
        "Not equal to tolerance rtol=1e-06",
        ("8bit",),
    ),
    LeftOut(
        "transforms._accumulation_test AccumulationTest.test_multi_steps",
        "without `replay=True`",
        TWICE,
        r"test_multi_steps(_every|_scan|_skip|$)",
        *OLD_STATE,
    ),
    LeftOut(
        "transforms._accumulation_test AccumulationTest.test_multi_steps_mixed_precision",
        "mu_dtype",
        NO_MU_DTYPE,
        "mu_dtype",
        *MU_DTYPE,
    ),
    LeftOut(
        "transforms._combining_test ExtraArgsTest.test_extra_args",
        "all",
        "integer parameters",
        "",
        TypeError,
        "has dtype int32",
    ),
    LeftOut(
        "tree_utils._state_utils_test StateUtilsTest",
        "test_dict_based_optimizers, test_inject_hparams",
        NO_MU,
        "test_dict_based_optimizers|test_inject_hparams",
        AttributeError,
        "has no attribute 'mu'",
    ),
    LeftOut(
        "tree_utils._state_utils_test StateUtilsTest",
        "test_adam, test_map_non_params_to_none, test_tree_get, test_tree_get_all_with_path,"
        " test_tree_set",
        "look for a `ScaleByAdamState`; ours is a `ScaleByPagedAdam8bitState`",
        "test_adam|test_map_non_params_to_none|test_tree_[gs]et",
        (AssertionError, KeyError),
        "ScaleByPagedAdam8bitState|None != Array",
    ),
)


# --- Their modules, with our optimizers in them -------------------------------------------------


class Substitution:
    """One of optax's test modules in which some names mean something else.

    Attributes:
      module: the module.
      num_states: how many paged states its tests have made.
      tolerances: least ``rtol`` and ``atol`` of its comparisons.

    Raises:
      LookupError: if optax has no such module, or the module not the names to replace.
    """

    def __init__(self, suite: Suite, variant: str):
        self.num_states = 0
        self.tolerances = {"rtol": 0.0, "atol": 0.0}
        self._options = VARIANTS[variant]
        self._paged = {name: self._make_paged(*paged) for name, paged in PAGED.items()}
        self._meanings: dict[str, Callable[[Any], Any]] = {
            **{name: functools.partial(self._swap, name) for name in PAGED},
            **{
                name: functools.partial(self._swap_sgd, how)
                if how in PAGED
                else getattr(self, f"_{how}")
                for name, how in suite.instead.items()
            },
            **{
                name: functools.partial(self._keep_rows, rows)
                for name, rows in suite.tables.items()
            },
        }
        self._unmet = {*suite.instead, *suite.tables, *itertools.chain(*suite.tables.values())}
        self.module = self._load(f"optax.{suite.module}")
        if self._unmet:
            raise LookupError(
                f"there is no {', '.join(sorted(self._unmet))} in optax.{suite.module}"
            )

    def _load(self, name: str) -> types.ModuleType:
        """Runs the module's code, replacing names as they are bound.

        So the decorators in it see the tables that are meant, and optax itself stays as it is.
        """
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise LookupError(f"there is no {name}")
        module = types.ModuleType(name)
        code = compile(Path(spec.origin).read_bytes(), spec.origin, "exec", dont_inherit=True)
        with fake_sklearn(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, vars(module), Namespace(vars(module), self._replace))
        return module

    def _replace(self, name: str, value: Any) -> Any:
        if name in self._meanings:
            self._unmet.discard(name)
            return self._meanings[name](value)
        if name == "jax":  # optax 0.2.8 compares versions as strings, and finds 0.10 too old
            return stand_in(value, __version__="9.9.9")
        if name == "test_utils":
            checks = ("assert_trees_all_close", "assert_trees_all_equal")
            return stand_in(value, **{n: self._compare_moments(vars(value)[n]) for n in checks})
        if isinstance(value, types.ModuleType):
            found = self._meanings.keys() & vars(value).keys()
            self._unmet -= found
            if found:
                return stand_in(value, **{n: self._meanings[n](vars(value)[n]) for n in found})
        return value

    def _make_paged(self, make, fixed):
        @functools.wraps(make)
        def factory(*args, **kwargs):
            tx = make(*args, **{**kwargs, **fixed, **self._options})

            def init(params):
                self.num_states += 1
                return tx.init(params)

            return tx._replace(init=init)

        return factory

    def _beside(self, make):
        """The optimizer that they ask for, and a paged one that takes the same gradients."""

        @functools.wraps(make)
        def factory(*args, **kwargs):
            plain = optax.with_extra_args_support(make(*args, **kwargs))
            paged = self._paged["adam"](1e-3)

            def init(params):
                return plain.init(params), paged.init(params)

            def update(updates, state, params=None, **extra_args):
                _, paged_state = paged.update(updates, state[1], params)
                updates, plain_state = plain.update(updates, state[0], params, **extra_args)
                return updates, (plain_state, paged_state)

            return optax.GradientTransformationExtraArgs(init, update)

        return factory

    def _swap(self, name, make):
        del make
        return self._paged[name]

    def _swap_sgd(self, name, sgd):
        del sgd

        @functools.wraps(self._paged[name])
        def factory(learning_rate, momentum=None):
            del momentum
            return self._paged[name](learning_rate)

        return factory

    def _base_optimizer(self, make):
        def factory(*args, **kwargs):
            return make(*args, **{"base_optimizer": self._paged["scale_by_adam"](), **kwargs})

        return factory

    def _jit(self, multi_steps):
        """Else its tests compile every step anew, for a minute."""

        class MultiSteps(multi_steps):
            def gradient_transformation(self):
                return optax.GradientTransformation(self.init, jax.jit(self.update))

        return MultiSteps

    def _keep_state(self, sam):
        """Else each of 50,000 steps makes a state and leaves one behind."""
        return functools.partial(sam, reset_state=False)

    def _keep_rows(self, names, table):
        if isinstance(table, dict):
            self._unmet -= table.keys()
            return {name: row for name, row in table.items() if name in names}
        kept = []
        for row in table:
            cells = row.values() if isinstance(row, dict) else row
            named = {cell for cell in cells if isinstance(cell, str)}
            self._unmet -= named
            if named & {*names}:
                kept.append(row)
        return type(table)(kept)

    def _compare_moments(self, check):
        @functools.wraps(check)
        def compare(actual, desired, *args, **kwargs):
            trees = show_moments(actual), show_moments(desired)
            call = inspect.signature(check).bind(*trees, *args, **kwargs)
            call.apply_defaults()
            for name in self.tolerances.keys() & call.arguments.keys():
                call.arguments[name] = max(call.arguments[name], self.tolerances[name])
            check(*call.args, **call.kwargs)

        return compare


class Namespace:
    """The names of a module while its code runs; `replace` has a say in what they are bound to."""

    def __init__(self, names: dict[str, Any], replace: Callable[[str, Any], Any]):
        self._names, self._replace = names, replace

    def __getitem__(self, name):
        return self._names[name]

    def __setitem__(self, name, value):
        self._names[name] = self._replace(name, value)

    def __delitem__(self, name):
        del self._names[name]


def stand_in(module: types.ModuleType, **names: Any) -> types.ModuleType:
    copy = types.ModuleType(module.__name__)
    vars(copy).update(vars(module), **names)
    return copy


@contextlib.contextmanager
def fake_sklearn():
    """Only the tests of L-BFGS need it, which do not run here but are in a module with others."""
    if importlib.util.find_spec("sklearn") is not None:
        yield
        return
    sys.modules["sklearn"] = unittest.mock.MagicMock()
    try:
        yield
    finally:
        del sys.modules["sklearn"]


def show_moments(tree: Any) -> Any:
    """Moments in the place of tokens, which differ for equal moments."""

    def is_state(node):
        return isinstance(node, ScaleByPagedAdam8bitState)

    def show(node):
        if not is_state(node) or not isinstance(node.token.value, jax.Array):
            return node
        return node.count, paged_optax.moments(node) if node.count else None

    return jax.tree.map(show, tree, is_leaf=is_state)


# --- Their cases --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A case of optax's, or the reason why there is none."""

    suite: Suite
    variant: str
    substitution: Substitution | None = None
    test: unittest.TestCase | None = None
    problem: str = ""

    @property
    def description(self) -> str:
        """Class, test and parameters."""
        text = self.test.id().removeprefix(f"optax.{self.suite.module}.") if self.test else ""
        return re.sub(" at 0x[0-9a-f]+", "", text)

    def __str__(self):
        module = self.suite.module.split(".")[-1].removesuffix("_test")
        return f"{module}-{self.variant}-{self.description.split(' ')[0]}"

    def left_out(self) -> LeftOut | None:
        rows = [row for row in LEFT_OUT if row.has(self)]
        assert len(rows) < 2, rows
        return rows[0] if rows else None


def find_cases(suite: Suite, variant: str) -> list[Case]:
    try:
        substitution = Substitution(suite, variant)
    except Exception as error:  # whatever code of another release raises
        return [Case(suite, variant, problem=f"{type(error).__name__}: {error}")]
    module = substitution.module
    tests = [
        cls(name)
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, unittest.TestCase)
        and cls.__module__ == module.__name__
        for name in unittest.TestLoader().getTestCaseNames(cls)
    ]
    cases = [Case(suite, variant, substitution, test) for test in tests]
    patterns = (suite.tests, suite.variants[variant])
    cases = [c for c in cases if all(re.match(p, c.description) for p in patterns)]
    problem = f"no test in optax.{suite.module} matches {patterns}"
    return cases or [Case(suite, variant, problem=problem)]


@functools.cache
def all_cases() -> list[Case]:
    return [
        case
        for suite in SUITES
        for variant in suite.variants
        for case in find_cases(suite, variant)
    ]


def check(case: Case) -> None:
    if case.substitution is None or case.test is None:
        drift(case.problem)
    row = case.left_out()
    if row and row.error:
        with pytest.raises(row.error, match=row.match):
            case.test.debug()
            raise_if_refused()  # by a program whose results nobody passed on
        return
    tolerances = {"rtol": row.rtol, "atol": row.atol} if row else {"rtol": 0.0, "atol": 0.0}
    case.substitution.tolerances = tolerances
    num_states = case.substitution.num_states
    try:
        case.test.debug()
    except unittest.SkipTest as skip:
        drift(f"{case.suite.module} {case.description} skips itself: {skip}")
    if case.substitution.num_states == num_states:
        drift(f"{case.suite.module} {case.description} made no paged state")


def drift(message: str) -> NoReturn:
    """Optax is not as the tables say: they are wrong, or for an older release."""
    (pytest.fail if OPTAX == KNOWN_OPTAX else pytest.skip)(f"optax {OPTAX}: {message}")


@pytest.fixture
def as_optax_runs_them():
    """Optax's tests need standard promotion, and some leave x64 on."""
    x64 = jax.config.jax_enable_x64
    with jax.numpy_dtype_promotion("standard"), jax.default_device(jax.devices("cpu")[0]):
        yield
    jax.config.update("jax_enable_x64", x64)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize(
            "case",
            [pytest.param(case, id=str(case)) for case in all_cases()],
        )


@pytest.mark.usefixtures("as_optax_runs_them")
def test_case(case):
    check(case)


DRIFTED = 77  # exit status


def main() -> None:
    """Runs the tests of sharding. Prints every case, then their number."""
    warnings.simplefilter("error")
    assert jax.device_count() == 8
    cases = [case for variant in SHARDING.variants for case in find_cases(SHARDING, variant)]
    for case in cases:
        print(case)
        try:
            check(case)
        except pytest.skip.Exception as drifted:
            print(drifted)
            sys.exit(DRIFTED)
    print(len(cases))


def test_sharding(tmp_path):
    """Theirs, with as many devices as they ask for."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    process = subprocess.run(
        [sys.executable, __file__],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if process.returncode == DRIFTED:
        pytest.skip(process.stdout.splitlines()[-1])
    assert process.returncode == 0, process.stdout + process.stderr
    # init, update and jit, for each optimizer
    assert int(process.stdout.split()[-1]) >= 3 * len(ALIASES) * len(SHARDING.variants)


# --- The tables are complete --------------------------------------------------------------------


def test_cases_are_many():
    assert sum(case.test is not None for case in all_cases()) > 300


def test_every_row_leaves_out_something():
    """Else it is out of date."""
    cases = all_cases()
    assert [row for row in LEFT_OUT if not any(row.has(case) for case in cases)] == []


def test_no_test_of_adam_is_forgotten():
    root = Path(optax.__file__).parent
    run = {f"{case.suite.module} {case.description}" for case in all_cases()}
    forgotten = []
    for path in sorted(root.rglob("*_test.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        text = path.read_text(encoding="utf-8")
        if module == SHARDING.module or not re.search(ADAM, text):
            continue
        lines = text.splitlines()
        for cls in ast.parse(text).body:
            for node in cls.body if isinstance(cls, ast.ClassDef) else ():
                if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test"):
                    continue
                name = f"{module} {cls.name}.{node.name}"
                source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if re.search(ADAM, source) and not any(case.startswith(name) for case in run):
                    forgotten.append(name)
        if not any(case.startswith(f"{module} ") for case in run):
            forgotten.append(module)
    if forgotten:
        drift(f"{', '.join(forgotten)} should be in SUITES")


@pytest.mark.skipif(not DOCS.exists(), reason="tests without the source tree")
def test_docs_list_what_is_left_out():
    rows = [f"| `{row.test}` | {row.what} | {row.why} |" for row in LEFT_OUT]
    (table,) = re.findall(
        r"^\| optax test \|.*\n\|[ -|]+\|\n((?:\|.*\n)+)",
        DOCS.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert table.splitlines() == rows


if __name__ == "__main__":
    main()
