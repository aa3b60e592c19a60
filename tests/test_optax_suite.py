"""Optax's own tests, with paged optimizers in them.

Optax ships its test modules. Here they are run with other meanings for some names in them: what
builds an `optax.adam` there builds a `paged_adam8bit`, and so on for every optimizer here
(`optax_tables.py`). A case that ends without having made a paged state fails, and so does one that
works although `LEFT_OUT` says that it cannot.
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
from typing import Any, NoReturn

import jax
import optax
import pytest

import paged_optax
from helpers import raise_if_refused
from optax_tables import (
    CONCERNS_US,
    KNOWN_OPTAX,
    LEFT_OUT,
    NOT_IN_OPTAX,
    PAGED,
    SHARDING,
    SUITES,
    VARIANTS,
    LeftOut,
    Suite,
)
from paged_optax import PagedTransformationState

pytestmark = [pytest.mark.optax_suite, pytest.mark.slow]

OPTAX = importlib.metadata.version("optax")
DOCS = Path(__file__).parent.parent / "docs" / "compatibility.md"
STATES = tuple(getattr(paged_optax, n) for n in paged_optax.__all__ if n.startswith("ScaleByPaged"))


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
            **{name: functools.partial(self._swap, name) for name in suite.paged},
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
        """The paged optimizer, or optax's own where there is nothing to page."""
        if name not in PAGED:
            return self._make_any(make)
        if name != "sgd":
            return self._paged[name]

        @functools.wraps(self._paged[name])
        def factory(learning_rate, momentum=None, nesterov=False, **kwargs):
            if momentum is None:
                return make(learning_rate)
            return self._paged[name](learning_rate, momentum, nesterov, **kwargs)

        return factory

    def _make_any(self, make):
        """`paged(tx)` of what optax makes."""

        @functools.wraps(make)
        def wrapped(*args, quantization=None, replay=False, **kwargs):
            tx = make(*args, **kwargs)
            return paged_optax.paged(tx, quantization=quantization, replay=replay)

        return self._make_paged(wrapped, {})

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
        return isinstance(node, (*STATES, PagedTransformationState))

    def show(node):
        if not is_state(node):
            return node
        state, *others = node if isinstance(node, PagedTransformationState) else (node,)
        if not isinstance(state.token.value, jax.Array):
            return node
        return state.count, paged_optax.moments(node) if state.count else None, *others

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
        optimizer = re.findall(r"opt_name='(\w+)'", self.description)
        return "-".join([module, self.variant, *optimizer, self.description.split(" ")[0]])

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
            paged_optax.states()  # waits for the steps under way
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
    cases = [
        c for suite in SHARDING for variant in suite.variants for c in find_cases(suite, variant)
    ]
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
    num_optimizers = [len(suite.paged) * len(suite.variants) for suite in SHARDING]
    assert int(process.stdout.split()[-1]) == 3 * sum(num_optimizers)


# --- The tables are complete --------------------------------------------------------------------


def test_cases_are_many():
    assert sum(case.test is not None for case in all_cases()) > 300


def test_every_optimizer_takes_part():
    """Or it is said why not."""
    public = {name for name in paged_optax.__all__ if re.match("(scale_by_)?paged", name)}
    taking_part = {make.__name__ for make, _ in PAGED.values()} | {"paged"}
    assert taking_part == public - NOT_IN_OPTAX.keys()
    used = {name for suite in SUITES for name in suite.paged}
    assert PAGED.keys() < used  # the others by `paged`


def test_every_row_leaves_out_something():
    """Else it is out of date."""
    cases = all_cases()
    assert [row for row in LEFT_OUT if not any(row.has(case) for case in cases)] == []


def test_no_test_of_them_is_forgotten():
    root = Path(optax.__file__).parent
    run = {f"{case.suite.module} {case.description}" for case in all_cases()}
    forgotten = []
    for path in sorted(root.rglob("*_test.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        text = path.read_text(encoding="utf-8")
        if module == SHARDING[0].module or not re.search(CONCERNS_US, text):
            continue
        lines = text.splitlines()
        for cls in ast.parse(text).body:
            for node in cls.body if isinstance(cls, ast.ClassDef) else ():
                if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test"):
                    continue
                name = f"{module} {cls.name}.{node.name}"
                source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if re.search(CONCERNS_US, source) and not any(
                    case.startswith(name) for case in run
                ):
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
