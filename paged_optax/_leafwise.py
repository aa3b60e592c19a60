"""The equations of a traced function, and which of them belong to which leaf.

Evaluated leaf by leaf, a function needs no more memory at a time than one leaf takes.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

# Calls of functions that are written out: optax compiles some that take all leaves at once.
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call")

# The number of a value, or a literal in the program.
_Atom = Any


class Equation(NamedTuple):
    """One operation."""

    eqn: Any
    operands: list[_Atom]
    results: list[int]


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
    """

    def __init__(self, function: Any, inputs: Sequence[Any]):
        closed = jax.make_jaxpr(function)(*inputs)
        self._numbers = itertools.count()
        self._values: dict[int, Any] = {}  # constants, and what was evaluated
        self._literals: dict[int, Any] = {}
        equations: list[Equation] = []
        self.inputs = [next(self._numbers) for _ in inputs]
        atoms = self._write_out(closed.jaxpr, closed.consts, self.inputs, equations)
        self.outputs = [self._number(atom) for atom in atoms]
        self.types = [var.aval for var in closed.jaxpr.outvars]
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
            if eqn.primitive.name in _CALLS and hasattr(called, "consts"):
                results = self._write_out(called.jaxpr, called.consts, operands, equations)
            else:
                results = [next(self._numbers) for _ in eqn.outvars]
                equations.append(Equation(eqn, operands, results))
            names.update(zip(eqn.outvars, results, strict=True))
        return [atom(var) for var in jaxpr.outvars]

    def _number(self, atom: _Atom) -> int:
        if not isinstance(atom, Literal):
            return atom
        number = next(self._numbers)
        self._literals[number] = atom.val
        self._values[number] = jax.numpy.asarray(atom.val, atom.aval.dtype)
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
            name = equation.eqn.primitive.name
            if name not in ("broadcast_in_dim", "convert_element_type", "copy", "copy_p"):
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

    def split(self, owners: Mapping[int, int]) -> tuple[list[Equation], dict[int, list[Equation]]]:
        """The equations that depend on no leaf, and those of each leaf.

        Args:
          owners: of inputs, and of outputs that take the place of inputs, the number of the leaf.

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
                raise Mixed(*sorted(leaves)[:2], equation.eqn.primitive.name)
            for leaf in leaves:
                leaf_of.update(dict.fromkeys(equation.results, leaf))
                by_leaf.setdefault(leaf, []).append(equation)
            if not leaves:
                common.append(equation)
        for output in self.outputs:
            if output in owners and leaf_of.get(output, owners[output]) != owners[output]:
                raise Mixed(leaf_of[output], owners[output], "exchange of leaves")
        self.leaf_of = leaf_of
        return common, by_leaf

    def run(self, equations: Iterable[Equation]) -> None:
        """Evaluates equations whose operands are known."""
        for equation in equations:
            results = _evaluate(equation, [self._value(atom) for atom in equation.operands])
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


def _evaluate(equation: Equation, operands: Sequence[Any]) -> Sequence[Any]:
    eqn = equation.eqn
    values = {
        var: value
        for var, value in zip(eqn.invars, operands, strict=True)
        if not isinstance(var, Literal)
    }
    jaxpr = Jaxpr([], list(values), eqn.outvars, [eqn], eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, []))(*values.values())
