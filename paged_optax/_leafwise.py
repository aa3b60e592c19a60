"""The equations of a traced function, and which of them belong to which leaf.

Evaluated leaf by leaf, a function needs no more memory at a time than one leaf takes.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

# Calls of functions that are written out: optax compiles some that take all leaves at once.
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call")

# Operations with large intermediate values, or that take long.
_LARGE = {
    *("dot_general", "conv_general_dilated", "scan", "while", "cond", "cholesky"),
    *("triangular_solve", "eigh", "qr", "svd", "householder_product"),
}

# The number of a value, or a literal in the program.
_Atom = Any


class Equation(NamedTuple):
    """One operation."""

    name: str
    evaluate: Callable[[Sequence[Any]], Sequence[Any]]
    operands: list[_Atom]
    results: list[int]

    @property
    def is_large(self) -> bool:
        """Whether it may have large intermediate values, or take long."""
        return self.name in _LARGE


class Mixed(ValueError):
    """An operation depends on two leaves."""

    def __init__(self, one: int, other: int, operation: str):
        super().__init__(one, other, operation)
        self.one, self.other, self.operation = one, other, operation


class Program:
    """The equations of a function, with the functions that it calls written out.

    Args:
      function: takes arrays and returns a list of them. Whatever else it uses is a constant.
      inputs: arrays, or shapes and dtypes of them.
      writes_out_branches: whether small branches of `jax.lax.cond` are written out too. Then all of
        them are evaluated, and one is selected.
    """

    def __init__(self, function: Any, inputs: Sequence[Any], *, writes_out_branches: bool = False):
        self._writes_out_branches = writes_out_branches
        closed = jax.make_jaxpr(function)(*inputs)
        self._numbers = itertools.count()
        self._values: dict[int, Any] = {}  # constants, and what was evaluated
        self._literals: dict[int, Any] = {}
        equations: list[Equation] = []
        self.inputs = [next(self._numbers) for _ in inputs]
        atoms = self._write_out(closed.jaxpr, closed.consts, self.inputs, equations)
        self.outputs = [self._number(atom) for atom in atoms]
        types: Any = closed.out_avals
        self.dtypes = [aval.dtype for aval in types]
        self._makers = {number: eq for eq in equations for number in eq.results}
        alive = {id(eq) for eq in self._needed(self.outputs)}
        self.equations = [eq for eq in equations if id(eq) in alive]

    def _write_out(
        self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Atom], equations: list[Equation]
    ) -> list[_Atom]:
        names: dict[Any, _Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            names[var] = next(self._numbers)
            self._values[names[var]] = value

        def atom(var: Any) -> _Atom:
            return var if isinstance(var, Literal) else names[var]

        for eqn in jaxpr.eqns:
            operands = [atom(var) for var in eqn.invars]
            called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            name = eqn.primitive.name
            if name in _CALLS and hasattr(called, "consts"):
                results = self._write_out(called.jaxpr, called.consts, operands, equations)
            elif name == "cond" and self._writes_out_branches and _is_small(eqn):
                results = self._select(eqn.params["branches"], operands, equations)
            else:
                results = [next(self._numbers) for _ in eqn.outvars]
                evaluate = functools.partial(_evaluate, eqn)
                equations.append(Equation(name, evaluate, operands, results))
            names.update(zip(eqn.outvars, results, strict=True))
        return [atom(var) for var in jaxpr.outvars]

    def _select(
        self, branches: Sequence[Any], operands: Sequence[_Atom], equations: list[Equation]
    ) -> list[_Atom]:
        """The results of the branch that the first operand names."""
        which, *rest = operands
        cases = [self._write_out(b.jaxpr, b.consts, rest, equations) for b in branches]
        results = []
        for of_branches in zip(*cases, strict=True):
            results.append(next(self._numbers))
            operands = [which, *of_branches]
            equations.append(Equation("select_n", _select, operands, [results[-1]]))
        return results

    def _number(self, atom: _Atom) -> int:
        if not isinstance(atom, Literal):
            return atom
        number = next(self._numbers)
        aval: Any = atom.aval
        self._literals[number] = atom.val
        # A copy is on the mesh in use, as the results of operations are; asarray's is not.
        self._values[number] = jax.numpy.array(atom.val, aval.dtype)
        return number

    def _needed(self, outputs: Iterable[int]) -> list[Equation]:
        """The equations that make these values, in any order, without those that were evaluated."""
        found: dict[int, Equation] = {}
        wanted = [number for number in outputs if number not in self._values]
        while wanted:
            equation = self._makers.get(wanted.pop())
            if equation is None or id(equation) in found:
                continue
            found[id(equation)] = equation
            wanted += [
                atom
                for atom in equation.operands
                if not isinstance(atom, Literal) and atom not in self._values
            ]
        return list(found.values())

    def is_zero(self, output: int) -> bool:
        """Whether an output is seen to be zeros, without evaluating it."""
        if output in self._literals:
            return not self._literals[output]
        equation = self._makers.get(output)
        while equation is not None:
            operands = equation.operands
            if equation.name not in ("broadcast_in_dim", "convert_element_type", "copy", "copy_p"):
                return False
            if isinstance(operands[0], Literal):
                return not operands[0].val
            equation = self._makers.get(operands[0])
        return False

    def depends(self, outputs: Iterable[int]) -> bool:
        """Whether any of these values depends on an input."""
        numbers, inputs = list(outputs), set(self.inputs)
        known = {number: self._values.pop(number) for number in inputs & set(self._values)}
        operands = [atom for eq in self._needed(numbers) for atom in eq.operands]
        self._values.update(known)
        return any(not isinstance(atom, Literal) and atom in inputs for atom in operands) or any(
            number in inputs for number in numbers
        )

    def split(
        self, owners: Mapping[int, int], places: Iterable[tuple[int, int]]
    ) -> tuple[list[Equation], dict[int, list[Equation]]]:
        """The equations that depend on no leaf, and those of each leaf.

        Args:
          owners: of inputs, the number of the leaf.
          places: outputs that take the place of inputs, and the number of the leaf.

        Raises:
          Mixed: if a value depends on two leaves, or takes the place of another leaf.
        """
        leaf_of = {number: owners[number] for number in self.inputs if number in owners}
        common: list[Equation] = []
        by_leaf: dict[int, list[Equation]] = {}
        for equation in self.equations:
            leaves = {
                leaf_of[atom]
                for atom in equation.operands
                if not isinstance(atom, Literal) and atom in leaf_of
            }
            if len(leaves) > 1:
                one, other = sorted(leaves)[:2]
                raise Mixed(one, other, equation.name)
            for leaf in leaves:
                leaf_of.update(dict.fromkeys(equation.results, leaf))
                by_leaf.setdefault(leaf, []).append(equation)
            if not leaves:
                common.append(equation)
        for output, owner in places:
            if leaf_of.get(output, owner) != owner:
                raise Mixed(leaf_of[output], owner, "exchange of leaves")
        self.leaf_of = leaf_of
        return common, by_leaf

    def run(self, equations: Iterable[Equation]) -> None:
        """Evaluates equations whose operands are known."""
        for equation in equations:
            results = equation.evaluate([self._value(atom) for atom in equation.operands])
            self._values.update(zip(equation.results, results, strict=True))

    def run_for(self, outputs: Iterable[int]) -> list[Any]:
        """Evaluates what these values need, and returns them."""
        numbers = list(outputs)
        needed = {id(equation) for equation in self._needed(numbers)}
        self.run([equation for equation in self.equations if id(equation) in needed])
        return [self[number] for number in numbers]

    def _value(self, atom: _Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else self._values[atom]

    def __getitem__(self, number: int) -> Any:
        return self._values[number]

    def __setitem__(self, number: int, value: Any) -> None:
        self._values[number] = value


def _is_small(eqn: Any) -> bool:
    """Whether branches may all be evaluated: none has an operation that takes long."""
    return not any(
        inner.primitive.name in _LARGE and not (inner.primitive.name == "cond" and _is_small(inner))
        for branch in eqn.params["branches"]
        for inner in _all_equations(branch.jaxpr)
    )


def _all_equations(jaxpr: Any) -> Iterator[Any]:
    """Those of the functions that it calls too."""
    for eqn in jaxpr.eqns:
        yield eqn
        called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in _CALLS and hasattr(called, "jaxpr"):
            yield from _all_equations(called.jaxpr)


def _select(operands: Sequence[Any]) -> list[Any]:
    which, *cases = operands
    return [jax.lax.select_n(jax.numpy.asarray(which), *map(jax.numpy.asarray, cases))]


def _evaluate(eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of an equation of JAX."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    # Older versions of JAX return functions too.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *operands, **params)
    return results if eqn.primitive.multiple_results else [results]
