"""Does something once a module has been imported, now or later, without importing it."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

_actions: dict[str, Callable[[], None]] = {}


def after_import(name: str, action: Callable[[], None]) -> None:
    """Calls `action` after the module `name` was imported; at once if it was already."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action()
        return
    _actions[name] = action
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that something waits for, with the help of the other finders."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        del path, target
        action = _actions.pop(fullname, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)  # asks the others: nothing waits any more
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            try:
                load(module)
            except BaseException:
                _actions[fullname] = action  # somebody may try again
                raise
            action()

        spec.loader.exec_module = exec_module  # the loader is this module's own
        return spec
