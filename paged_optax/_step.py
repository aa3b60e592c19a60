"""What one update tells the custom call, next to its operands."""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np

from ._names import leaf_keys, number_paths, number_tree
from ._options import Options, Paging, Quantization
from ._rule import Rule
from ._tables import FORMAT_NAMES, FORMATS, OUTPUTS, PARAM_ROUNDINGS, RULES

Int8s = Annotated[tuple[int, ...], np.int8]
Int64s = Annotated[tuple[int, ...], np.int64]

# By the type of a field: what C++ calls the attribute's type, and the value that it decodes.
_TYPES: dict[Any, tuple[str, Any]] = {
    int: ("i64", np.int64),
    bool: ("bool", bool),
    str: ("str", str),
    Int8s: ("i8[]", lambda values: np.array(values, np.int8)),
    Int64s: ("i64[]", lambda values: np.array(values, np.int64)),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """The attributes of the custom call: UpdateAttrs in C++, with the same names and types.

    Equal steps are traced and compiled once.
    """

    decays: Int8s  # of each leaf, whether weight decay applies; () for a direction
    device_bytes: int  # the most of the moments that may be in device memory; -1: no limit
    directory: str  # CPU: where the file is that holds the moments; "": in memory
    flags: int  # of the rule: a bit for each
    formats: Int8s  # of each leaf, a number in `_tables.FORMATS`
    headroom_bytes: int  # device memory to leave free
    keys: Int64s  # of each leaf, for its random bits; () if nothing is rounded at random
    names: str  # paths of the leaves, a line each
    num_devices: int  # that the program runs on
    output: int  # a number in `_tables.OUTPUTS`: direction, update, or new parameter
    param_rounding: int  # an index into PARAM_ROUNDINGS
    paths: int  # a number for the names
    pinned: bool  # pinned instead of managed memory
    replay: bool  # two slots of moments, so that the last step can be run again
    restart: bool  # a state whose moments are not in this process starts over
    rule: int  # a number in `_tables.RULES`
    shards: str  # which part of each leaf a device has, see `Shards`; "": not known
    skip_elements: bool  # the direction where a gradient is not usable is 0 instead of NaN
    tree: int  # a number for the tree structure

    @property
    def rule_name(self) -> str:
        return RULES[self.rule]["name"]

    def __str__(self) -> str:
        """What is said of it in a log."""
        counts = Counter(FORMAT_NAMES[number] for number in self.formats)
        leaves = ", ".join(f"{count} in {name}" for name, count in counts.items())
        return (
            f"{self.rule_name}, {len(self.formats)} leaves ({leaves}), output"
            f" {OUTPUTS[self.output]}, on {self.num_devices} device(s)"
        )

    @property
    def takes_params(self) -> bool:
        """Whether the parameters are operands."""
        return self.output != OUTPUTS.index("direction")

    @property
    def replaced(self) -> slice:
        """Of the leaves among the operands, those whose memory and types the results have."""
        num_leaves = len(self.formats)
        in_place = self.output == OUTPUTS.index("params")
        return slice(num_leaves, None) if in_place else slice(num_leaves)

    def attributes(self) -> dict[str, Any]:
        """The fields as the FFI takes them."""
        return {
            field.name: _TYPES[field.type][1](getattr(self, field.name))
            for field in dataclasses.fields(self)
        }


def attribute_types() -> list[tuple[str, str]]:
    """Names and types of a step's attributes, in alphabetical order, as C++ lists them."""
    return [(field.name, _TYPES[field.type][0]) for field in dataclasses.fields(Step)]


def make_step(
    rule: Rule,
    options: Options,
    grads: Sequence[Any],
    paths: tuple[str, ...],
    treedef: Any,
    *,
    output: str = "direction",
    decays: tuple[bool, ...] = (),
    skip_elements: bool = False,
) -> Step:
    """The step of a program on one device.

    Args:
      rule: the optimizer.
      options: the user's.
      grads: gradients of all leaves; their sizes decide the formats.
      paths: names of the leaves.
      treedef: structure of the tree.
      output: a name in `_tables.OUTPUTS`.
      decays: of each leaf, whether weight decay applies; () for a direction.
      skip_elements: whether elements with a bad gradient are skipped, also without the option.
    """
    formats = _formats(options.quantization, jax.tree.unflatten(treedef, grads))
    takes_params = output != "direction"
    rounds_at_random = takes_params or any(FORMATS[i]["is_random"] for i in formats)
    return Step(
        decays=decays,
        flags=rule.flags,
        formats=formats,
        keys=leaf_keys(paths, options.quantization.seed) if rounds_at_random else (),
        names="\n".join(paths),
        num_devices=1,
        output=OUTPUTS.index(output),
        param_rounding=PARAM_ROUNDINGS.index(options.param_rounding) if takes_params else 0,
        paths=number_paths(paths),
        replay=options.replay,
        restart=options.missing == "restart",
        rule=rule.number,
        shards="",
        skip_elements=skip_elements or options.non_finite == "skip_element",
        tree=number_tree(paths, treedef),
        **_placement(options.paging),
    )


def _formats(quantization: Quantization, grads: Any) -> tuple[int, ...]:
    return tuple(FORMAT_NAMES.index(name) for name in quantization.formats(grads))


def _placement(paging: Paging) -> dict[str, Any]:
    return {
        "device_bytes": -1 if paging.device_bytes is None else paging.device_bytes,
        # Where the program runs from must not matter later: a jitted step keeps the text.
        "directory": "" if paging.directory is None else os.path.abspath(paging.directory),
        "headroom_bytes": paging.headroom_bytes,
        "pinned": paging.memory == "pinned",
    }
