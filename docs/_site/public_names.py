"""The public names, each on one page of the reference."""

import inspect

import paged_optax

# By the module that defines them. What is on none of these pages is on the page "state".
MODULES = {
    "steps": ["_accumulate", "_check", "_in_place", "_skip"],
    "checkpoints": [
        "_bitsandbytes",
        "_checkpoint",
        "_convert",
        "_orbax",
        "_to_bitsandbytes",
    ],
    "planning": ["_plan", "_plan_room"],
}
PAGES = ("optimizers", "steps", "state", "checkpoints", "planning")


def _page_of(module: str) -> str:
    names = [name for name in paged_optax.__all__ if _module(name) == module]
    if any(_is_optimizer(getattr(paged_optax, name)) for name in names):
        return "optimizers"
    return next((page for page, modules in MODULES.items() if module in modules), "state")


def _is_optimizer(value: object) -> bool:
    return inspect.isfunction(value) and "paging" in inspect.signature(value).parameters


def _module(name: str) -> str:
    return getattr(paged_optax, name).__module__.removeprefix("paged_optax.")


def names_of(page: str) -> list[str]:
    """The public names of a page: functions first, then classes, those of a module together."""
    names = [name for name in paged_optax.__all__ if _page_of(_module(name)) == page]
    classes = [name for name in names if inspect.isclass(getattr(paged_optax, name))]
    functions = [name for name in names if name not in classes]
    return sorted(functions, key=_module) + sorted(classes, key=_module)


def as_markdown(page: str) -> str:
    lines = ["```{eval-rst}", ".. currentmodule:: paged_optax", ""]
    for name in names_of(page):
        value = getattr(paged_optax, name)
        if inspect.isclass(value):
            lines += [f".. autoclass:: {name}", "   :members:", ""]
        else:
            lines += [f".. autofunction:: {name}", ""]
    return "\n".join([*lines, "```"])
